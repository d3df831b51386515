"""Transactions: the one way to the database, the same for web, workers and the command line.

A unit of work is a function of a session. It is run whole or not at all, and may be run again
when the database was only busy, so it must not do anything outside the database.
"""

from __future__ import annotations

import random
import sqlite3
import time
from collections.abc import Callable
from typing import Any, Final, TypeVar

from flask import Flask
from sqlalchemy import Engine, event, text
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session, sessionmaker

from webapp.config import Settings
from webapp.errors import Unavailable
from webapp.models import db

T = TypeVar("T")

BUSY_LIMIT_SECONDS: Final = 15.0
"""How long work is tried again while the database is only busy."""
_RETRIED_SQLSTATES: Final = frozenset({"40001", "40P01", "55P03"})  # serialisation, deadlock, lock not available


class Database:
    """Runs units of work; retries what is only busy; maps what is down to `Unavailable`."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._sessions = sessionmaker(engine, expire_on_commit=False)

    def read(self, work: Callable[[Session], T]) -> T:
        """Run work that writes nothing.

        Raises:
            Unavailable: the database cannot be reached, or stayed busy.
        """
        return self._run(work, write=False, busy_limit_seconds=BUSY_LIMIT_SECONDS)

    def write(self, work: Callable[[Session], T], *, busy_limit_seconds: float = BUSY_LIMIT_SECONDS) -> T:
        """Run work in one transaction and commit it; a busy database is tried again for `busy_limit_seconds`.

        Raises:
            Unavailable: as for `read`; nothing was written, or (where the connection broke during
                the commit) it is not known whether it was.
        """
        return self._run(work, write=True, busy_limit_seconds=busy_limit_seconds)

    def _run(self, work: Callable[[Session], T], *, write: bool, busy_limit_seconds: float) -> T:
        deadline = time.monotonic() + busy_limit_seconds
        pause_seconds = 0.001
        while True:
            try:
                with self._sessions.begin() as session:
                    session.connection(execution_options={"sluicegate_write": write})
                    return work(session)
            except (OperationalError, InterfaceError, PoolTimeout) as error:
                if not _is_busy(error) or time.monotonic() > deadline:
                    raise Unavailable("The database cannot be reached or is busy; try again") from error
            time.sleep(pause_seconds * random.uniform(0.5, 1.5))  # noqa: S311 - spreads the tries, no secret
            pause_seconds = min(pause_seconds * 2, 0.05)

    def ping(self) -> None:
        """Raises `Unavailable` where the database does not answer."""
        self.read(lambda session: session.execute(text("SELECT 1")))


def configure_database(app: Flask, settings: Settings) -> None:
    """Bind Flask-SQLAlchemy to the configured database."""
    app.config["SQLALCHEMY_DATABASE_URI"] = settings.effective_database_url
    sqlite = settings.effective_database_url.startswith("sqlite")
    if sqlite:
        settings.data_dir.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = (
        {"connect_args": {"timeout": 0 if _patched() else 5}, "pool_size": 10, "max_overflow": 90}
        if sqlite
        else {"pool_pre_ping": True, "pool_size": 10, "max_overflow": 20, "connect_args": {"connect_timeout": 5}}
    )
    # The texts are among them, and an error's message is logged.
    app.config["SQLALCHEMY_ENGINE_OPTIONS"] = options | {"hide_parameters": True}
    db.init_app(app)


def open_database(app: Flask) -> Database:
    """The database of an application whose tables are bound."""
    with app.app_context():
        engine = db.engine
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _on_sqlite_connect)
        event.listen(engine, "begin", _on_sqlite_begin)
    return Database(engine)


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


def _is_busy(error: Exception) -> bool:
    if not isinstance(error, DBAPIError):
        return False
    original = error.orig
    if isinstance(original, sqlite3.OperationalError):
        return "locked" in str(original) or "busy" in str(original)
    return getattr(original, "sqlstate", None) in _RETRIED_SQLSTATES


def _patched() -> bool:
    """Whether gevent has patched this process. There, waiting inside SQLite would stop every greenlet,
    so it must not wait: `_run` tries again after a sleep that lets the others run."""
    try:
        from gevent.monkey import is_module_patched
    except ImportError:
        return False
    return bool(is_module_patched("time"))
