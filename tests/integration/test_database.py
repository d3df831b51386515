"""The way to the database when the database is in trouble: what is tried again, what is given up, and when."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gevent
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from tests.integration.world import CLOSED_REDIS, make_settings
from tests.proxy import TcpProxy
from tests.services import PostgresServer, free_port, wait_until
from webapp.app import make_services
from webapp.database import PING_SECONDS, Database
from webapp.deadline import seconds_left, within
from webapp.errors import Unavailable

TIMEOUT_SECONDS = 2.5
BUSY_SECONDS = 1.0
SLACK_SECONDS = 1.0
"""For a busy machine."""
POOL_LIMIT = 30
ADD_ONE = sa.text("UPDATE counters SET n = n + 1 WHERE id = :id")
VALUE = sa.text("SELECT n FROM counters WHERE id = :id")

OpenDatabase = Callable[[str], Database]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[OpenDatabase]:
    """Opens databases with short limits, and closes them."""
    databases: list[Database] = []

    def open_(url: str) -> Database:
        limits = {"database_timeout_seconds": TIMEOUT_SECONDS, "database_busy_seconds": BUSY_SECONDS}
        databases.append(make_services(make_settings(url, CLOSED_REDIS, tmp_path, **limits)).database)
        return databases[-1]

    yield open_
    for database in databases:
        database.engine.dispose()


@pytest.fixture
def url(postgres: PostgresServer) -> Iterator[str]:
    """A PostgreSQL database with two counters."""
    url = postgres.create_database()
    with sa.create_engine(url, poolclass=sa.NullPool).begin() as connection:
        connection.execute(sa.text("CREATE TABLE counters (id int PRIMARY KEY, n int NOT NULL)"))
        connection.execute(sa.text("INSERT INTO counters VALUES (1, 0), (2, 0)"))
    yield url
    postgres.drop_database(url)


@pytest.fixture
def proxy(postgres: PostgresServer) -> Iterator[TcpProxy]:
    with TcpProxy(postgres.port) as proxy:
        yield proxy


@pytest.fixture
def far(opened: OpenDatabase, url: str, postgres: PostgresServer, proxy: TcpProxy) -> Database:
    """The database behind the proxy, with a connection that is open."""
    database = opened(url.replace(f":{postgres.port}/", f":{proxy.port}/"))
    assert value(database) == 0
    return database


def add_one(database: Database, counter: int = 1) -> None:
    database.write(lambda s: s.execute(ADD_ONE, {"id": counter}))


def value(database: Database, counter: int = 1) -> int:
    return database.read(lambda s: s.scalar(VALUE, {"id": counter})) or 0


def refused_after_seconds(call: Callable[[], object]) -> tuple[float, str]:
    """How long a call takes to say that the database is unavailable, and in which words."""
    began_at = time.monotonic()
    with pytest.raises(Unavailable) as refusal:
        call()
    assert refusal.value.retry_after_seconds
    return time.monotonic() - began_at, refusal.value.detail


def test_the_connection_that_was_used_last_is_used_next(opened: OpenDatabase, url: str) -> None:
    """Of the others, which more work at once had needed, the server's processes have their caches cold."""
    database, all_there = opened(url), threading.Barrier(5)

    def served_by(*, together: bool = False) -> int:
        def work(s: Session) -> int:
            if together:
                all_there.wait(5)
            return s.scalar(sa.select(sa.func.pg_backend_pid())) or 0

        return database.read(work)

    with ThreadPoolExecutor(5) as threads:
        several = set(threads.map(lambda _: served_by(together=True), range(5)))
    assert len(several) == 5
    assert len({served_by() for _ in range(10)}) == 1


