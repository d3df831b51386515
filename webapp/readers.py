"""A reader's connection: the response that a stream is sent in, and how its reader's leaving is noticed at once."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import gevent
from flask import Response, current_app, request

from webapp.streams.events import START, Position
from webapp.streams.follow import Follower
from webapp.views import SessionView


def follower_of(session: SessionView, cursor: Position = START) -> Follower:
    """A reader of a session, over the services of the application that serves this request."""
    services = current_app.extensions["sluicegate"]
    return Follower(
        session,
        cursor,
        queries=services.queries,
        token_log=services.log,
        hub=services.hub,
        settings=services.settings,
    )


def event_stream(events: Iterable[bytes], close: Callable[[], None], session: SessionView | None = None) -> Response:
    """Server-sent events as the response to this request; `close` is called as soon as the reader has gone.

    It may be called more than once, and from another greenlet; it is to make `events` end soon.
    """
    response = Response(
        _watched(events, close, request.environ.get("gunicorn.socket")), content_type="text/event-stream"
    )
    response.headers.update({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
    if session is not None:
        response.headers["X-Stream-Session-Id"] = str(session.session_id)
        response.headers["X-Conversation-Id"] = str(session.conversation_id)
    return response


def _watched(events: Iterable[bytes], close: Callable[[], None], connection: Any) -> Iterator[bytes]:
    """The events, with a greenlet that sees at once when the reader goes, also while there is nothing to write."""
    watcher = gevent.spawn(_close_when_gone, close, connection) if connection is not None else None
    try:
        yield from events
    finally:
        close()
        if watcher is not None:
            watcher.kill()


def _close_when_gone(close: Callable[[], None], connection: socket.socket) -> None:
    try:
        if connection.recv(1, socket.MSG_PEEK):
            return  # the client sent something more: it is there, and we cannot look further
    except OSError:
        pass
    close()
