"""What the people of a chaos run were sent, kept for the audit."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any, Final

from bench.schedule import ReaderPlan, StreamPlan

PAUSE_NOTED_SECONDS: Final = 0.8
"""A silence between two pieces that is longer is kept."""


@dataclass
class Seen:
    """What one reader was sent, over all its connections."""

    plan: ReaderPlan
    thinking: str = ""
    content: str = ""
    last_id: str | None = None
    done: dict[str, Any] | None = None
    connections: int = 0
    came_at: float = 0.0
    last_text_at: float = 0.0
    pauses: list[tuple[float, float]] = field(default_factory=list)
    wrongs: list[str] = field(default_factory=list)
    """What no order of faults excuses, as it was noticed."""

    def take(self, name: str, identity: str | None, data: Any, *, first: bool) -> None:
        """Note one event; `first` of its connection."""
        if self.done is not None:
            self.wrongs.append(f"{name} {identity} after `done`: {data}")
        if first != (name == "session"):
            self.wrongs.append(f"{name} {identity} as the {'first' if first else 'later'} event of a connection")
        if identity is not None:
            if self.last_id is not None and _position(identity) <= _position(self.last_id):
                self.wrongs.append(f"id {identity} after {self.last_id}")
            self.last_id = identity
        if name in ("message", "thinking"):
            self._take_text(name, data["content"])
        elif name == "done":
            self._pause_ends()
            self.done = data

    def _take_text(self, name: str, text: str) -> None:
        self._pause_ends()
        if name == "message":
            self.content += text
        else:
            self.thinking += text
        if self.last_id is None or _position(self.last_id)[0] != len(self.thinking) + len(self.content):
            self.wrongs.append(f"id {self.last_id} with {len(self.thinking) + len(self.content)} code points seen")

    def _pause_ends(self) -> None:
        moment = time.monotonic()
        since = self.last_text_at or self.came_at
        if moment - since > PAUSE_NOTED_SECONDS:
            self.pauses.append((since, moment))
        self.last_text_at = moment


def _position(identity: str) -> tuple[int, int]:
    offset, _, seq = identity.partition("-")
    return int(offset), int(seq)


@dataclass
class Stop:
    """One terminate call that was answered, or not."""

    asked_at: float
    receipt: dict[str, Any] | None = None
    answered_at: float = 0.0


@dataclass
class Stream:
    """One message that was sent, and all that came of it. Times are `time.monotonic()`'s."""

    plan: StreamPlan
    asked_at: float
    session_id: str = ""
    accepted_at: float = 0.0
    progress_at: float = 0.0
    """When any reader was last sent a text, a phase or the end."""
    ended_at: float = 0.0
    readers: list[Seen] = field(default_factory=list)
    stops: list[Stop] = field(default_factory=list)
    watching: int = 0
    over: asyncio.Event = field(default_factory=asyncio.Event)

    def end(self) -> None:
        """Somebody knows that it has ended."""
        self.ended_at = self.ended_at or time.monotonic()
        self.over.set()