class TestADatabaseThatDoesNotAnswer:
    """It accepts connections, and says nothing: frozen, or behind a network that swallows packets."""

    def test_every_unit_of_work_ends_in_time(self, far: Database, proxy: TcpProxy) -> None:
        proxy.swallow()
        for call in (lambda: value(far), lambda: add_one(far)):
            seconds, _ = refused_after_seconds(call)
            assert seconds > TIMEOUT_SECONDS / 2
            assert seconds < TIMEOUT_SECONDS + SLACK_SECONDS
        proxy.pass_on()
        add_one(far)
        assert value(far) == 1

    def test_more_callers_than_connections(self, far: Database, proxy: TcpProxy) -> None:
        """Nobody waits behind the others, and no place in the pool is lost."""
        proxy.swallow()
        with ThreadPoolExecutor(2 * POOL_LIMIT) as threads:
            calls = [threads.submit(refused_after_seconds, lambda: value(far)) for _ in range(2 * POOL_LIMIT)]
            assert max(call.result()[0] for call in calls) < TIMEOUT_SECONDS + SLACK_SECONDS
            proxy.pass_on()
            together = threading.Barrier(POOL_LIMIT, timeout=10)

            def work(s: Session) -> int:
                together.wait()  # all of them hold a connection
                return s.scalar(VALUE, {"id": 1}) or 0

            assert list(threads.map(lambda _: far.read(work), range(POOL_LIMIT))) == [0] * POOL_LIMIT
        assert far.engine.pool.checkedout() == 0  # type: ignore[attr-defined]

    def test_the_ping_answers_sooner_than_work_would(
        self, opened: OpenDatabase, url: str, postgres: PostgresServer, proxy: TcpProxy, tmp_path: Path
    ) -> None:
        """Whoever asks whether this process is ready does not wait as long as somebody who wants something."""
        far_url = url.replace(f":{postgres.port}/", f":{proxy.port}/")
        patient = make_settings(far_url, CLOSED_REDIS, tmp_path, database_timeout_seconds=2 * PING_SECONDS)
        database = make_services(patient).database
        database.ping()
        proxy.swallow()
        with ThreadPoolExecutor(POOL_LIMIT) as threads:
            work = [threads.submit(refused_after_seconds, lambda: value(database)) for _ in range(POOL_LIMIT)]
            assert refused_after_seconds(database.ping)[0] < PING_SECONDS + 1
            assert not all(one.done() for one in work)
        proxy.pass_on()
        database.ping()
        database.engine.dispose()

    def test_locks_of_a_client_that_vanished_are_freed(self, far: Database, url: str, proxy: TcpProxy) -> None:
        """The server has not heard that its client is gone, and lets go of what it held all the same."""

        def hold(s: Session) -> None:
            s.execute(ADD_ONE, {"id": 1})
            proxy.swallow()

        refused_after_seconds(lambda: far.write(hold))
        with sa.create_engine(url, poolclass=sa.NullPool).begin() as direct:
            direct.execute(sa.text(f"SET lock_timeout = '{TIMEOUT_SECONDS + SLACK_SECONDS}s'"))
            direct.execute(ADD_ONE, {"id": 1})

    def test_under_gevent_too_where_the_other_greenlets_run_on(
        self, far: Database, proxy: TcpProxy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """There, waits are made by gevent's loop, which is told the deadline by us."""
        monkeypatch.setattr("webapp.postgres._is_patched", lambda: True)
        assert value(far) == 0
        proxy.swallow()
        meanwhile = gevent.spawn(gevent.sleep, TIMEOUT_SECONDS / 10)
        with gevent.Timeout(2 * TIMEOUT_SECONDS, AssertionError("it waits for ever")):
            seconds, _ = refused_after_seconds(lambda: value(far))
        assert TIMEOUT_SECONDS / 2 < seconds < TIMEOUT_SECONDS + SLACK_SECONDS
        assert meanwhile.ready()
        proxy.pass_on()
        assert value(far) == 0

    def test_what_is_no_unit_of_work_has_no_limit(self, far: Database) -> None:
        """A migration takes as long as it takes."""
        with far.engine.connect() as connection:
            connection.execute(sa.text("SET statement_timeout = 0"))
            connection.execute(sa.text(f"SELECT pg_sleep({TIMEOUT_SECONDS + 0.3})"))


class TestAConnectionThatBreaksInThePool:
    """As all do when the server, or what is in between, is started anew: nobody is told of it before he uses one."""

    def test_is_tried_first_where_it_has_been_idle(
        self, far: Database, proxy: TcpProxy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """And replaced, so that its user does not notice."""
        monkeypatch.setattr("webapp.postgres.IDLE_SECONDS", 0)
        proxy.reset()
        assert value(far) == 0

    def test_is_not_tried_where_it_has_not(
        self, far: Database, proxy: TcpProxy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its user is told to try again; the next finds another."""
        monkeypatch.setattr("webapp.postgres.IDLE_SECONDS", 3600)
        proxy.reset()
        refused_after_seconds(lambda: value(far))
        assert value(far) == 0


class TestACommit:
    def test_whose_answer_is_lost_is_in_doubt(self, far: Database, proxy: TcpProxy) -> None:
        loss = proxy.lose_answer(rb"UPDATE counters.*COMMIT")
        _, detail = refused_after_seconds(lambda: add_one(far))
        assert "did not say whether this was written" in detail
        assert loss.happened.is_set()
        assert value(far) == 1

    def test_that_was_never_sent_is_not(self, far: Database, proxy: TcpProxy) -> None:
        proxy.lose_answer(rb"UPDATE counters")
        _, detail = refused_after_seconds(lambda: add_one(far))
        assert "cannot be reached" in detail
        assert value(far) == 0

    def test_also_where_the_statement_was_prepared(self, far: Database, proxy: TcpProxy) -> None:
        for _ in range(10):
            add_one(far)
        proxy.lose_answer(rb"UPDATE counters.*COMMIT")
        refused_after_seconds(lambda: add_one(far))
        assert value(far) == 11


class TestWhatPostgresSays:
    def test_a_deadlock_is_tried_again(self, opened: OpenDatabase, url: str) -> None:
        """Each has locked what the other wants: PostgreSQL breaks one off, which succeeds when it is repeated."""
        database = opened(url)
        both_hold_one = threading.Barrier(2, timeout=5)
        tries: list[int] = []

        def add_to_both(first: int, second: int) -> None:
            def work(s: Session) -> None:
                tries.append(first)
                s.execute(sa.text("SET LOCAL deadlock_timeout = '50ms'"))
                s.execute(ADD_ONE, {"id": first})
                if len(tries) <= 2:
                    both_hold_one.wait()
                s.execute(ADD_ONE, {"id": second})

            database.write(work)

        with ThreadPoolExecutor(2) as threads:
            list(threads.map(add_to_both, (1, 2), (2, 1)))
        assert len(tries) > 2
        assert [value(database, counter) for counter in (1, 2)] == [2, 2]

    def test_a_session_that_the_server_ends(self, opened: OpenDatabase, url: str) -> None:
        """`admin_shutdown`: the one that is struck is told, and the next finds a connection."""
        database = opened(url)

        def strike(s: Session) -> None:
            own = s.scalar(sa.text("SELECT pg_backend_pid()"))
            with sa.create_engine(url, poolclass=sa.NullPool).connect() as other:
                other.execute(sa.text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": own})
            s.execute(ADD_ONE, {"id": 1})

        refused_after_seconds(lambda: database.write(strike))
        add_one(database)
        assert value(database) == 1

    def test_a_standby(self, opened: OpenDatabase, url: str) -> None:
        """It can be read, and whatever writes is told to come back; the process is not ready."""
        with sa.create_engine(url, poolclass=sa.NullPool).begin() as connection:
            name = url.rpartition("/")[2]
            connection.execute(sa.text(f'ALTER DATABASE "{name}" SET default_transaction_read_only = on'))
        database = opened(url)
        assert value(database) == 0
        refused_after_seconds(lambda: add_one(database))
        assert refused_after_seconds(database.ping)[1] == "The database is read-only"

    def test_too_many_connections(self, opened: OpenDatabase, url: str, postgres: PostgresServer) -> None:
        role = f"few_{free_port()}"
        with sa.create_engine(url, poolclass=sa.NullPool).begin() as connection:
            connection.execute(sa.text(f"CREATE ROLE {role} LOGIN CONNECTION LIMIT 0"))
        try:
            refused_after_seconds(lambda: value(opened(url.replace("postgres@", f"{role}@"))))
        finally:
            with sa.create_engine(url, poolclass=sa.NullPool).begin() as connection:
                connection.execute(sa.text(f"DROP ROLE {role}"))

    def test_that_it_is_gone(self, far: Database, proxy: TcpProxy) -> None:
        proxy.refuse()
        assert refused_after_seconds(lambda: value(far))[0] < 1
        proxy.pass_on()
        assert value(far) == 0

    def test_what_is_our_own_fault_is_no_trouble_of_the_database(self, opened: OpenDatabase, url: str) -> None:
        with pytest.raises(sa.exc.ProgrammingError):
            opened(url).read(lambda s: s.execute(sa.text("SELECT nothing FROM nowhere")))


class TestSQLite:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        path = tmp_path / "counters.db"
        with sqlite3.connect(path) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("CREATE TABLE counters (id int PRIMARY KEY, n int NOT NULL)")
            connection.execute("INSERT INTO counters VALUES (1, 0)")
        return path

    def test_a_short_lock_is_but_a_delay(self, opened: OpenDatabase, path: Path) -> None:
        database = opened(f"sqlite:///{path}")
        locker = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        locker.execute("BEGIN IMMEDIATE")
        threading.Timer(0.3, locker.rollback).start()
        add_one(database)
        assert value(database) == 1

    def test_a_read_only_file(self, opened: OpenDatabase, path: Path) -> None:
        """It can be read, and the process is not ready; what is wrong is for the operator to know."""
        database = opened(f"sqlite:///{path}")

        sa.event.listen(database.engine, "do_connect", lambda *_: sqlite3.connect(f"file:{path}?mode=ro", uri=True))
        assert value(database) == 0
        seconds, detail = refused_after_seconds(lambda: add_one(database))
        assert seconds < 0.5
        assert "readonly" not in detail
        refused_after_seconds(database.ping)

    def test_a_full_disk(self, opened: OpenDatabase, path: Path) -> None:
        """Nothing is written, which callers are told at once; with room, it goes on."""
        database = opened(f"sqlite:///{path}")

        def fill(s: Session) -> None:
            pages = s.scalar(sa.text("PRAGMA page_count"))
            s.execute(sa.text(f"PRAGMA max_page_count = {pages}"))
            s.execute(sa.text("CREATE TABLE more (text)"))
            s.execute(sa.text("INSERT INTO more VALUES (zeroblob(1000000))"))

        seconds, detail = refused_after_seconds(lambda: database.write(fill))
        assert seconds < 0.5
        assert "full" not in detail
        database.read(lambda s: s.execute(sa.text("PRAGMA max_page_count = 1000000")))
        add_one(database)
        assert value(database) == 1


def test_a_deadline_is_that_of_the_block() -> None:
    assert seconds_left() == float("inf")
    with within(5):
        assert 4 < seconds_left() <= 5
        other = ThreadPoolExecutor(1).submit(seconds_left)
        assert wait_until(other.done)
        assert other.result() == float("inf")
    assert seconds_left() == float("inf")
