"""Transactions: the one way to the database, the same for web, workers and the command line.

A unit of work is a function of a session. It is run whole or not at all, and may be run again
when the database was only busy, so it must not do anything outside the database.

It has a time limit. A database that does not answer by then is as good as one that is down: the
connection is closed, and the caller told so; the transaction is whole or not there all the same.
"""

from __future__ import annotations

import random
import sqlite3
import time
from collections.abc import Callable
from typing import Any, Final, TypeVar

import structlog
from flask import Flask
from sqlalchemy import Engine, QueuePool, event, text
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import ConnectionPoolEntry

from webapp.config import Settings
from webapp.deadline import seconds_left, within
from webapp.errors import Unavailable
from webapp.logs import brief
from webapp.models import db

log = structlog.get_logger(__name__)

T = TypeVar("T")

PING_SECONDS: Final = 2.5
POOL_SECONDS: Final = 30.0
"""That whoever has no deadline waits for a connection."""
LOG_PAUSE_SECONDS: Final = 10.0
"""Between two lines that say what is wrong with the database."""
_RETRIED_SQLSTATES: Final = frozenset({"40001", "40P01", "55P03"})  # serialisation, deadlock, lock not available
# A standby, and a server that has closed a transaction because nothing was heard: psycopg calls both internal errors.
_UNAVAILABLE_SQLSTATES: Final = frozenset({"25006", "25P03"})


