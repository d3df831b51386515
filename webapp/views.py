"""What callers are shown: frozen objects, the same for REST, GraphQL and the command line, serialised in one place."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from enum import Enum
from functools import cache
from typing import Any
from uuid import UUID

from webapp.streams.lifecycle import StreamPhase, StreamStatus, TerminationReason


@cache
def camel_case(name: str) -> str:
    """`session_id` as JSON spells it: `sessionId`."""
    return re.sub(r"_([a-z0-9])", lambda match: match[1].upper(), name)


def timestamp(moment: datetime) -> str:
    """RFC 3339 in UTC, to the microsecond."""
    return moment.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _plain(value: Any) -> Any:
    if isinstance(value, View):
        return value.as_dict()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, UUID):
        return str(value)
    return timestamp(value) if isinstance(value, datetime) else value


class View:
    """A frozen dataclass that knows its JSON."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, in camelCase."""
        return {camel_case(field.name): _plain(getattr(self, field.name)) for field in fields(self)}  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class UserView(View):
    id: UUID
    name: str
    operator: bool
    created_at: datetime
    last_used_at: datetime | None
    disabled_at: datetime | None


@dataclass(frozen=True, slots=True)
class SessionView(View):
    """A stream session. Lengths are in code points, as far as it has come; `length` is the content's."""

    session_id: UUID
    conversation_id: UUID
    message_id: UUID
    model: str
    status: StreamStatus
    phase: StreamPhase
    reason: TerminationReason | None
    detail: str | None
    length: int
    thinking_length: int
    attempt: int
    started_at: datetime
    ended_at: datetime | None
    terminated_by: str | None
    viewers: int
    on_disconnect: str

    @property
    def active(self) -> bool:
        return self.status is StreamStatus.ACTIVE


@dataclass(frozen=True, slots=True)
class ReceiptView(View):
    """How a session ended: read from the committed row, so the same to every caller. Lengths are in code points."""

    session_id: UUID
    conversation_id: UUID
    message_id: UUID
    status: StreamStatus
    reason: TerminationReason
    already_ended: bool
    partial_response: str
    length: int
    thinking_length: int
    sha256: str
    requested_at: datetime | None
    fenced_at: datetime | None
    upstream_closed_at: datetime | None
    committed_at: datetime


@dataclass(frozen=True, slots=True)
class ConversationView(View):
    id: UUID
    title: str
    role: str
    created_at: datetime


@dataclass(frozen=True, slots=True)
class MemberView(View):
    name: str
    role: str


@dataclass(frozen=True, slots=True)
class ModelView(View):
    """A model that the upstream offers; what it does not say is None."""

    name: str
    size_bytes: int | None
    family: str | None


@dataclass(frozen=True, slots=True)
class MessageView(View):
    """A message; one still streaming shows what has been checkpointed."""

    id: UUID
    role: str
    content: str
    thinking: str
    status: str | None
    reason: str | None
    detail: str | None
    model: str | None
    session_id: UUID | None
    replaced_by: UUID | None
    length: int
    created_at: datetime
    stats: dict[str, Any] | None
