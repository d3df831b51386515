"""Streams: start, look, follow, terminate."""

from __future__ import annotations

from typing import Final
from uuid import UUID

from apiflask import APIBlueprint
from flask import Response, jsonify, request, url_for
from flask.typing import ResponseReturnValue

from webapp.calls import calls
from webapp.rest.openapi import EVENT_STREAM, described, problems
from webapp.rest.sse import many_streams_response, requested_cursor, stream_response
from webapp.schemas import FollowedStreams, NewMessageBody, StreamFilter, TerminateBody
from webapp.views import ModelView, ReceiptView, SessionView

streams = APIBlueprint("streams", __name__, url_prefix="/api", tag="Streams")

ACCEPTED: Final = described(
    SessionView,
    "A new session (to a message: with `Accept: application/json`)",
    only=("sessionId", "conversationId", "messageId", "status"),
    more={"eventsUrl": {"type": "string"}},
)
_DEFAULT_MODEL: Final = {"defaultModel": {"type": ["string", "null"]}}


@streams.post("/stream-message")
@streams.input(NewMessageBody, arg_name="body")
@streams.doc(
    responses={
        200: EVENT_STREAM,
        202: ACCEPTED,
        **problems(400, 401, 403, 404, 409, 413, 415, 429),
    }
)
def stream_message(body: NewMessageBody) -> ResponseReturnValue:
    """Send a message and stream its answer

    With `Accept: application/json` the answer is 202 with the session's ids; otherwise this very response is the
    stream.
    """
    session = calls().send(body.request(), request.headers.get("Idempotency-Key"))
    if request.accept_mimetypes.best_match(["text/event-stream", "application/json"]) != "application/json":
        return stream_response(session)
    return _accepted(session)


def _accepted(session: SessionView) -> ResponseReturnValue:
    answer = {name: session.as_dict()[name] for name in ("sessionId", "conversationId", "messageId", "status")}
    answer["eventsUrl"] = url_for("streams.stream_events", session_id=session.session_id)
    headers = {
        "X-Stream-Session-Id": str(session.session_id),
        "X-Conversation-Id": str(session.conversation_id),
        "Location": url_for("streams.stream", session_id=session.session_id),
    }
    return jsonify(answer), 202, headers


@streams.get("/streams")
@streams.input(StreamFilter, location="query", arg_name="query")
@streams.doc(
    responses={
        200: described(SessionView, "The streams of your conversations, newest first", page=True),
        **problems(401),
    }
)
def list_streams(query: StreamFilter) -> ResponseReturnValue:
    """List streams"""
    found = calls().streams(active_only=query.status == "ACTIVE", limit=query.limit)
    return jsonify({"items": [one.as_dict() for one in found]})


@streams.get("/streams/<uuid:session_id>")
@streams.doc(responses={200: described(SessionView, "The stream"), **problems(401, 404)})
def stream(session_id: UUID) -> ResponseReturnValue:
    """Look at a stream"""
    return jsonify(calls().stream(session_id).as_dict())


@streams.get("/streams/<uuid:session_id>/events")
@streams.doc(responses={200: EVENT_STREAM, 204: "You have had all of it", **problems(400, 401, 404)})
def stream_events(session_id: UUID) -> Response:
    """Follow a stream, from the start or from `Last-Event-ID`"""
    cursor = requested_cursor()
    return stream_response(calls().stream(session_id), cursor)


@streams.get("/streams/events")
@streams.input(FollowedStreams, location="query", arg_name="query")
@streams.doc(responses={200: EVENT_STREAM, 204: "You have had all of them", **problems(400, 401, 404)})
def many_streams_events(query: FollowedStreams) -> Response:
    """Follow several streams over one connection

    Before the events of a stream comes a `stream` event with its `sessionId`, and with the position that this stream
    stands at as its `id`. The response ends after the last stream's `done`.
    """
    return many_streams_response(query.positions(), calls().stream)


@streams.post("/terminate-stream")
@streams.input(TerminateBody, arg_name="body")
@streams.doc(responses={200: described(ReceiptView, "How it ended"), **problems(400, 401, 403, 404, 413, 415)})
def terminate_stream(body: TerminateBody) -> ResponseReturnValue:
    """Terminate a stream

    The receipt is the same to every caller, however many, however often.
    """
    return jsonify(calls().terminate(body.session_id, body.conversation_id).as_dict())


@streams.post("/streams/<uuid:session_id>/continue")
@streams.doc(responses={202: ACCEPTED, **problems(400, 401, 403, 404, 409, 413, 415, 429)})
def continue_stream(session_id: UUID) -> ResponseReturnValue:
    """Go on with an answer that has ended

    The new session goes on writing the same message from where its partial ends; its stream opens with that partial.
    """
    return _accepted(calls().continue_stream(session_id, request.headers.get("Idempotency-Key")))


@streams.post("/streams/<uuid:session_id>/retry")
@streams.doc(responses={202: ACCEPTED, **problems(400, 401, 403, 404, 409, 413, 415, 429)})
def retry_stream(session_id: UUID) -> ResponseReturnValue:
    """Answer the same question anew

    The old answer is kept, and names the new one as `replacedBy`.
    """
    return _accepted(calls().retry_stream(session_id, request.headers.get("Idempotency-Key")))


@streams.get("/models")
@streams.doc(
    responses={
        200: described(ModelView, "The models, the default one first", page=True, more=_DEFAULT_MODEL),
        **problems(401),
    }
)
def models() -> ResponseReturnValue:
    """List what the upstream offers"""
    found, default_model = calls().models()
    return jsonify({"items": [one.as_dict() for one in found], "defaultModel": default_model})
