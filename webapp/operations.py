"""What whoever operates this sees of all users' streams, and how they stop one: ids, models, names and lengths, and
never a word of a text.

Everything is read anew from what is kept anyway: the rows, Redis, and the figures of this host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Literal
from uuid import UUID

from redis.exceptions import RedisError
from sqlalchemy import func, select
from sqlalchemy.orm import Session, load_only

from webapp.config import Settings
from webapp.database import Database
from webapp.errors import Unavailable
from webapp.history import DistributionView, History, HistoryView, seconds_between
from webapp.metrics import Exposition
from webapp.models import StreamSession, User, now
from webapp.queue import WORKER_FRESH_SECONDS, Workers
from webapp.streams.endings import stop_timings
from webapp.streams.lifecycle import StreamPhase, StreamStatus, TerminationReason
from webapp.streams.manager import StreamSessionManager
from webapp.streams.queries import SessionQueries, terminated_by
from webapp.views import View

STREAMS_SHOWN: Final = 200
ENDINGS_SHOWN: Final = 50
ENDINGS_LOOKED_THROUGH: Final = 5_000
"""The newest, whatever their reason, among which there may be few that are to be shown."""


@dataclass(frozen=True, slots=True)
class OperatedStreamView(View):
    """A stream that has not ended. Lengths are in code points, as far as it has come."""

    session_id: UUID
    conversation_id: UUID
    message_id: UUID
    user_name: str
    model: str
    phase: StreamPhase
    stopping: bool
    """Whether a stop is on record."""
    length: int
    thinking_length: int
    attempt: int
    worker: str | None
    viewers: int
    on_disconnect: str
    started_at: datetime
    age_seconds: float


@dataclass(frozen=True, slots=True)
class WorkerView(View):
    """A worker: one that says that it lives, or that has streams. `silent` has streams and has not been heard of
    lately; `unknown`: Redis, in which they say so, cannot be reached."""

    name: str
    state: Literal["alive", "silent", "unknown"]
    streams: int
    silent_seconds: float | None


@dataclass(frozen=True, slots=True)
class EndingView(View):
    """A stream that ended before its answer was complete."""

    session_id: UUID
    conversation_id: UUID
    user_name: str
    model: str
    status: StreamStatus
    reason: TerminationReason
    terminated_by: str | None
    phase: StreamPhase
    length: int
    thinking_length: int
    started_at: datetime
    ended_at: datetime
    duration_seconds: float
    request_to_fence_seconds: float | None
    fence_to_upstream_closed_seconds: float | None
    request_to_commit_seconds: float | None


@dataclass(frozen=True, slots=True)
class FiguresView(View):
    """What the processes of this host have counted since they were first started."""

    chunks_total: int
    characters_total: int
    readers: int
    first_token_seconds: DistributionView


@dataclass(frozen=True, slots=True)
class PopulationView(View):
    """How many streams have not ended, and how many of those no worker has."""

    active: int
    queued: int


@dataclass(frozen=True, slots=True)
class OperationsView(View):
    """How things stand. `streams` are the newest, if there are very many; `figures` null while they cannot be read."""

    at: datetime
    population: PopulationView
    streams: Sequence[OperatedStreamView]
    worker_concurrency: int
    workers: Sequence[WorkerView]
    endings: Sequence[EndingView]
    figures: FiguresView | None


class Operations:
    """Every method raises `Unavailable` where the database is down; without Redis and the figures it does with less."""

    def __init__(
        self,
        database: Database,
        workers: Workers,
        queries: SessionQueries,
        manager: StreamSessionManager,
        metrics: Exposition,
        settings: Settings,
    ) -> None:
        self._database = database
        self._workers = workers
        self._queries = queries
        self._manager = manager
        self._metrics = metrics
        self._settings = settings

    def overview(self) -> OperationsView:
        """How things stand now."""
        population = PopulationView(*self._queries.population())
        rows, owners, endings = self._database.read(lambda s: (_active(s), _load(s), _endings(s)))
        moment = now()
        return OperationsView(
            at=moment,
            population=population,
            streams=self._streams(rows, moment),
            worker_concurrency=self._settings.worker_concurrency,
            workers=self._worker_views(owners),
            endings=[_ending_view(row, name) for row, name in endings],
            figures=self._figures(),
        )

    def history(self, minutes: int, moment: datetime | None = None) -> HistoryView:
        """How it was in the last minutes before a moment, which is now by default."""
        history = History(minutes, moment or now())
        self._database.read(lambda s: history.read(s))
        return history.view()

    def terminate(self, session_id: UUID, by: str) -> dict[str, Any]:
        """Stop anybody's stream as `admin`; the receipt as JSON, without the text.

        Raises:
            NotFound, Unavailable: as `StreamSessionManager.terminate`.
        """
        receipt = self._manager.terminate(session_id, TerminationReason.ADMIN, by=by).as_dict()
        del receipt["partialResponse"]
        return receipt

    def _streams(self, found: Sequence[tuple[StreamSession, str]], moment: datetime) -> list[OperatedStreamView]:
        views = self._queries.views_of([row for row, _ in found])
        return [
            OperatedStreamView(
                session_id=view.session_id,
                conversation_id=view.conversation_id,
                message_id=view.message_id,
                user_name=name,
                model=view.model,
                phase=view.phase,
                stopping=row.stop_reason is not None,
                length=view.length,
                thinking_length=view.thinking_length,
                attempt=view.attempt,
                worker=row.owner,
                viewers=view.viewers,
                on_disconnect=view.on_disconnect,
                started_at=view.started_at,
                age_seconds=seconds_between(view.started_at, moment),
            )
            for view, (row, name) in zip(views, found, strict=True)
        ]

    def _worker_views(self, owners: dict[str, int]) -> list[WorkerView]:
        silent: dict[str, float] | None
        try:
            silent = self._workers.silent_seconds()
        except RedisError:
            silent = None
        fresh = {name for name, seconds in (silent or {}).items() if seconds <= WORKER_FRESH_SECONDS}
        return [
            WorkerView(
                name=name,
                state="unknown" if silent is None else "alive" if name in fresh else "silent",
                streams=owners.get(name, 0),
                silent_seconds=(silent or {}).get(name),
            )
            for name in sorted(owners.keys() | fresh)
        ]

    def _figures(self) -> FiguresView | None:
        try:
            found = self._metrics.read()
        except Unavailable:
            return None
        first_token = DistributionView(found.first_token_upper_bounds_seconds, found.first_token_counts)
        return FiguresView(found.chunks, found.characters, found.readers, first_token)


# -- how things stand --------------------------------------------------------------------------------


def _active(s: Session) -> list[tuple[StreamSession, str]]:
    """The newest that are ACTIVE, and whose they are; without their texts."""
    query = (
        select(StreamSession, User.name)
        .join(User, User.id == StreamSession.user_id)
        .where(StreamSession.status == StreamStatus.ACTIVE)
        # By a column without an index of its own, so that no database looks for the few among all.
        .order_by(StreamSession.started_at.desc(), StreamSession.id.desc())
        .limit(STREAMS_SHOWN)
        .options(_without_texts())
    )
    return [(row, name) for row, name in s.execute(query)]


def _load(s: Session) -> dict[str, int]:
    """How many streams each worker has."""
    query = select(StreamSession.owner, func.count()).where(StreamSession.status == StreamStatus.ACTIVE)
    return {owner: count for owner, count in s.execute(query.group_by(StreamSession.owner)) if owner is not None}


def _endings(s: Session) -> list[tuple[StreamSession, str]]:
    """The last that ended with a part of an answer, newest first, and whose they were."""
    newest = (
        select(StreamSession.id, StreamSession.status, StreamSession.ended_at)
        .where(StreamSession.ended_at.is_not(None))
        .order_by(StreamSession.ended_at.desc())
        .limit(ENDINGS_LOOKED_THROUGH)
        .subquery()
    )
    cut = (
        select(newest.c.id)
        .where(newest.c.status != StreamStatus.COMPLETED)
        .order_by(newest.c.ended_at.desc())
        .limit(ENDINGS_SHOWN)
    )
    shown = list(s.scalars(cut))
    query = (
        select(StreamSession, User.name)
        .join(User, User.id == StreamSession.user_id)
        .where(StreamSession.id.in_(shown))
        .options(_without_texts())
    )
    found = [(row, name) for row, name in s.execute(query)] if shown else []
    return sorted(found, key=lambda one: (one[0].ended_at, one[0].id), reverse=True)


def _without_texts() -> Any:
    """`detail` is loaded for the views and goes no further: it may hold the upstream's words."""
    return load_only(
        StreamSession.conversation_id,
        StreamSession.message_id,
        StreamSession.model,
        StreamSession.status,
        StreamSession.phase,
        StreamSession.reason,
        StreamSession.detail,
        StreamSession.attempt,
        StreamSession.owner,
        StreamSession.claimed_at,
        StreamSession.checkpoint_length,
        StreamSession.checkpoint_thinking_length,
        StreamSession.stop_reason,
        StreamSession.stop_by,
        StreamSession.stop_requested_at,
        StreamSession.length,
        StreamSession.thinking_length,
        StreamSession.started_at,
        StreamSession.fenced_at,
        StreamSession.upstream_closed_at,
        StreamSession.ended_at,
        StreamSession.on_disconnect,
        raiseload=True,
    )


def _ending_view(row: StreamSession, user_name: str) -> EndingView:
    timings = stop_timings(row)
    ended_at = row.ended_at or row.started_at
    return EndingView(
        session_id=row.id,
        conversation_id=row.conversation_id,
        user_name=user_name,
        model=row.model,
        status=StreamStatus(row.status),
        reason=TerminationReason(str(row.reason)),
        terminated_by=terminated_by(row),
        phase=StreamPhase(row.phase),
        length=row.length or 0,
        thinking_length=row.thinking_length or 0,
        started_at=row.started_at,
        ended_at=ended_at,
        duration_seconds=seconds_between(row.started_at, ended_at),
        request_to_fence_seconds=timings.request_to_fence_seconds,
        fence_to_upstream_closed_seconds=timings.fence_to_upstream_closed_seconds,
        request_to_commit_seconds=timings.request_to_commit_seconds,
    )
