"""Streams: start, look, follow, terminate."""

from __future__ import annotations

import hashlib
import json
from typing import Any, cast
from uuid import UUID

from apiflask import APIBlueprint
from flask import Response, current_app, jsonify, request, url_for
from flask.typing import ResponseReturnValue

from webapp import auth
from webapp.auth import Action
from webapp.errors import ConversationBusy, Invalid, NotFound, TooLarge
from webapp.rest.openapi import EVENT_STREAM, described, problems
from webapp.rest.schemas import NewMessageBody, StreamFilter, TerminateBody
from webapp.rest.sse import requested_cursor, stream_response
from webapp.streams.lifecycle import TerminationReason
from webapp.streams.ports import NewMessage, RequestKey
from webapp.views import ReceiptView, SessionView, camel_case

streams = APIBlueprint("streams", __name__, url_prefix="/api", tag="Streams")


@streams.post("/stream-message")
@streams.input(NewMessageBody, arg_name="body")
@streams.doc(
    responses={
        200: EVENT_STREAM,
        202: "Accepted (with Accept: application/json)",
        **problems(400, 401, 403, 404, 409, 413, 415, 429, 503),
    }
)
def stream_message(body: NewMessageBody) -> ResponseReturnValue:
    """Send a message and stream its answer

    With `Accept: application/json` the answer is 202 with the session's ids; otherwise this very response is the
    stream.
    """
    session = _start(body, _request_key())
    if request.accept_mimetypes.best_match(["text/event-stream", "application/json"]) != "application/json":
        return stream_response(session)
    answer = {name: session.as_dict()[name] for name in ("sessionId", "conversationId", "messageId", "status")}
    answer["eventsUrl"] = url_for("streams.stream_events", session_id=session.session_id)
    headers = {
        "X-Stream-Session-Id": str(session.session_id),
        "X-Conversation-Id": str(session.conversation_id),
        "Location": url_for("streams.stream", session_id=session.session_id),
    }
    return jsonify(answer), 202, headers


def _request_key() -> RequestKey | None:
    """The Idempotency-Key header, which lets a client repeat a request whose answer it did not get."""
    key = request.headers.get("Idempotency-Key")
    if key is None:
        return None
    if not 1 <= len(key) <= 255 or not key.isprintable():
        problem = "must have 1 to 255 printable characters"
        raise Invalid(f"Idempotency-Key {problem}", errors=[{"field": "Idempotency-Key", "message": problem}])
    body = json.dumps(request.get_json(), sort_keys=True)
    return RequestKey(auth.require_user().id, key, hashlib.sha256(body.encode()).hexdigest())


def _start(body: NewMessageBody, key: RequestKey | None) -> SessionView:
    services = current_app.extensions["sluicegate"]
    if key is not None and (same := services.manager.repeated(key)):
        auth.require(same.conversation_id, Action.READ)  # it may have been deleted since, or taken from the user
        return cast(SessionView, same)
    user = auth.require_user()
    _check_length(body.content, services.settings.message_limit_characters)
    if body.conversation_id is not None:
        auth.require(body.conversation_id, Action.SEND)
    new = NewMessage(
        user_id=user.id,
        content=body.content,
        model=body.model or services.upstream.default_model(),
        conversation_id=body.conversation_id,
        options=body.options,
        think=body.think,
        keep_alive=body.keep_alive or services.settings.keep_alive or None,
        on_disconnect=body.on_disconnect,
        request_key=key,
    )
    try:
        return services.manager.start(new)
    except ConversationBusy:
        if body.on_active != "terminate" or body.conversation_id is None:
            raise
    for active in services.queries.active_in(body.conversation_id):
        services.manager.terminate(active.session_id, TerminationReason.SUPERSEDED, by=user.name)
    return services.manager.start(new)


def _check_length(content: str, limit: int) -> None:
    if len(content) > limit:
        raise TooLarge(f"content: {len(content)} characters are more than the {limit} allowed", field="content")


@streams.get("/streams")
@streams.input(StreamFilter, location="query", arg_name="query")
@streams.doc(responses={200: "The streams of your conversations, newest first", **problems(401)})
def list_streams(query: StreamFilter) -> ResponseReturnValue:
    """List streams"""
    found = current_app.extensions["sluicegate"].queries.list_streams(
        active_only=query.status == "ACTIVE", user_id=auth.require_user().id, limit=query.limit
    )
    return jsonify({"items": [one.as_dict() for one in found]})


@streams.get("/streams/<uuid:session_id>")
@streams.doc(responses={200: described(SessionView, "The stream"), **problems(401, 404)})
def stream(session_id: UUID) -> ResponseReturnValue:
    """Look at a stream"""
    return jsonify(_visible(session_id, Action.READ).as_dict())


@streams.get("/streams/<uuid:session_id>/events")
@streams.doc(responses={200: EVENT_STREAM, 204: "You have had all of it", **problems(400, 401, 404)})
def stream_events(session_id: UUID) -> Response:
    """Follow a stream, from the start or from `Last-Event-ID`"""
    cursor = requested_cursor()
    return stream_response(_visible(session_id, Action.READ), cursor)


@streams.post("/terminate-stream")
@streams.input(TerminateBody, arg_name="body")
@streams.doc(responses={200: described(ReceiptView, "How it ended"), **problems(400, 401, 403, 404, 415, 503)})
def terminate_stream(body: TerminateBody) -> ResponseReturnValue:
    """Terminate a stream

    The receipt is the same to every caller, however many, however often.
    """
    session = _visible(body.session_id, Action.TERMINATE)
    if body.conversation_id is not None and body.conversation_id != session.conversation_id:
        raise NotFound(f"There is no stream {body.session_id} in conversation {body.conversation_id} that you can see")
    manager = current_app.extensions["sluicegate"].manager
    receipt = manager.terminate(session.session_id, TerminationReason.USER, by=auth.require_user().name)
    return jsonify(receipt.as_dict())


@streams.get("/models")
@streams.doc(responses={200: "The models, the default one first", **problems(401, 503)})
def models() -> ResponseReturnValue:
    """List what the upstream offers"""
    upstream = current_app.extensions["sluicegate"].upstream
    found: list[dict[str, Any]] = upstream.models()
    return jsonify({"items": found, camel_case("default_model"): upstream.default_model() if found else None})


def _visible(session_id: UUID, action: Action) -> SessionView:
    """The session, where the asking user may do this in its conversation."""
    session: SessionView = current_app.extensions["sluicegate"].queries.view(session_id)
    try:
        auth.require(session.conversation_id, action)
    except NotFound:
        raise NotFound(f"There is no stream {session_id} that you can see") from None
    return session
