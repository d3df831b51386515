"""Fixtures that run the whole system, and put it where pytest-celery looks for its clusters.

A module chooses its system by overriding `stack_database`, `stack_settings` or `stack_workers` with fixtures of its
own, which may be parametrised: `@pytest.fixture(scope="module", params=["sqlite", "postgresql"])`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

import pytest
from pytest_celery import CeleryBrokerCluster, CeleryWorkerCluster

from tests.functional.nodes import Client, Stack
from tests.services import PostgresServer, valkey_server
from tests.upstream import UpstreamProcess

# So that what they assert is told in full.
pytest.register_assert_rewrite("tests.functional.ending", "tests.functional.text")


@pytest.fixture(scope="module")
def stack_database() -> str:
    """The kind of database of a module's system: SLUICEGATE_TEST_DATABASE, by default `postgresql`."""
    return os.environ.get("SLUICEGATE_TEST_DATABASE", "postgresql")


@pytest.fixture(scope="module")
def stack_settings() -> Mapping[str, str]:
    """Environment variables of a module's system, over those that `Stack` sets."""
    return {}


@pytest.fixture(scope="module")
def stack_workers() -> int:
    """How many workers a module's system has."""
    return 1


@pytest.fixture(scope="module")
def stack_database_url(
    request: pytest.FixtureRequest, stack_database: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """URL of the empty database that the module's system gets."""
    if stack_database == "sqlite":
        yield f"sqlite:///{tmp_path_factory.mktemp('sqlite') / 'stack.db'}"
        return
    server: PostgresServer = request.getfixturevalue("postgres")
    url = server.create_database()
    yield url
    server.drop_database(url)


@pytest.fixture(scope="module")
def module_stack(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    upstream_process: UpstreamProcess,
    stack_database_url: str,
    stack_settings: Mapping[str, str],
    stack_workers: int,
) -> Iterator[Stack]:
    """The module's system: migrated, with one web process and its workers, and a Valkey that forgets nothing."""
    directory = tmp_path_factory.mktemp("stack")
    on_postgres = stack_database_url.startswith("postgresql")
    stack = Stack(
        directory,
        database_url=stack_database_url,
        valkey=valkey_server(directory / "valkey", append_only=True),
        upstream_url=upstream_process.url,
        settings=stack_settings,
        services=[request.getfixturevalue("postgres")] if on_postgres else [],
    )
    try:
        stack.release()
        workers = [stack.start_worker(wait=False) for _ in range(stack_workers)]
        stack.start_web()
        for worker in workers:
            worker.ready()
        stack.keep()
        yield stack
    finally:
        stack.stop(timeout_seconds=0)  # how they end when asked to is for tests of it
        stack.valkey.stop()


@pytest.fixture
def stack(module_stack: Stack, upstream: UpstreamProcess) -> Stack:
    """The module's system, whole again whatever the test before has done to it, over an upstream without a past."""
    module_stack.heal()
    return module_stack


@pytest.fixture
def recovery(stack: Stack) -> None:
    """With a reaper and beat, for modules that ask for it by `usefixtures`."""
    stack.start_recovery()


@pytest.fixture
def client(stack: Stack) -> Client:
    """The API, as the user `tester`."""
    return stack.client()


@pytest.fixture
def celery_backend_cluster() -> None:
    """No result backend: results are not used."""


@pytest.fixture
def celery_broker_cluster(stack: Stack) -> CeleryBrokerCluster:
    """The system's Valkey. It is stopped with the system, not by a cluster's teardown, which does nothing."""
    return CeleryBrokerCluster(stack.broker)


@pytest.fixture
def celery_worker_cluster(stack: Stack) -> CeleryWorkerCluster:
    """The system's workers, which live and are healed with it."""
    return CeleryWorkerCluster(*stack.workers)
