"""Conversations and their messages."""

from __future__ import annotations

from uuid import UUID

from apiflask import APIBlueprint
from flask import current_app, jsonify
from flask.typing import ResponseReturnValue

from webapp import auth
from webapp.auth import Action
from webapp.rest.openapi import described, problems
from webapp.rest.schemas import ConversationChange, ConversationPage, NewConversation
from webapp.streams.lifecycle import TerminationReason
from webapp.views import ConversationView, MessageView

conversations = APIBlueprint("conversations", __name__, url_prefix="/api/conversations", tag="Conversations")

UNTITLED = "New conversation"


@conversations.post("")
@conversations.input(NewConversation, arg_name="body")
@conversations.doc(
    responses={201: described(ConversationView, "The conversation"), **problems(400, 401, 413, 415, 503)}
)
def create(body: NewConversation) -> ResponseReturnValue:
    """Begin a conversation"""
    services = current_app.extensions["sluicegate"]
    made = services.conversations.create(auth.require_user().id, body.title or UNTITLED)
    return jsonify(made.as_dict()), 201, {"Location": f"/api/conversations/{made.id}"}


@conversations.get("")
@conversations.input(ConversationPage, location="query", arg_name="query")
@conversations.doc(responses={200: "A page, newest first, and the cursor of the next", **problems(401)})
def list_conversations(query: ConversationPage) -> ResponseReturnValue:
    """List your conversations"""
    services = current_app.extensions["sluicegate"]
    found, following = services.conversations.list(auth.require_user().id, query.limit, query.cursor)
    return jsonify({"items": [one.as_dict() for one in found], "nextCursor": str(following) if following else None})


@conversations.get("/<uuid:conversation_id>")
@conversations.doc(responses={200: described(ConversationView, "The conversation"), **problems(401, 404)})
def get(conversation_id: UUID) -> ResponseReturnValue:
    """Look at a conversation and its active streams"""
    return jsonify(_with_streams(auth.require(conversation_id, Action.READ)))


@conversations.patch("/<uuid:conversation_id>")
@conversations.input(ConversationChange, arg_name="body")
@conversations.doc(
    responses={200: described(ConversationView, "The conversation"), **problems(400, 401, 403, 404, 415)}
)
def rename(conversation_id: UUID, body: ConversationChange) -> ResponseReturnValue:
    """Rename a conversation"""
    auth.require(conversation_id, Action.MANAGE)
    current_app.extensions["sluicegate"].conversations.rename(conversation_id, body.title)
    return jsonify(_with_streams(auth.require(conversation_id, Action.READ)))


@conversations.delete("/<uuid:conversation_id>")
@conversations.doc(responses={204: "Deleted", **problems(401, 403, 404, 503)})
def delete(conversation_id: UUID) -> ResponseReturnValue:
    """Delete a conversation, ending its active stream first"""
    auth.require(conversation_id, Action.MANAGE)
    _end_streams(conversation_id)
    current_app.extensions["sluicegate"].conversations.hide(conversation_id)
    _end_streams(conversation_id)  # one may have begun in between; from now on none can
    return "", 204


def _end_streams(conversation_id: UUID) -> None:
    services, by = current_app.extensions["sluicegate"], auth.require_user().name
    for active in services.queries.active_in(conversation_id):
        services.manager.terminate(active.session_id, TerminationReason.CONVERSATION_DELETED, by=by)


@conversations.get("/<uuid:conversation_id>/messages")
@conversations.doc(
    responses={200: described(MessageView, "The messages, oldest first", page=True), **problems(401, 404)}
)
def messages(conversation_id: UUID) -> ResponseReturnValue:
    """Read a conversation's messages"""
    auth.require(conversation_id, Action.READ)
    found = current_app.extensions["sluicegate"].conversations.messages(conversation_id)
    return jsonify({"items": [one.as_dict() for one in found]})


def _with_streams(conversation: ConversationView) -> dict[str, object]:
    active = current_app.extensions["sluicegate"].queries.active_in(conversation.id)
    return conversation.as_dict() | {"activeStreams": [one.as_dict() for one in active]}
