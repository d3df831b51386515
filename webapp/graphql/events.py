"""A stream as a subscription: the events that server-sent events carry, with the same data and the same ids."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, fields
from typing import Annotated, Any, Final

import strawberry

from webapp.graphql.stepping import SILENCE, Said
from webapp.readers import follower_of
from webapp.streams.events import DONE, MESSAGE, PHASE, SESSION, THINKING, Position, SentEvent, decode_events
from webapp.streams.follow import Follower
from webapp.streams.lifecycle import StreamPhase, StreamStatus
from webapp.views import SessionView, camel_case


@strawberry.type(description="Always first; its id is null, so that it never moves a cursor back.")
class SessionEvent:
    id: strawberry.ID | None
    session_id: strawberry.ID
    conversation_id: strawberry.ID
    message_id: strawberry.ID
    model: str


@strawberry.type(description="How far the session has come; its id is null while QUEUED.")
class PhaseEvent:
    id: strawberry.ID | None
    phase: StreamPhase
    attempt: int
    position: int | None = None


@strawberry.type(description="A piece of the model's thinking, to be appended.")
class ThinkingEvent:
    id: strawberry.ID | None
    content: str


@strawberry.type(description="A piece of the answer, to be appended.")
class MessageEvent:
    id: strawberry.ID | None
    content: str


@strawberry.type(description="Always last, exactly once, and only after the message is committed.")
class DoneEvent:
    id: strawberry.ID | None
    status: StreamStatus
    reason: str
    message_id: strawberry.ID
    length: int
    thinking_length: int
    sha256: str


StreamEvent = Annotated[
    SessionEvent | PhaseEvent | ThinkingEvent | MessageEvent | DoneEvent, strawberry.union("StreamEvent")
]

_KINDS: Final[dict[str, Any]] = {
    SESSION: SessionEvent,
    PHASE: PhaseEvent,
    THINKING: ThinkingEvent,
    MESSAGE: MessageEvent,
    DONE: DoneEvent,
}
_NAMES: Final = {camel_case(field.name): field.name for kind in _KINDS.values() for field in fields(kind)}
_ENUMS: Final = {"phase": StreamPhase, "status": StreamStatus}


@dataclass
class Connection:
    """What the subscription and the connection that it is sent over must know of each other."""

    session: SessionView | None = None
    follower: Follower | None = None
    complete: bool = True
    """Whether there is nothing more to come: a client that is told so does not come back."""

    def close(self) -> None:
        """The reader has gone."""
        if self.follower is not None:
            self.follower.close()


async def followed(session: SessionView, cursor: Position, connection: Connection) -> AsyncGenerator[Any, None]:
    """The events from a cursor to `done`. A connection that ends before it was not completed, but broken off."""
    connection.session, connection.follower = session, follower_of(session, cursor)
    pieces = connection.follower.events()
    try:
        for piece in pieces:
            events = [_event(sent) for sent in decode_events(piece)]
            for event in events:
                connection.complete = isinstance(event, DoneEvent)
                yield event
            if not events:
                await Said(SILENCE)
    finally:
        pieces.close()  # type: ignore[attr-defined]


async def nothing() -> AsyncGenerator[Any, None]:
    """For a reader that has had all."""
    for event in tuple[Any, ...]():
        yield event


def _event(sent: SentEvent) -> Any:
    values = {_NAMES[name]: _ENUMS[name](value) if name in _ENUMS else value for name, value in sent.data.items()}
    return _KINDS[sent.kind](id=sent.id, **values)
