"""Conversations and their messages."""

from __future__ import annotations

from typing import Final
from uuid import UUID

from apiflask import APIBlueprint
from flask import jsonify
from flask.typing import ResponseReturnValue

from webapp.calls import calls
from webapp.rest.openapi import described, problems, schema_of
from webapp.schemas import ConversationChange, ConversationPage, MemberBody, NewConversation
from webapp.views import ConversationView, MemberView, MessageView, SessionView

conversations = APIBlueprint("conversations", __name__, url_prefix="/api/conversations", tag="Conversations")

_NEXT_CURSOR: Final = {"nextCursor": {"type": ["string", "null"], "format": "uuid"}}
_STATE: Final = {
    "activeStreams": {"type": "array", "items": schema_of(SessionView)},
    "lastMessageId": {"type": ["string", "null"], "format": "uuid"},
}


@conversations.post("")
@conversations.input(NewConversation, arg_name="body")
@conversations.doc(
    responses={201: described(ConversationView, "The conversation"), **problems(400, 401, 403, 413, 415)}
)
def create(body: NewConversation) -> ResponseReturnValue:
    """Begin a conversation"""
    made = calls().create_conversation(body.title)
    return jsonify(made.as_dict()), 201, {"Location": f"/api/conversations/{made.id}"}


@conversations.get("")
@conversations.input(ConversationPage, location="query", arg_name="query")
@conversations.doc(
    responses={
        200: described(ConversationView, "A page, newest first", page=True, more=_NEXT_CURSOR),
        **problems(401),
    }
)
def list_conversations(query: ConversationPage) -> ResponseReturnValue:
    """List your conversations"""
    found, following = calls().conversations(query.limit, query.cursor, query.search)
    return jsonify({"items": [one.as_dict() for one in found], "nextCursor": str(following) if following else None})


@conversations.get("/<uuid:conversation_id>")
@conversations.doc(responses={200: described(ConversationView, "The conversation", more=_STATE), **problems(401, 404)})
def get(conversation_id: UUID) -> ResponseReturnValue:
    """Look at a conversation and its active streams"""
    return jsonify(_state(conversation_id))


@conversations.patch("/<uuid:conversation_id>")
@conversations.input(ConversationChange, arg_name="body")
@conversations.doc(
    responses={
        200: described(ConversationView, "The conversation", more=_STATE),
        **problems(400, 401, 403, 404, 413, 415),
    }
)
def rename(conversation_id: UUID, body: ConversationChange) -> ResponseReturnValue:
    """Rename a conversation"""
    calls().rename_conversation(conversation_id, body.title)
    return jsonify(_state(conversation_id))


@conversations.delete("/<uuid:conversation_id>")
@conversations.doc(responses={204: "Deleted", **problems(401, 403, 404)})
def delete(conversation_id: UUID) -> ResponseReturnValue:
    """Delete a conversation, ending its active stream first"""
    calls().delete_conversation(conversation_id)
    return "", 204


@conversations.get("/<uuid:conversation_id>/messages")
@conversations.doc(
    responses={200: described(MessageView, "The messages, oldest first", page=True), **problems(401, 404)}
)
def messages(conversation_id: UUID) -> ResponseReturnValue:
    """Read a conversation's messages"""
    found = calls().messages(conversation_id)
    return jsonify({"items": [one.as_dict() for one in found]})


@conversations.get("/<uuid:conversation_id>/members")
@conversations.doc(responses={200: described(MemberView, "The members, by name", page=True), **problems(401, 404)})
def members(conversation_id: UUID) -> ResponseReturnValue:
    """List a conversation's members"""
    return jsonify({"items": [one.as_dict() for one in calls().members(conversation_id)]})


@conversations.put("/<uuid:conversation_id>/members/<name>")
@conversations.input(MemberBody, arg_name="body")
@conversations.doc(responses={200: described(MemberView, "The member"), **problems(400, 401, 403, 404, 409, 413, 415)})
def set_member(conversation_id: UUID, name: str, body: MemberBody) -> ResponseReturnValue:
    """Make a user a member, or give a member another role"""
    return jsonify(calls().set_member(conversation_id, name, body.role).as_dict())


@conversations.delete("/<uuid:conversation_id>/members/<name>")
@conversations.doc(responses={204: "Removed", **problems(401, 403, 404, 409)})
def remove_member(conversation_id: UUID, name: str) -> ResponseReturnValue:
    """Take a member out, or leave"""
    calls().remove_member(conversation_id, name)
    return "", 204


def _state(conversation_id: UUID) -> dict[str, object]:
    conversation, active, last_message_id = calls().conversation_state(conversation_id)
    return conversation.as_dict() | {
        "activeStreams": [one.as_dict() for one in active],
        "lastMessageId": str(last_message_id) if last_message_id else None,
    }
