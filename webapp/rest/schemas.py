"""What requests may hold: validated by pydantic, and shown in the OpenAPI document."""

from __future__ import annotations

import math
from typing import Annotated, Any, Final, Literal
from uuid import UUID

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StrictBool
from pydantic.alias_generators import to_camel

from webapp.models import OnDisconnect

DEPTH_LIMIT: Final = 32
"""Of the upstream's options, which are two deep."""


def _storable(value: Any) -> Any:
    """PostgreSQL and JSON refuse lone surrogates, PostgreSQL NUL too."""
    if isinstance(value, str):
        if "\x00" in value:
            raise ValueError("must not contain the NUL character")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError("must not contain lone surrogates; send valid Unicode")
    return value


def _json(value: Any, depth: int = 0) -> Any:
    """NaN and the infinities, which Python's parser takes, are no JSON: PostgreSQL and the upstream refuse them.
    And what is nested without end takes the stack of whoever reads it next."""
    if depth > DEPTH_LIMIT:
        raise ValueError(f"must not be nested more than {DEPTH_LIMIT} deep")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("must not contain NaN or an infinite number")
    for one in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _json(one, depth + 1)
    return value


def _not_blank(value: str) -> str:
    if not value.strip():
        raise ValueError("must not be empty")
    return value


Text = Annotated[str, BeforeValidator(_storable), AfterValidator(_not_blank)]


class Body(BaseModel):
    """A JSON body: camelCase, and no members that are not known, so that a typing error does not pass in silence."""

    model_config = ConfigDict(alias_generator=to_camel, extra="forbid", str_max_length=4_000_000)


class NewConversation(Body):
    title: Annotated[Text, Field(max_length=200)] | None = None


class ConversationChange(Body):
    title: Annotated[Text, Field(max_length=200)]


class NewMessageBody(Body):
    content: Text
    conversation_id: UUID | None = Field(None, description="none: a new conversation is made")
    model: Annotated[Text, Field(max_length=200)] | None = Field(None, description="none: the default model")
    options: Annotated[dict[str, Any], BeforeValidator(lambda value: _json(value))] | None = Field(
        None, description="the upstream's own options, passed on"
    )
    think: StrictBool | Literal["low", "medium", "high"] | None = Field(
        None, description="whether the model is to think aloud"
    )
    keep_alive: Annotated[Text, Field(max_length=20)] | None = Field(None, description="passed on to the upstream")
    on_disconnect: OnDisconnect = Field(OnDisconnect.CONTINUE, description="what becomes of it when nobody watches")
    on_active: Literal["reject", "terminate"] = Field(
        "reject", description="where the conversation has an active stream"
    )


class TerminateBody(Body):
    session_id: UUID
    conversation_id: UUID | None = None


class ConversationPage(BaseModel):
    """The query of a paged list."""

    model_config = ConfigDict(extra="ignore")
    limit: int = Field(50, ge=1, le=200)
    cursor: UUID | None = Field(None, description="`nextCursor` of the page before")


class StreamFilter(BaseModel):
    model_config = ConfigDict(extra="ignore")
    status: Literal["ACTIVE"] | None = None
    limit: int = Field(100, ge=1, le=500)
