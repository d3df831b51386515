"""OpenTelemetry traces, from the request through the task to the commit. Off by default, and then without any cost.

Where the spans are sent, and how many of them, OpenTelemetry reads from its own variables (`OTEL_*`). Attributes are
ids, reasons and lengths; an error is its kind. Never a text.
"""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Final

from webapp.config import Settings
from webapp.errors import ConfigurationError

EXIT_SECONDS: Final = 2.0
"""That a process which ends goes on trying to send its last spans."""
_OFF: Final = nullcontext()
_SERVICE: Final = "sluicegate"
MISSING: Final = "SLUICEGATE_TRACING is on, which takes OpenTelemetry: pip install 'sluicegate[otel]'"

# The extra may not be installed, and where tracing is off nothing of it is imported.
_tracer: Any = None


def configure_tracing(settings: Settings) -> None:
    """Begin to send spans, where the settings say so. To be called once a process, in the one that works.

    Raises:
        ConfigurationError: the extra `otel` is not installed.
    """
    global _tracer
    if not settings.tracing or _tracer is not None:
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise ConfigurationError(MISSING) from None
    resource = Resource.create()
    if str(resource.attributes.get("service.name", "")).startswith("unknown_service"):
        resource = resource.merge(Resource({"service.name": _SERVICE}))
    provider, exporter = TracerProvider(resource=resource, shutdown_on_exit=False), OTLPSpanExporter()
    provider.add_span_processor(BatchSpanProcessor(exporter))
    _send_the_rest_at_exit(provider.shutdown, exporter.shutdown)
    _tracer = provider.get_tracer(_SERVICE)


def _send_the_rest_at_exit(send: Callable[[], None], give_up: Callable[[], None]) -> None:
    """A receiver that is away would be tried for longer than a process has for leaving."""
    leaving = threading.Event()

    def watch() -> None:
        leaving.wait()
        time.sleep(EXIT_SECONDS)
        give_up()

    def leave() -> None:
        leaving.set()
        send()

    # Now, for at the exit no thread can be started any more.
    threading.Thread(target=watch, name="tracing.exit", daemon=True).start()
    atexit.register(leave)


def span(name: str, *, parent: Any = None, **attributes: object) -> AbstractContextManager[None]:
    """A span around a block of this greenlet; `parent`: the headers that `carrier` has made elsewhere."""
    return _OFF if _tracer is None else _span(name, parent, attributes)


@contextmanager
def _span(name: str, parent: Any, attributes: Mapping[str, object]) -> Iterator[None]:
    from opentelemetry.trace import Status, StatusCode

    context = None if parent is None else _propagator().extract(parent)
    options = {"record_exception": False, "set_status_on_exception": False}  # an error's message may quote a text
    with _tracer.start_as_current_span(name, context, attributes=_named(attributes), **options) as current:
        try:
            yield
        except Exception as error:
            current.set_status(Status(StatusCode.ERROR, type(error).__name__))
            raise


def event(name: str, **attributes: object) -> None:
    """Something that happened within the span of this greenlet."""
    if _tracer is not None:
        from opentelemetry.trace import get_current_span

        get_current_span().add_event(name, _named(attributes))


def answered(status: int) -> None:
    """The request whose span is this greenlet's has its answer."""
    if _tracer is not None:
        from opentelemetry.trace import get_current_span

        get_current_span().set_attribute("http.response.status_code", status)


def carrier() -> dict[str, str]:
    """The headers (W3C `traceparent`) by which what happens elsewhere becomes part of this greenlet's trace."""
    headers: dict[str, str] = {}
    if _tracer is not None:
        _propagator().inject(headers)
    return headers


def trace_id() -> str | None:
    """The id of this greenlet's trace; None without one."""
    if _tracer is None:
        return None
    from opentelemetry.trace import get_current_span

    context = get_current_span().get_span_context()
    return f"{context.trace_id:032x}" if context.is_valid else None


def _propagator() -> Any:
    """Only the trace: baggage, which a client may fill as it likes, stays outside."""
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator()


def _named(attributes: Mapping[str, object]) -> dict[str, Any]:
    return {
        f"sluicegate.{name}": value if isinstance(value, bool | int | float) else str(value)
        for name, value in attributes.items()
        if value is not None
    }
