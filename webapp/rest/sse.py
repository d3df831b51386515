"""A stream as an HTTP response: server-sent events (WHATWG HTML, section 9.2)."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import gevent
from flask import Response, current_app, request

from webapp.streams.events import START, Position
from webapp.streams.follow import Follower, check_cursor
from webapp.views import SessionView


def stream_response(session: SessionView, cursor: Position = START) -> Response:
    """The stream from a cursor to `done`; 204 for a reader that has had `done`, which stops an EventSource.

    Raises:
        InvalidCursor: the cursor lies beyond the end.
    """
    if not check_cursor(cursor, session):
        return Response(status=204)
    services = current_app.extensions["sluicegate"]
    follower = Follower(
        session,
        cursor,
        queries=services.queries,
        token_log=services.log,
        hub=services.hub,
        settings=services.settings,
    )
    response = Response(_watched(follower, request.environ.get("gunicorn.socket")), content_type="text/event-stream")
    response.headers.update(
        {
            "Cache-Control": "no-cache",
            "X-Accel-Buffering": "no",
            "X-Stream-Session-Id": str(session.session_id),
            "X-Conversation-Id": str(session.conversation_id),
        }
    )
    return response


def requested_cursor() -> Position:
    """Where the reader wants to go on: the `Last-Event-ID` header, or `?lastEventId=`, or the start.

    Raises:
        InvalidCursor: it is not one of our ids.
    """
    cursor = request.headers.get("Last-Event-ID") or request.args.get("lastEventId")
    return Position.parse(cursor) if cursor else START


def _watched(follower: Follower, connection: Any) -> Iterator[bytes]:
    """The events, with a greenlet that sees at once when the reader goes, also while there is nothing to write."""
    watcher = gevent.spawn(_close_when_gone, follower, connection) if connection is not None else None
    try:
        yield from follower.events()
    finally:
        follower.close()
        if watcher is not None:
            watcher.kill()


def _close_when_gone(follower: Follower, connection: socket.socket) -> None:
    try:
        if connection.recv(1, socket.MSG_PEEK):
            return  # the client sent something more: it is there, and we cannot look further
    except OSError:
        pass
    follower.close()