class Database:
    """Runs units of work; retries what is only busy; maps what is down to `Unavailable`."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine = engine
        self._timeout_seconds = settings.database_timeout_seconds
        self._busy_seconds = settings.database_busy_seconds
        self._sessions = sessionmaker(engine, expire_on_commit=False)
        self._writing: dict[str, Any] = {"sluicegate_write": True}
        self._writing_one: dict[str, Any] = {"sluicegate_write": True}
        self._reading: dict[str, Any] = {"sluicegate_write": False}
        if engine.dialect.name == "postgresql":
            # Its transactions see what others commit meanwhile anyway: BEGIN and COMMIT only cost two round trips.
            self._reading["isolation_level"] = self._writing_one["isolation_level"] = "AUTOCOMMIT"
        self._said_at = -LOG_PAUSE_SECONDS

    def read(self, work: Callable[[Session], T]) -> T:
        """Run work that writes nothing.

        Raises:
            Unavailable: the database cannot be reached, did not answer in time, or stayed busy.
        """
        return self._run(work, self._reading, busy_seconds=self._busy_seconds)

    def write(self, work: Callable[[Session], T], *, busy_seconds: float | None = None) -> T:
        """Run work in one transaction and commit it; a busy database is tried again for `busy_seconds`, by default
        the setting's.

        Raises:
            Unavailable: as for `read`; nothing was written, or (where the connection broke, or no
                answer came, during the commit) it is not known whether it was.
        """
        busy_seconds = self._busy_seconds if busy_seconds is None else busy_seconds
        return self._run(work, self._writing, busy_seconds=busy_seconds)

    def write_one(self, work: Callable[[Session], T]) -> T:
        """Run work that writes by one statement, and may read before and after it; that statement is a transaction.

        Raises:
            Unavailable: as for `write`; after any error it is not known whether it was written.
        """
        return self._run(work, self._writing_one, busy_seconds=self._busy_seconds)

    def _run(
        self,
        work: Callable[[Session], T],
        options: dict[str, Any],
        *,
        busy_seconds: float,
        timeout_seconds: float | None = None,
    ) -> T:
        busy_until = time.monotonic() + busy_seconds
        pause_seconds = 0.001
        while True:
            worked = False
            try:
                with within(timeout_seconds or self._timeout_seconds), self._sessions.begin() as session:
                    session.connection(execution_options=options)
                    result = work(session)
                    worked = True
                return result
            except (DBAPIError, PoolTimeout) as error:
                if not _is_unavailable(error):
                    raise
                if not is_busy(error) or time.monotonic() > busy_until:
                    self._say(error)
                    in_doubt = options is self._writing_one or (options is self._writing and worked)
                    raise _unavailable(in_doubt=in_doubt and not is_busy(error)) from error
            time.sleep(pause_seconds * random.uniform(0.5, 1.5))  # noqa: S311 - spreads the tries, no secret
            pause_seconds = min(pause_seconds * 2, 0.05)

    def _say(self, error: Exception) -> None:
        """Callers are told only that the database is not there; whoever operates it is to know why."""
        if time.monotonic() - self._said_at >= LOG_PAUSE_SECONDS:
            self._said_at = time.monotonic()
            log.warning("database.unavailable", error=brief(getattr(error, "orig", None) or error))

    def ping(self) -> None:
        """Raises `Unavailable` where the database does not answer within `PING_SECONDS`, or nothing can be written."""
        self._run(_require_writable, self._writing, busy_seconds=PING_SECONDS, timeout_seconds=PING_SECONDS)


class _Pool(QueuePool):
    """Waits for a connection no longer than its caller may."""

    def _do_get(self) -> ConnectionPoolEntry:
        self._timeout = min(seconds_left(), POOL_SECONDS)
        return super()._do_get()


def configure_database(app: Flask, settings: Settings) -> None:
    """Bind Flask-SQLAlchemy to the configured database."""
    app.config["SQLALCHEMY_DATABASE_URI"] = settings.effective_database_url
    sqlite = settings.effective_database_url.startswith("sqlite")
    if sqlite:
        settings.data_dir.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = (
        {"connect_args": {"timeout": 0 if _patched() else 5}, "pool_size": 10, "max_overflow": 90}
        if sqlite
        else {"pool_size": 10, "max_overflow": 20, "connect_args": {"connect_timeout": 5}}
    )
    # The texts are among the parameters, and an error's message is logged.
    # The connection used last is the one whose server process has everything at hand.
    always = {"hide_parameters": True, "poolclass": _Pool, "pool_use_lifo": True}
    app.config["SQLALCHEMY_ENGINE_OPTIONS"] = options | always
    db.init_app(app)


def open_database(app: Flask, settings: Settings) -> Database:
    """The database of an application whose tables are bound."""
    with app.app_context():
        engine = db.engine
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _on_sqlite_connect)
        event.listen(engine, "begin", _on_sqlite_begin)
    elif engine.dialect.driver == "psycopg":
        from webapp.postgres import limit_waits, ping_when_idle  # psycopg takes its time, and SQLite does without

        limit_waits(engine, settings.database_timeout_seconds)
        ping_when_idle(engine)
    return Database(engine, settings)


def _on_sqlite_connect(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # we say BEGIN ourselves: sqlite3 would do so too late
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("PRAGMA foreign_keys = ON")


def _on_sqlite_begin(connection: Any) -> None:
    # A transaction that begins by reading and writes later cannot wait for another writer; one that
    # means to write therefore says so at once.
    write = connection.get_execution_options().get("sluicegate_write", True)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


def is_busy(error: BaseException) -> bool:
    """Whether this is the database saying that others are in the way, and that nothing was done."""
    if not isinstance(error, DBAPIError):
        return False
    original = error.orig
    if isinstance(original, sqlite3.OperationalError):
        return "locked" in str(original) or "busy" in str(original)
    return _sqlstate(error) in _RETRIED_SQLSTATES


def _is_unavailable(error: DBAPIError | PoolTimeout) -> bool:
    """Whether it is the database's trouble, and not that of what it was asked."""
    if isinstance(error, (OperationalError, InterfaceError, PoolTimeout)):
        return True
    return error.connection_invalidated or _sqlstate(error) in _UNAVAILABLE_SQLSTATES


def _sqlstate(error: DBAPIError) -> str | None:
    return getattr(error.orig, "sqlstate", None)


def _unavailable(*, in_doubt: bool) -> Unavailable:
    if in_doubt:
        return Unavailable("The database did not say whether this was written; look, or repeat it")
    return Unavailable("The database cannot be reached or is busy; try again")


def _require_writable(session: Session) -> None:
    if session.get_bind().dialect.name == "postgresql":
        if session.scalar(text("SHOW transaction_read_only")) == "on":
            raise Unavailable("The database is read-only")
    else:
        session.execute(text("PRAGMA user_version = 1"))  # of no use to us; the file's first page
        session.rollback()


def _patched() -> bool:
    """Whether gevent has patched this process. There, waiting inside SQLite would stop every greenlet,
    so it must not wait: `_run` tries again after a sleep that lets the others run."""
    try:
        from gevent.monkey import is_module_patched
    except ImportError:
        return False
    return bool(is_module_patched("time"))
