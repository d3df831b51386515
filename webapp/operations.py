"""What whoever operates this sees of all users' streams, and how they stop one: ids, models, names and lengths, and
never a word of a text.

Everything is read anew from what is kept anyway: the rows, Redis, and the figures of this host.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Literal
from uuid import UUID

from redis.exceptions import RedisError
from sqlalchemy import Select, case, func, select, union_all
from sqlalchemy.orm import Session, load_only

from webapp.config import Settings
from webapp.database import Database
from webapp.errors import Unavailable
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
HISTORY_ROWS: Final = 20_000
HISTORY_STEPS: Final = 120
HISTORY_PIECE_ROWS: Final = 500
"""After which others of this process have their turn."""
LENGTH_BOUNDS: Final = (0, 4, 16, 64, 256, 1024, 4096, 16_384, 65_536, 262_144)


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
class DistributionView(View):
    """How many values fall into each range: above one bound and up to the next; the last is above all bounds."""

    upper_bounds: Sequence[float]
    counts: Sequence[int]


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


@dataclass(frozen=True, slots=True)
class TimingView(View):
    """Of stops, in seconds: the nearest-rank percentiles of each step, null where nothing was stopped; and of all."""

    p50: Sequence[float | None]
    p99: Sequence[float | None]
    overall_count: int
    overall_p50: float | None
    overall_p99: float | None


@dataclass(frozen=True, slots=True)
class HistoryView(View):
    """Series over time, a value for each step. `steps` are the moments at which they end; the last goes on still.
    Where `truncated`, there are more rows than are read, and the oldest steps are null."""

    at: datetime
    minutes: int
    step_seconds: float
    truncated: bool
    steps: Sequence[datetime]
    active: Sequence[int | None]
    queued: Sequence[int | None]
    endings: dict[str, Sequence[int | None]]
    request_to_fence: TimingView
    fence_to_upstream_closed: TimingView
    request_to_commit: TimingView
    partial_lengths: DistributionView


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
        history = _History(minutes, moment or now())
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
                age_seconds=_seconds(view.started_at, moment),
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
        duration_seconds=_seconds(row.started_at, ended_at),
        request_to_fence_seconds=timings.request_to_fence_seconds,
        fence_to_upstream_closed_seconds=timings.fence_to_upstream_closed_seconds,
        request_to_commit_seconds=timings.request_to_commit_seconds,
    )


# -- how it was --------------------------------------------------------------------------------------


class _Timing:
    """The values of one timing of stops, by step."""

    def __init__(self) -> None:
        self._by_step: dict[int, list[float]] = defaultdict(list)

    def add(self, step: int, start: datetime | None, end: datetime | None) -> None:
        if start and end:
            self._by_step[step].append(_seconds(start, end))

    def view(self) -> TimingView:
        everything = [one for values in self._by_step.values() for one in values]
        return TimingView(
            p50=[percentile(self._by_step.get(step, ()), 50) for step in range(HISTORY_STEPS)],
            p99=[percentile(self._by_step.get(step, ()), 99) for step in range(HISTORY_STEPS)],
            overall_count=len(everything),
            overall_p50=percentile(everything, 50),
            overall_p99=percentile(everything, 99),
        )


class _History:
    """Series that are added up from rows, one after the other. Steps are whole parts of the day, so that what a step
    says does not change with the moment at which it is asked for."""

    def __init__(self, minutes: int, moment: datetime) -> None:
        self._minutes = minutes
        self._moment = moment
        self._step_seconds = minutes * 60 / HISTORY_STEPS
        self._first = math.floor(moment.timestamp() / self._step_seconds) - HISTORY_STEPS + 1
        """The number of the first step, counted from 1970."""
        self._since = self._begin_of(0)
        self._complete_since = self._since
        self._active = [0] * (HISTORY_STEPS + 1)
        self._queued = [0] * (HISTORY_STEPS + 1)
        self._endings: dict[str, list[int]] = defaultdict(lambda: [0] * HISTORY_STEPS)
        self._to_fence, self._to_closed, self._to_commit = _Timing(), _Timing(), _Timing()
        self._lengths = [0] * (len(LENGTH_BOUNDS) + 1)

    def read(self, s: Session) -> None:
        """Take in every row that was ACTIVE within the time; of those that have ended, `HISTORY_ROWS` or so."""
        ended, oldest = 0, self._moment
        for piece in s.execute(_rows_since(self._since)).partitions(HISTORY_PIECE_ROWS):
            for row in piece:
                self._add(row)
                if row.ended_at:
                    ended, oldest = ended + 1, min(oldest, row.ended_at)
            time.sleep(0)  # a web process has readers to serve
        if ended > HISTORY_ROWS:
            self._complete_since = oldest

    def view(self) -> HistoryView:
        first = next((step for step in range(HISTORY_STEPS) if self._begin_of(step) >= self._complete_since), None)
        known = HISTORY_STEPS if first is None else first
        unknown: list[int | None] = [None] * known

        def series(values: Sequence[int]) -> list[int | None]:
            return [*unknown, *values[known:]]

        return HistoryView(
            at=self._moment,
            minutes=self._minutes,
            step_seconds=self._step_seconds,
            truncated=known > 0,
            steps=[self._begin_of(step + 1) for step in range(HISTORY_STEPS)],
            active=series(_running_totals(self._active)),
            queued=series(_running_totals(self._queued)),
            endings={reason: series(counts) for reason, counts in sorted(self._endings.items())},
            request_to_fence=self._to_fence.view(),
            fence_to_upstream_closed=self._to_closed.view(),
            request_to_commit=self._to_commit.view(),
            partial_lengths=DistributionView(LENGTH_BOUNDS, self._lengths),
        )

    def _add(self, row: Sequence[Any]) -> None:
        """One more at the ends of the steps from its start on, and no longer from its end, or its claim, on."""
        status, reason, length, started_at, claimed_at, ended_at, requested_at, fenced_at, closed_at = row
        began, ended = self._step_of(started_at), self._step_of(ended_at)
        self._active[began] += 1
        self._active[ended] -= 1
        self._queued[began] += 1
        self._queued[self._step_of(claimed_at) if claimed_at else ended] -= 1
        if ended_at is None:
            return
        step = min(ended, HISTORY_STEPS - 1)
        self._endings[reason][step] += 1
        if status != StreamStatus.COMPLETED:
            self._lengths[bisect_left(LENGTH_BOUNDS, length or 0)] += 1
        if requested_at is not None:
            self._to_fence.add(step, requested_at, fenced_at)
            self._to_closed.add(step, fenced_at, closed_at)
            self._to_commit.add(step, requested_at, ended_at)

    def _step_of(self, moment: datetime | None) -> int:
        """The step in which a moment is: the first, of what was before all; one behind the last, of what is not yet."""
        if moment is None:
            return HISTORY_STEPS
        step = int(moment.timestamp() // self._step_seconds) - self._first
        return 0 if step < 0 else step if step < HISTORY_STEPS else HISTORY_STEPS

    def _begin_of(self, step: int) -> datetime:
        return datetime.fromtimestamp((self._first + step) * self._step_seconds, UTC)


def _rows_since(since: datetime) -> Select[Any]:
    """What of the rows goes into a history: the newest that ended, with one more, by which it is known that there are
    more; and those that are ACTIVE. In one statement, or one that ends meanwhile would be in both or in neither."""
    row = StreamSession
    stopped = row.reason == row.stop_reason
    columns = (
        row.status,
        row.reason,
        row.length,
        row.started_at,
        row.claimed_at,
        row.ended_at,
        # Of others there is nothing to be told, and reading a moment takes its time.
        case((stopped, row.stop_requested_at)).label("stop_requested_at"),
        case((stopped, row.fenced_at)).label("fenced_at"),
        case((stopped, row.upstream_closed_at)).label("upstream_closed_at"),
    )
    ended = select(*columns).where(row.ended_at >= since).order_by(row.ended_at.desc()).limit(HISTORY_ROWS + 1)
    active = select(*columns).where(row.status == StreamStatus.ACTIVE).limit(HISTORY_ROWS)
    both = union_all(select(ended.subquery()), select(active.subquery())).subquery()
    return select(both)


def _running_totals(changes: Sequence[int]) -> list[int]:
    total, totals = 0, []
    for change in changes[:HISTORY_STEPS]:
        total += change
        totals.append(total)
    return totals


def percentile(values: Iterable[float], percent: int) -> float | None:
    """By nearest rank: the smallest value that so many percent of all do not exceed; None of none."""
    ordered = sorted(values)
    return ordered[math.ceil(len(ordered) * percent / 100) - 1] if ordered else None


def _seconds(start: datetime, end: datetime) -> float:
    """At least 0: clocks of several machines may disagree."""
    return max(0.0, (end - start).total_seconds())
