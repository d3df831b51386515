"""Connections to PostgreSQL that do not wait for ever.

psycopg waits for an answer until the kernel calls the connection broken. Where the server is frozen, or the network
swallows what is sent, that is many minutes or never. Here every wait ends with the deadline of whoever waits, and the
connection with it: an answer that comes later must not be taken for that to another question.
"""

from __future__ import annotations

import math
import sys
import time
from typing import Any, Final

import psycopg
from psycopg.abc import RV, PQGen
from psycopg.waiting import Ready, Wait
from sqlalchemy import Engine, event
from sqlalchemy.exc import InvalidatePoolError
from sqlalchemy.pool import ConnectionPoolEntry

from webapp.deadline import seconds_left

NO_ANSWER: Final = "the server did not answer in time"
LEAST_CONNECT_SECONDS: Final = 2
"""That psycopg gives an attempt to connect, whatever it is told."""
IDLE_SECONDS: Final = 1.0
"""After which a connection is tried before it is used: its server may have gone."""
_RETURNED_AT: Final = "sluicegate_returned_at"
_EVENTS: Final = {Wait.R: 1, Wait.W: 2, Wait.RW: 3}
"""As gevent's loop numbers them."""
_INTERVAL_SECONDS: Final = 0.1
"""Between two looks at whether the process was interrupted, as psycopg has it."""


class TimedConnection(psycopg.Connection[Any]):
    """Waits no longer than its caller may; closed by then, so that SQLAlchemy takes it for broken."""

    def wait(self, gen: PQGen[RV], interval: float = _INTERVAL_SECONDS, timeout: float | None = None) -> RV:
        left_seconds = seconds_left()
        limit_seconds = timeout if left_seconds == math.inf else left_seconds
        try:
            if _is_patched():
                return _wait_in_hub(gen, self.pgconn.socket, limit_seconds)
            return super().wait(gen, interval, limit_seconds)
        except psycopg.OperationalError:
            if seconds_left():
                raise
            self.close()
            raise psycopg.OperationalError(NO_ANSWER) from None


def _is_patched() -> bool:
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and bool(monkey.is_module_patched("select"))


def _wait_in_hub(gen: PQGen[RV], fileno: int, timeout_seconds: float | None) -> RV:
    """What `psycopg.waiting.wait_poll` does, by one watcher of gevent's instead of a poll object for each wait, in
    which a busy web process spent a seventh of its time.

    Raises:
        psycopg.OperationalError: the time is over.
    """
    import gevent
    from gevent.socket import wait as wait_for

    loop, deadline = gevent.get_hub().loop, None if timeout_seconds is None else time.monotonic() + timeout_seconds
    try:
        wanted = next(gen)
        while True:
            left_seconds = None if deadline is None else max(0.0, deadline - time.monotonic())
            watcher = loop.io(fileno, _EVENTS[wanted])
            try:
                wait_for(watcher, left_seconds, psycopg.OperationalError(NO_ANSWER))
            finally:
                watcher.close()
            wanted = gen.send(Ready(int(wanted)))
    except StopIteration as end:
        result: RV = end.value
        return result


def limit_waits(engine: Engine, timeout_seconds: float) -> None:
    """Have an engine's connections end with the deadline; and the server end by itself what nobody waits for.

    Otherwise a transaction whose client has gone without a word would keep its locks until the kernel noticed.
    """

    def connect(_dialect: Any, _record: Any, arguments: Any, options: Any) -> TimedConnection:
        left_seconds = seconds_left()
        if left_seconds < LEAST_CONNECT_SECONDS:
            raise psycopg.OperationalError(NO_ANSWER)
        if left_seconds < math.inf:
            options = options | {"connect_timeout": int(left_seconds)}
        return TimedConnection.connect(*arguments, **options)

    def limit_server(connection: TimedConnection, _: Any) -> None:
        names = ("statement_timeout", "idle_in_transaction_session_timeout")
        limit = f"{timeout_seconds * 1000:.0f}ms"
        connection.autocommit = True
        connection.execute(
            "SELECT set_config(%s, %s, false), set_config(%s, %s, false)", (names[0], limit, names[1], limit)
        )
        connection.autocommit = False

    event.listen(engine, "do_connect", connect)
    event.listen(engine, "connect", limit_server)


def ping_when_idle(engine: Engine) -> None:
    """Have a connection that nobody has used for a moment tried before it is used; one that is busy needs no trial."""

    def note(_: Any, record: ConnectionPoolEntry) -> None:
        record.info[_RETURNED_AT] = time.monotonic()

    def try_it(connection: TimedConnection, record: ConnectionPoolEntry, _: Any) -> None:
        if time.monotonic() - record.info.get(_RETURNED_AT, math.inf) > IDLE_SECONDS:
            try:
                connection.autocommit = True
                connection.execute("SELECT 1")
                connection.autocommit = False
            except psycopg.OperationalError as error:
                raise InvalidatePoolError from error

    event.listen(engine, "checkin", note)
    event.listen(engine, "checkout", try_it)
