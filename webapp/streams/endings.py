"""How an ending is told to whoever operates this: one line in the log and the figures, from the same row."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import structlog

from webapp import metrics
from webapp.metrics import Timings
from webapp.models import StreamSession
from webapp.streams.lifecycle import StreamStatus
from webapp.streams.queries import terminated_by

log = structlog.get_logger(__name__)


def report(row: StreamSession, stats: Mapping[str, Any] | None = None) -> None:
    """Log and count the ending of a session, from its committed row; `stats` are the upstream's own figures.

    Lengths and ids, and not `detail`, which may hold the upstream's words.
    """
    timings = stop_timings(row)
    completed = row.status == StreamStatus.COMPLETED
    log.info(
        "stream.completed" if completed else "stream.terminated",
        session_id=str(row.id),
        conversation_id=str(row.conversation_id),
        user_id=str(row.user_id),
        status=row.status,
        reason=row.reason,
        terminated_by=terminated_by(row),
        phase=row.phase,
        length=row.length,
        thinking_length=row.thinking_length,
        attempt=row.attempt,
        request_to_fence_ms=_milliseconds(timings.request_to_fence_seconds),
        fence_to_upstream_closed_ms=_milliseconds(timings.fence_to_upstream_closed_seconds),
        request_to_commit_ms=_milliseconds(timings.request_to_commit_seconds),
    )
    metrics.stream_ended(
        status=row.status,
        reason=str(row.reason),
        phase=row.phase,
        partial_length=None if completed else row.length,
        timings=timings,
    )
    metrics.tokens_counted(stats or {})


def stop_timings(row: StreamSession) -> Timings:
    """Of a session that ended because it was stopped; of any other, whatever a late request left in the row, none."""
    if row.stop_requested_at is None or row.reason != row.stop_reason:
        return Timings()
    return Timings(
        request_to_fence_seconds=_seconds(row.stop_requested_at, row.fenced_at),
        fence_to_upstream_closed_seconds=_seconds(row.fenced_at, row.upstream_closed_at),
        request_to_commit_seconds=_seconds(row.stop_requested_at, row.ended_at),
    )


def _seconds(start: datetime | None, end: datetime | None) -> float | None:
    """At least 0: a worker that hears of a stop from the row closes the upstream before it takes the fence."""
    return max(0.0, (end - start).total_seconds()) if start and end else None


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)
