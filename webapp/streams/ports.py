"""What goes in and out of the manager: the queue that it needs, and the records that it takes and gives."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol
from uuid import UUID

from webapp.models import OnDisconnect
from webapp.streams.lifecycle import StreamPhase, TerminationReason
from webapp.streams.log import Answer
from webapp.streams.timing import Timeouts


class TaskQueue(Protocol):
    """What the manager needs of Celery. Each may raise; the manager then goes on without."""

    def enqueue(self, session_id: UUID) -> None:
        """Ask some worker to run the session."""

    def revoke(self, session_id: UUID) -> None:
        """A queued task never starts."""

    def nudge(self, session_id: UUID, owner: str, reason: TerminationReason) -> None:
        """Tell the worker that its session is to stop. Only speed: it may be lost."""


@dataclass(frozen=True, slots=True)
class RequestKey:
    """A client's own name for a request (the Idempotency-Key header), and the hash of its body."""

    user_id: UUID
    key: str
    body_sha256: str


@dataclass(frozen=True, slots=True)
class Rerun:
    """An answer that has ended and is to be gone on with, or given anew, for `user_id`."""

    session_id: UUID
    user_id: UUID
    request_key: RequestKey | None = None


@dataclass(frozen=True, slots=True)
class NewMessage:
    """A message to be answered. Without a conversation, one is made; without time-outs, they are the settings'."""

    user_id: UUID
    content: str
    model: str
    conversation_id: UUID | None = None
    options: dict[str, Any] | None = None
    think: bool | str | None = None
    keep_alive: str | None = None
    on_disconnect: OnDisconnect = OnDisconnect.CONTINUE
    timeouts: Timeouts | None = None
    request_key: RequestKey | None = None


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a worker gets with a claim.

    `checkpoint` is text of earlier attempts, its first part thinking; `claimed_at` is the first attempt's.
    """

    session_id: UUID
    conversation_id: UUID
    user_id: UUID
    epoch: int
    attempt: int
    model: str
    messages: list[dict[str, str]]
    options: dict[str, Any] | None
    think: bool | str | None
    keep_alive: str | None
    checkpoint: str
    checkpoint_thinking_length: int
    claimed_at: datetime
    timeouts: Timeouts


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a worker's run ended: its text (cut at the fence), and what it knows besides."""

    answer: Answer
    text: str
    thinking_length: int
    phase: StreamPhase
    upstream_closed_at: datetime | None
    detail: str | None = None
    stats: dict[str, Any] | None = None
