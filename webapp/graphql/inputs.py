"""What is asked for: GraphQL's inputs, made into the bodies that REST takes, and checked by the same schemas."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar
from uuid import UUID

import strawberry
from pydantic import BaseModel, ValidationError
from strawberry import UNSET
from strawberry.scalars import JSON

from webapp.errors import Invalid
from webapp.schemas import NewMessageBody, TerminateBody
from webapp.views import camel_case

Schema = TypeVar("Schema", bound=BaseModel)


@strawberry.input(description="Time-outs of one stream, in place of the server's.")
class StreamTimeoutsInput:
    queue_seconds: float | None = UNSET
    first_token_seconds: float | None = UNSET
    idle_seconds: float | None = UNSET
    max_duration_seconds: float | None = UNSET


@strawberry.input(description="A message to be answered; what is left out is as the server is set.")
class StreamMessageInput:
    content: str
    conversation_id: strawberry.ID | None = UNSET
    model: str | None = UNSET
    options: JSON | None = UNSET
    think: JSON | None = strawberry.field(default=UNSET, description="a Boolean, or low, medium or high")
    keep_alive: str | None = UNSET
    on_disconnect: str | None = strawberry.field(default=UNSET, description="continue or terminate")
    on_active: str | None = strawberry.field(default=UNSET, description="reject or terminate")
    timeouts: StreamTimeoutsInput | None = UNSET

    def body(self) -> NewMessageBody:
        """Raises `Invalid` as REST does."""
        return validated(NewMessageBody, _given(self))


@strawberry.input(description="The stream to terminate, and (to be sure) the conversation that it is in.")
class TerminateStreamInput:
    session_id: strawberry.ID
    conversation_id: strawberry.ID | None = UNSET

    def body(self) -> TerminateBody:
        """Raises `Invalid` as REST does."""
        return validated(TerminateBody, _given(self))


def validated(schema: type[Schema], values: dict[str, Any]) -> Schema:
    """The values as the schema has them.

    Raises:
        Invalid: they are not acceptable; named field by field, in REST's words.
    """
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        found = [
            {
                "field": ".".join(str(part) for part in one["loc"]) or "_schema",
                "message": one["msg"].removeprefix("Value error, "),
            }
            for one in error.errors()
        ]
    raise Invalid("; ".join(f"{one['field']}: {one['message']}" for one in found), errors=found)


def as_uuid(value: str, field: str) -> UUID:
    """An id that was given as an argument.

    Raises:
        Invalid: it is none; names the argument.
    """
    try:
        return UUID(value)
    except ValueError:
        raise Invalid(f"{field}: must be a UUID", errors=[{"field": field, "message": "must be a UUID"}]) from None


def _given(asked: Any) -> dict[str, Any]:
    """The JSON that REST would have been sent: what was left out is not in it, and null is null."""
    values = {camel_case(field.name): getattr(asked, field.name) for field in fields(asked)}
    return {
        name: _given(value) if isinstance(value, StreamTimeoutsInput) else value
        for name, value in values.items()
        if value is not UNSET
    }
