"""When a session is over by itself: its time-outs, which of them is due next, and when to look at it again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final

from webapp.config import Settings
from webapp.models import StreamSession
from webapp.streams.lifecycle import TerminationReason

REQUEUE_FIRST: Final = timedelta(seconds=15)
"""After which a session that nobody has claimed is queued again; then after twice as long, and so on."""


@dataclass(frozen=True, slots=True)
class Due:
    """When a session is over by itself, and why."""

    at: datetime
    reason: TerminationReason


@dataclass(frozen=True, slots=True)
class Timeouts:
    """What ends a session by itself, each with the reason of its name. Kept with the session."""

    queue_seconds: float
    first_token_seconds: float
    idle_seconds: float
    max_duration_seconds: float

    @classmethod
    def of(cls, settings: Settings) -> Timeouts:
        """Those of the settings."""
        return cls(
            queue_seconds=settings.queue_timeout_seconds,
            first_token_seconds=settings.first_token_timeout_seconds,
            idle_seconds=settings.idle_timeout_seconds,
            max_duration_seconds=settings.max_duration_seconds,
        )

    @classmethod
    def of_session(cls, row: StreamSession, settings: Settings) -> Timeouts:
        """A session's own; the settings' of one that is older than that column."""
        return cls(**row.timeouts) if row.timeouts else cls.of(settings)

    def with_(self, others: Mapping[str, float]) -> Timeouts:
        """These, with `others` in place of those of the same name."""
        return replace(self, **others)

    def live_seconds(self, settings: Settings) -> int:
        """A live log's TTL: the longest that the session can be ACTIVE, and some slack."""
        return int(self.queue_seconds + self.max_duration_seconds) + settings.log_slack_seconds

    def due_in_queue(self, moment: datetime, claimed_at: datetime | None = None) -> Due:
        """Of a session that begins to wait for a worker; `claimed_at`: when it first had one."""
        return self._first(moment, self.queue_seconds, TerminationReason.QUEUE_TIMEOUT, claimed_at or moment)

    def due_without_token(self, moment: datetime, claimed_at: datetime) -> Due:
        """Of a session that a worker began to run at `moment`, and whose model has said nothing yet."""
        return self._first(moment, self.first_token_seconds, TerminationReason.FIRST_TOKEN_TIMEOUT, claimed_at)

    def due_after_token(self, moment: datetime, claimed_at: datetime) -> Due:
        """Of a session whose model spoke last at `moment`."""
        return self._first(moment, self.idle_seconds, TerminationReason.IDLE_TIMEOUT, claimed_at)

    def _first(self, moment: datetime, seconds: float, reason: TerminationReason, claimed_at: datetime) -> Due:
        """This time-out, or the longest duration, which is that of all attempts."""
        at, end_at = moment + timedelta(seconds=seconds), claimed_at + timedelta(seconds=self.max_duration_seconds)
        return Due(at, reason) if at <= end_at else Due(end_at, TerminationReason.MAX_DURATION)


def look_again_at(moment: datetime, since: datetime, due_at: datetime | None) -> datetime:
    """When the reaper is to come to a session that nobody has run `since` then: after 15 s, then twice as long
    each time, and at the latest when it is over."""
    backoff = moment + max(REQUEUE_FIRST, moment - since)
    return backoff if due_at is None else min(backoff, due_at)
