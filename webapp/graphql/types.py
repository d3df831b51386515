"""What GraphQL shows: the frozen views, under the names that clients know them by.

A view's fields are the type's fields, so that REST and GraphQL cannot come apart. Only what GraphQL would spell
in another way is said here.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final, NewType
from uuid import UUID

import strawberry
from strawberry.annotation import StrawberryAnnotation
from strawberry.scalars import JSON
from strawberry.schema.types.scalar import DEFAULT_SCALAR_REGISTRY
from strawberry.types.scalar import ScalarDefinition

from webapp.calls import calls
from webapp.graphql.limits import take_nested_list
from webapp.streams.lifecycle import StreamPhase, StreamStatus
from webapp.views import (
    ConversationView,
    MemberView,
    MessageView,
    ModelView,
    ReceiptView,
    SessionView,
    UserView,
    View,
    timestamp,
)

BigInt = NewType("BigInt", int)
"""An integer beyond the 32 bits of GraphQL's Int, as the bytes of a model are."""

SCALARS: Final[dict[object, ScalarDefinition]] = {
    UUID: DEFAULT_SCALAR_REGISTRY[strawberry.ID],
    datetime: strawberry.scalar(
        name="DateTime", description="RFC 3339 in UTC, to the microsecond.", serialize=timestamp, parse_value=str
    ),
    BigInt: strawberry.scalar(
        name="BigInt", description="An integer that may need more than 32 bits.", serialize=int, parse_value=int
    ),
}


def _name(view: type[View], name: str, **annotations: Any) -> None:
    """Make a view a GraphQL type; `annotations` are those of fields that GraphQL types otherwise than the view."""
    parameters = view.__dataclass_params__  # type: ignore[attr-defined]
    definition = strawberry.type(view, name=name).__strawberry_definition__  # type: ignore[attr-defined]
    # Strawberry makes it a dataclass once more, which changes nothing but this: it is frozen still, and is to say so.
    view.__dataclass_params__ = parameters  # type: ignore[attr-defined]
    for field in definition.fields:
        if field.python_name in annotations:
            field.type_annotation = StrawberryAnnotation(annotations[field.python_name])


def _resolve(view: type[View], name: str, resolver: Any) -> None:
    """Give a type a field that the view has not: asked for by a call of its own, and only where a query names it."""
    field = strawberry.field(resolver=resolver)
    field.python_name, field.origin = name, view
    view.__strawberry_definition__.fields.append(field)  # type: ignore[attr-defined]


def _messages(root: strawberry.Parent[ConversationView]) -> list[MessageView]:
    take_nested_list()
    return list(calls().messages(root.id))


def _active_streams(root: strawberry.Parent[ConversationView]) -> list[SessionView]:
    take_nested_list()
    return calls().active_streams_in(root.id)


def _members(root: strawberry.Parent[ConversationView]) -> list[MemberView]:
    take_nested_list()
    return calls().members(root.id)


strawberry.enum(StreamStatus)
strawberry.enum(StreamPhase)
# A reason is a String: more of them may come, and a client is to treat one that it does not know by its status.
_name(SessionView, "StreamSession", reason=str | None)
_name(ReceiptView, "TerminationReceipt", reason=str)
_name(MessageView, "Message", status=StreamStatus | None, stats=JSON | None)
_name(ModelView, "Model", size_bytes=BigInt | None)
_name(MemberView, "Member")
_name(UserView, "User")
_name(ConversationView, "Conversation")
_resolve(ConversationView, "messages", _messages)
_resolve(ConversationView, "active_streams", _active_streams)
_resolve(ConversationView, "members", _members)


@strawberry.type
class ConversationPage:
    """Conversations, newest first, and the cursor of the next page."""

    items: list[ConversationView]
    next_cursor: UUID | None


@strawberry.type(description="Why a stream was not terminated, with REST's code.")
class StreamError:
    """A refusal that is an answer."""

    code: str
    message: str
