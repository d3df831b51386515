"""Fixtures that run the whole system, and put it where pytest-celery looks for its clusters.

A module chooses its system by overriding `stack_database`, `stack_settings` or `stack_workers` with fixtures of its
own, which may be parametrised: `@pytest.fixture(scope="module", params=["sqlite", "postgresql"])`.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page
from pytest_celery import CeleryBrokerCluster, CeleryWorkerCluster

from tests.functional.browsing import ChatPage, chromium, quiet_context
from tests.functional.nodes import Client, Stack
from tests.services import PostgresServer, ValkeyServer, valkey_server
from tests.upstream import UpstreamProcess


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


class Prepared:
    """Databases as a system has them that was set up: migrated, with a user. Each kind is made once, and copied."""

    def __init__(self, directory: Path, valkey: ValkeyServer, postgres: Callable[[], PostgresServer]) -> None:
        """`postgres` answers the server, which is not started where nobody asks for it."""
        self._directory = directory
        self._valkey = valkey
        self._postgres = postgres
        self._templates: dict[str, tuple[str, str]] = {}

    def token(self, kind: str) -> str:
        """The token of the user `tester` in each copy of that kind."""
        return self._template(kind)[1]

    def sqlite(self, directory: Path) -> str:
        """URL of a new copy in a directory."""
        url, _ = self._template("sqlite")
        with contextlib.closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as template:
            template.execute("VACUUM INTO ?", [str(directory / "stack.db")])
        return f"sqlite:///{directory / 'stack.db'}"

    def postgresql(self) -> str:
        """URL of a new copy at the session's server."""
        url, _ = self._template("postgresql")
        return self._postgres().create_database(template=url.rpartition("/")[2])

    def _template(self, kind: str) -> tuple[str, str]:
        if kind not in self._templates:
            directory = self._directory / kind
            directory.mkdir()
            sqlite = f"sqlite:///{directory / 'template.db'}"
            url = sqlite if kind == "sqlite" else self._postgres().create_database()
            stack = Stack(directory, database_url=url, valkey=self._valkey, upstream_url="http://127.0.0.1:9")
            stack.release()
            self._templates[kind] = url, stack.user("tester")
        return self._templates[kind]


@pytest.fixture(scope="session")
def prepared(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, valkey: ValkeyServer
) -> Prepared:
    """Makes databases that need neither the migrations nor a user any more."""
    return Prepared(tmp_path_factory.mktemp("prepared"), valkey, lambda: request.getfixturevalue("postgres"))


@pytest.fixture(scope="module")
def stack_database_url(
    request: pytest.FixtureRequest, prepared: Prepared, stack_database: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """URL of the database that the module's system gets."""
    if stack_database == "sqlite":
        yield prepared.sqlite(tmp_path_factory.mktemp("sqlite"))
        return
    server: PostgresServer = request.getfixturevalue("postgres")
    url = prepared.postgresql()
    yield url
    server.drop_database(url)


@pytest.fixture(scope="module")
def module_stack(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    prepared: Prepared,
    upstream_process: UpstreamProcess,
    stack_database: str,
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
        tokens={"tester": prepared.token(stack_database)},
    )
    try:
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


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A Chromium."""
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page of a browser without a past, which complains of nothing."""
    with quiet_context(browser) as context:
        yield context.new_page()


@pytest.fixture
def chat(stack: Stack, page: Page) -> ChatPage:
    """The chat page, signed in as `tester`, whose API `client` is."""
    chat = ChatPage(page, stack.url())
    chat.sign_in(stack.user("tester"))
    return chat
