"""What a failure means to the person at the terminal: one sentence, with the remedy where one is known."""

from __future__ import annotations

from collections.abc import Iterator

from webapp.errors import SluicegateError

MIGRATE_REMEDY = "the database has no tables, or old ones: run `sluicegate migrate`"


def explain(error: BaseException) -> str:
    """One line about an exception that ended a command."""
    for cause in _causes(error):
        if known := _known(cause):
            return known
    if isinstance(error, SluicegateError):
        return error.detail
    if isinstance(error, OSError):
        return str(error)
    return f"internal error: {type(error).__name__}: {error} (`sluicegate --debug …` shows where)"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The exception and what it was raised from, innermost last."""
    while error is not None:
        yield error
        error = error.__cause__


def _known(error: BaseException) -> str | None:
    import kombu.exceptions
    import redis
    from sqlalchemy.exc import DBAPIError, SQLAlchemyError

    from webapp.database import is_busy

    if isinstance(error, DBAPIError):
        if is_unmigrated(error):
            return MIGRATE_REMEDY
        if is_busy(error):
            return "the database is busy: another process holds its lock; try again"
        return f"the database cannot be reached: {_first_line(error.orig)}; check DATABASE_URL"
    if isinstance(error, SQLAlchemyError):
        return f"the database: {_first_line(error)}; check DATABASE_URL"
    if isinstance(error, redis.ConnectionError):
        return f"Redis cannot be reached: {_first_line(error)}; check REDIS_URL, or start `sluicegate up`"
    if isinstance(error, redis.RedisError):
        return f"Redis: {_first_line(error)}"
    if isinstance(error, kombu.exceptions.OperationalError):
        return f"the broker cannot be reached: {_first_line(error)}; check CELERY_BROKER_URL"
    return None


def is_unmigrated(error: BaseException) -> bool:
    """Whether this is the database saying that a table or column is not there."""
    text = str(error)
    missing = ("no such table", "no such column", "UndefinedTable", "UndefinedColumn")
    return any(word in text for word in missing)


def _first_line(error: object) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
