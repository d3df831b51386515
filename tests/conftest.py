"""Fixtures that every kind of test may use: Valkey, PostgreSQL, empty databases and the scripted upstream."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import redis

from tests.services import (
    LocalProcess,
    PostgresServer,
    ValkeyServer,
    postgres_server,
    stop_everything,
    valkey_server,
    wait_until,
)
from tests.upstream import UpstreamProcess

__all__ = ["wait_until"]  # for tests to import from either place

# So that what they assert is told in full; before anything imports them.
pytest.register_assert_rewrite("tests.functional.browsing", "tests.functional.ending", "tests.functional.text")

LOG_TAIL_CHARACTERS = 12_000


LOG_SIZES = pytest.StashKey[dict[Path, int]]()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Note how long each process's log is before the test."""
    paths = [process.log_path for process in LocalProcess.started if process.log_path.exists()]
    item.stash[LOG_SIZES] = {path: path.stat().st_size for path in paths}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show, with a failure, what each process has said since the test began."""
    report = yield
    if report.failed:
        before = item.stash.get(LOG_SIZES, {})
        for process in LocalProcess.started:
            if said := process.log_from(before.get(process.log_path, 0)):
                title = f"log of {process.name}: {process.log_path}"
                report.sections.append((title, said[-LOG_TAIL_CHARACTERS:]))
    return report


@pytest.fixture(scope="session", autouse=True)
def no_process_is_left() -> Iterator[None]:
    """End whatever the session started."""
    yield
    stop_everything()


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> ValkeyServer:
    """The session's Valkey: `.url`, `.flush()`."""
    return valkey_server(tmp_path_factory.mktemp("valkey"))


@pytest.fixture
def redis_client(valkey: ValkeyServer) -> Iterator[redis.Redis]:
    """A client of the session's Valkey, which is empty; answers are decoded to `str`."""
    valkey.flush()
    with redis.Redis.from_url(valkey.url, decode_responses=True) as client:
        yield client


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    """The session's PostgreSQL: `.create_database()` answers the URL of a new, empty database."""
    server = postgres_server(tmp_path_factory.mktemp("postgres") / "postgres.log")
    yield server
    server.discard()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """SQLAlchemy URL of an empty database of this test's own; a test that asks for it runs once on each kind."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'test.db'}"
        return
    server: PostgresServer = request.getfixturevalue("postgres")
    url = server.create_database()
    yield url
    server.drop_database(url)


@pytest.fixture(scope="session")
def upstream_process(tmp_path_factory: pytest.TempPathFactory) -> UpstreamProcess:
    """The session's scripted upstream, as it was left by the last test."""
    upstream = UpstreamProcess(tmp_path_factory.mktemp("upstream") / "upstream.log")
    upstream.start()
    return upstream


@pytest.fixture
def upstream(upstream_process: UpstreamProcess) -> UpstreamProcess:
    """The session's scripted upstream, running, with an empty record and no connection."""
    upstream_process.start()
    upstream_process.reset()
    return upstream_process
