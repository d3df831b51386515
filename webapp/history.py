"""How all users' streams were, over time.

From their rows: so that it is there from the first look on, of all hosts, and after a restart.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from sqlalchemy import Select, case, select, union_all
from sqlalchemy.orm import Session

from webapp.models import StreamSession
from webapp.streams.lifecycle import StreamStatus
from webapp.views import View

HISTORY_ROWS: Final = 20_000
HISTORY_STEPS: Final = 120
HISTORY_PIECE_ROWS: Final = 500
"""After which others of this process have their turn."""
LENGTH_BOUNDS: Final = (0, 4, 16, 64, 256, 1024, 4096, 16_384, 65_536, 262_144)


@dataclass(frozen=True, slots=True)
class DistributionView(View):
    """How many values fall into each range: above one bound and up to the next; the last is above all bounds."""

    upper_bounds: Sequence[float]
    counts: Sequence[int]


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


class _Timing:
    """The values of one timing of stops, by step."""

    def __init__(self) -> None:
        self._by_step: dict[int, list[float]] = defaultdict(list)

    def add(self, step: int, start: datetime | None, end: datetime | None) -> None:
        if start and end:
            self._by_step[step].append(seconds_between(start, end))

    def view(self) -> TimingView:
        everything = [one for values in self._by_step.values() for one in values]
        return TimingView(
            p50=[percentile(self._by_step.get(step, ()), 50) for step in range(HISTORY_STEPS)],
            p99=[percentile(self._by_step.get(step, ()), 99) for step in range(HISTORY_STEPS)],
            overall_count=len(everything),
            overall_p50=percentile(everything, 50),
            overall_p99=percentile(everything, 99),
        )


class History:
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


def seconds_between(start: datetime, end: datetime) -> float:
    """At least 0: clocks of several machines may disagree."""
    return max(0.0, (end - start).total_seconds())
