"""A stream as an HTTP response: server-sent events (WHATWG HTML, section 9.2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from uuid import UUID

from flask import Response, request

from webapp.readers import event_stream, follower_of
from webapp.streams.events import START, Position
from webapp.streams.follow import ManyFollowers, check_cursor
from webapp.views import SessionView


def stream_response(session: SessionView, cursor: Position = START) -> Response:
    """The stream from a cursor to `done`; 204 for a reader that has had `done`, which stops an EventSource.

    Raises:
        InvalidCursor: the cursor lies beyond the end.
    """
    if not check_cursor(cursor, session):
        return Response(status=204)
    follower = follower_of(session, cursor)
    return event_stream(follower.events(), follower.close, session)


def many_streams_response(cursors: Mapping[UUID, str | None], session_of: Callable[[UUID], SessionView]) -> Response:
    """Several streams in one response, each from its cursor to its `done`; 204 for a reader that has had them all.

    Raises:
        InvalidCursor: a cursor is not one of our ids, or lies beyond the end.
    """
    followers = []
    for session_id, cursor in cursors.items():
        position = Position.parse(cursor) if cursor else START
        session = session_of(session_id)
        if check_cursor(position, session):
            followers.append(follower_of(session, position))
    if not followers:
        return Response(status=204)
    many = ManyFollowers(followers)
    return event_stream(many.events(), many.close)


def requested_cursor() -> Position:
    """Where the reader wants to go on: the `Last-Event-ID` header, or `?lastEventId=`, or the start.

    Raises:
        InvalidCursor: it is not one of our ids.
    """
    cursor = request.headers.get("Last-Event-ID") or request.args.get("lastEventId")
    return Position.parse(cursor) if cursor else START
