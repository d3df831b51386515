"""What is noted of each request: one line in the log at its end, ids in every line until then, and a span."""

from __future__ import annotations

import re
import time
from contextlib import ExitStack
from functools import partial
from typing import Final
from uuid import uuid4

import structlog
from flask import Flask, Response, g, request
from structlog.contextvars import clear_contextvars

from webapp import tracing
from webapp.logs import bind

log = structlog.get_logger(__name__)

REQUEST_ID_HEADER: Final = "X-Request-ID"
_SANE_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,100}", re.ASCII)
_HEALTH_CHECKS: Final = frozenset({"/healthz", "/readyz", "/metrics"})


def note_requests(app: Flask) -> None:
    """To be called before anything else that looks at requests."""
    app.before_request(_begin)
    app.after_request(_answer)
    app.teardown_request(_leave)


def _begin() -> None:
    clear_contextvars()  # a connection serves one request after another
    given = request.headers.get(REQUEST_ID_HEADER, "")
    g.request_id = given if _SANE_REQUEST_ID.fullmatch(given) else uuid4().hex
    g.began_at = time.monotonic()
    ids = request.view_args or {}
    bind(request_id=g.request_id, session_id=ids.get("session_id"), conversation_id=ids.get("conversation_id"))
    if request.path not in _HEALTH_CHECKS:
        rule = request.url_rule.rule if request.url_rule else "(no such path)"
        g.span = ExitStack()
        g.span.enter_context(tracing.span(f"{request.method} {rule}", parent=request.headers))


def _answer(response: Response) -> Response:
    response.headers[REQUEST_ID_HEADER] = g.request_id
    response.call_on_close(partial(_log, request.method, request.path, response.status_code, g.began_at))
    tracing.answered(response.status_code)
    return response


def _leave(_: BaseException | None) -> None:
    """The span of a stream's request is over when the stream begins to be sent; its line is written at the end."""
    if "span" in g:
        g.pop("span").close()


def _log(method: str, path: str, status: int, began_at: float) -> None:
    """Without the query, in which there may be a token."""
    write = log.debug if path in _HEALTH_CHECKS else log.info
    milliseconds = round((time.monotonic() - began_at) * 1000, 3)
    write("request", method=method, path=path, status=status, duration_ms=milliseconds)
