"""Logging: structlog, JSON in production and readable at a terminal. Never a text that a person or a model wrote.

What is bound (`bind`) is in every later line of the same greenlet or thread: a request's id and its user, a
generation's session. A greenlet that is spawned begins with nothing bound.
"""

from __future__ import annotations

import logging
import sys
import threading
import traceback
from collections.abc import MutableMapping
from typing import Any, Final

import structlog
from structlog.contextvars import bind_contextvars, merge_contextvars

from webapp import tracing
from webapp.config import Settings

log = structlog.get_logger(__name__)

_NOISY: Final = ("alembic.runtime.plugins", "celery.beat", "celery.worker.strategy", "urllib3", "webapp.database._Pool")
# These put into words what they were given: a task's error, a query's variables. What of it is ours to say, we say.
_INDISCREET: Final = ("celery.app.trace", "strawberry.execution")
# Servers that bring handlers of their own.
_TAKEN_OVER: Final = ("gunicorn.error",)
# Errors whose messages speak of connections, names and kinds; another's may quote a value, which may be a text. By
# their names: this is loaded where gevent has not patched anything yet, and most of what they come from must not be.
_DISCREET: Final = frozenset(
    {
        "AttributeError",
        "ConfigurationError",
        "ImportError",
        "InterfaceError",
        "OSError",
        "OperationalError",
        "RedisError",
        "TypeError",
        "Unavailable",
    }
)
_QUOTING: Final = "RequestException"  # an OSError that quotes what the upstream has sent


def configure_logs(settings: Settings) -> None:
    """Send everything, the libraries' records included, to standard error in one form."""
    shared: list[Any] = [
        merge_contextvars,
        _add_trace_id,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        describe_exception,
    ]
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, _renderer(settings)],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level)
    for names, level in ((_NOISY, logging.WARNING), (_INDISCREET, logging.CRITICAL)):
        for name in names:
            logging.getLogger(name).setLevel(level)
    for name in _TAKEN_OVER:
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    threading.excepthook = _log_failed_thread
    if "gevent" in sys.modules:
        from gevent.hub import Hub

        Hub.print_exception = _log_failed_greenlet


def _renderer(settings: Settings) -> Any:
    if settings.log_format == "console" or (settings.log_format == "auto" and sys.stderr.isatty()):
        # Without the variables of each frame, which are texts as often as not.
        plain = structlog.dev.plain_traceback
        return structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain)
    return structlog.processors.JSONRenderer()


def _log_failed_thread(failure: threading.ExceptHookArgs) -> None:
    log.error("thread.failed", thread=failure.thread and failure.thread.name, exc_info=failure.exc_value)


def _log_failed_greenlet(hub: object, context: object, kind: type, error: BaseException | None, frames: Any) -> None:
    """What gevent would print, in whatever words the error has; it may be told of an error without the error."""
    if isinstance(error, BaseException) and any(base.__name__ == "RedisError" for base in type(error).__mro__):
        log.warning("greenlet.lost_redis", error=brief(error))  # Celery's, which starts it again when Redis is back
        return
    log.error("greenlet.failed", exc_info=error if isinstance(error, BaseException) else None, kind=kind.__name__)


def bind(**ids: object) -> None:
    """Have every later line of this greenlet or thread carry these ids. None is left out."""
    bind_contextvars(**{name: str(value) for name, value in ids.items() if value is not None})


def brief(error: BaseException) -> str:
    """An error's kind, and what it says where that cannot be a text that somebody wrote."""
    names = {base.__name__ for base in type(error).__mro__}
    kind = type(error).__qualname__
    return f"{kind}: {error}" if names & _DISCREET and _QUOTING not in names else kind


def describe_exception(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A processor: in place of `exc_info`, the frames of an error and of those it came from, each error in `brief`."""
    error = event.pop("exc_info", None)
    if isinstance(error, tuple):
        error = error[1]
    elif error and not isinstance(error, BaseException):
        error = sys.exc_info()[1]
    if error:
        event["exception"] = "\n".join(_chain(error))
    return event


def _chain(error: BaseException | None) -> list[str]:
    """The first cause comes first, as Python shows it."""
    told: list[str] = []
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        told.append("".join(traceback.format_tb(error.__traceback__)) + brief(error))
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return told[::-1]


def _add_trace_id(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    if trace_id := tracing.trace_id():
        event["trace_id"] = trace_id
    return event
