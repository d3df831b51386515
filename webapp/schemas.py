"""What requests may hold: validated by pydantic, and shown in the OpenAPI document."""

from __future__ import annotations

import math
from typing import Annotated, Any, Final, Literal
from uuid import UUID

from flask import request
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    StrictBool,
    field_validator,
)
from pydantic.alias_generators import to_camel
from pydantic_core import CoreSchema
from werkzeug.exceptions import BadRequest

from webapp.calls import SendRequest
from webapp.errors import NotJSON, UnsupportedMediaType
from webapp.models import OnDisconnect, Role

FOLLOWED_LIMIT: Final = 32
_STREAM: Final = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}(:[0-9]{1,15}-[0-9]{1,10})?"
_FOLLOWED: Final = f"^{_STREAM}(,{_STREAM})*$"
DEPTH_LIMIT: Final = 32
"""Of the upstream's options, which are two deep."""


def require_json() -> None:
    """A body is JSON and says so: that a browser cannot send across sites without asking.

    Raises:
        UnsupportedMediaType: it says that it is something else.
        NotJSON: it is no JSON object.
    """
    if request.method not in ("POST", "PUT", "PATCH") or not request.get_data():
        return
    if request.mimetype != "application/json" and not request.mimetype.endswith("+json"):
        raise UnsupportedMediaType("Send the body with Content-Type: application/json")
    try:
        body = request.get_json(force=True)
    except (BadRequest, RecursionError):  # the latter of what is nested too deeply
        raise NotJSON("The body is not JSON: send a JSON object") from None
    if not isinstance(body, dict):
        raise NotJSON("The body must be a JSON object")


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


class _Said:
    """What the two validators of `Text` ask for, in the words of JSON Schema."""

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return handler(schema) | {"minLength": 1, "pattern": r"^[^\x00]*[^\s\x00][^\x00]*$"}


Text = Annotated[str, BeforeValidator(_storable), AfterValidator(_not_blank), _Said]


Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Body(BaseModel):
    """A JSON body: camelCase, and no members that are not known, so that a typing error does not pass in silence."""

    model_config = ConfigDict(alias_generator=to_camel, extra="forbid", str_max_length=4_000_000)


class NewConversation(Body):
    title: Annotated[Text, Field(max_length=200)] | None = None


class ConversationChange(Body):
    title: Annotated[Text, Field(max_length=200)]


class MemberBody(Body):
    role: Role


class TimeoutsBody(Body):
    """Time-outs of one stream, in place of the settings'."""

    queue_seconds: Seconds | None = None
    first_token_seconds: Seconds | None = None
    idle_seconds: Seconds | None = None
    max_duration_seconds: Seconds | None = None


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
    on_disconnect: OnDisconnect | None = Field(
        None, description="what becomes of it when nobody watches; none: as the server is set"
    )
    on_active: Literal["reject", "terminate"] = Field(
        "reject", description="where the conversation has an active stream"
    )
    timeouts: TimeoutsBody | None = Field(None, description="none: those of the settings")

    def request(self) -> SendRequest:
        """What is asked for, as every face asks it."""
        asked = self.timeouts.model_dump(exclude_none=True) if self.timeouts else None
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return SendRequest(**values | {"timeouts": asked})


class TerminateBody(Body):
    session_id: UUID
    conversation_id: UUID | None = None


class OperatorStop(Body):
    session_id: UUID


class HistoryWindow(BaseModel):
    """The query of a history."""

    model_config = ConfigDict(extra="ignore")
    minutes: int = Field(60, ge=1, le=1440, description="how far back it goes")


class ConversationPage(BaseModel):
    """The query of a paged list."""

    model_config = ConfigDict(extra="ignore")
    limit: int = Field(50, ge=1, le=200)
    cursor: UUID | None = Field(None, description="`nextCursor` of the page before")
    search: Annotated[str, BeforeValidator(_storable), Field(max_length=200)] | None = Field(
        None, description="only those with this in the title or in a message, upper case or lower"
    )


class StreamFilter(BaseModel):
    model_config = ConfigDict(extra="ignore")
    status: Literal["ACTIVE"] | None = None
    limit: int = Field(100, ge=1, le=500)


class FollowedStreams(BaseModel):
    """The query of a connection that several streams share."""

    model_config = ConfigDict(extra="ignore")
    streams: str = Field(
        pattern=_FOLLOWED,
        max_length=FOLLOWED_LIMIT * 64,
        description=f"up to {FOLLOWED_LIMIT} streams: `ID`, or `ID:POSITION` to go on from there, joined by commas",
    )

    @field_validator("streams")
    @classmethod
    def _few(cls, value: str) -> str:
        if value.count(",") >= FOLLOWED_LIMIT:
            raise ValueError(f"must name at most {FOLLOWED_LIMIT} streams")
        if len({one.partition(":")[0].lower() for one in value.split(",")}) <= value.count(","):
            raise ValueError("must name each stream once")
        return value

    def positions(self) -> dict[UUID, str | None]:
        """Each session's id, with the position to go on from; None: from the start."""
        pairs = (one.partition(":") for one in self.streams.split(","))
        return {UUID(identity): position or None for identity, _, position in pairs}
