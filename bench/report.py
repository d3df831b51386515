"""A chaos run: what was asked for, what came of it, and how that is told."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from bench import schedule
from bench.audit import CHECKS, Audit, Finding
from bench.crowd import Crowd
from bench.nemesis import Hit
from bench.seen import Seen


@dataclass(frozen=True)
class Options:
    """A run: all that its schedule depends on."""

    seed: int
    minutes: float = 10.0
    """After which no fault begins."""
    streams: int = 220
    short: bool = False
    """Each kind of fault once, with less rest between, and shorter streams."""
    only: tuple[str, ...] = ()
    """Kinds of faults, or their beginnings; none: all of them."""

    @property
    def lease_seconds(self) -> float:
        """Short, so that a hundred faults and what follows from them fit into ten minutes."""
        return 2.0 if self.short else 3.0

    @property
    def load(self) -> schedule.Load:
        """A run with few stops has more of those streams in which a stop finds most to do."""
        if self.short:
            return schedule.Load(self.streams, (3.0, 20.0), (2.0, 5.0), 0.2)
        return schedule.Load(self.streams, (20.0, 180.0), (0.5, 2.5), 0.02)

    def faults(self) -> Iterator[schedule.FaultPlan]:
        """As many are struck as the minutes allow."""
        if self.short:
            every = schedule.faults(self.seed, self.lease_seconds, (0.1, 0.4), (0.5, 1.5), once=True)
            every = itertools.islice(every, len(schedule.FAULTS))
        else:
            every = schedule.faults(self.seed, self.lease_seconds, (0.1, 0.5), (1.0, 2.0), once=False)
        return (fault for fault in every if not self.only or fault.kind.startswith(self.only))


@dataclass
class Outcome:
    """All that came of a run."""

    options: Options
    seconds: float = 0.0
    hits: list[Hit] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    left: dict[str, int] = field(default_factory=dict)
    crowd: Crowd | None = None
    audit: Audit | None = None
    at_once: list[int] = field(default_factory=list)
    """Active streams, each second of the run."""
    cpu_percent: list[float] = field(default_factory=list)
    """Of the whole machine, each second of the run."""
    own_cpu_seconds: float = 0.0
    """Of this process, which has the crowd and the nemesis."""


# The table


def table(outcome: Outcome) -> str:
    """As Markdown, in columns."""
    return "\n".join([_aligned(["what", "figure", "allowed"], list(_figures(outcome))), "", _fault_table(outcome)])


def _figures(outcome: Outcome) -> Iterator[list[str]]:
    crowd, audit, hits, options = outcome.crowd, outcome.audit, outcome.hits, outcome.options
    assert crowd
    assert audit
    wrong = Counter(finding.check for finding in outcome.findings)
    rows = list(audit.rows.values())
    endings = Counter(audit.told.endings[one.session_id] for one in crowd.streams)
    seconds = sorted(hit.seconds for hit in hits) or [0.0]
    yield ["seed", str(options.seed), ""]
    yield ["minutes, streams asked for at once", f"{outcome.seconds / 60:.1f}, {options.streams}", ""]
    at_once = outcome.at_once or [0]
    yield ["streams at once: median, most", f"{statistics.median(at_once):.0f}, {max(at_once)}", ""]
    yield ["streams in all", f"{len(crowd.streams):,}", ""]
    yield ["tokens saved", f"{sum(row.content.count(' ') + row.thinking.count(' ') for row in rows):,}", ""]
    readers = [seen for one in crowd.streams for seen in one.readers]
    connections = sum(seen.connections for seen in readers)
    yield ["readers, connections, read to `done`", f"{len(readers):,}, {connections:,}, {_done(readers):,}", ""]
    stops = sum(len(one.stops) for one in crowd.streams)
    ended = Counter(row.reason for row in rows)
    yield ["terminate calls; streams that one ended", f"{stops:,}; {ended['user']:,}", ""]
    others = ", ".join(f"{reason} {count:,}" for reason, count in ended.most_common() if reason != "user")
    yield ["other endings", others, ""]
    yield ["faults, of kinds", f"{len(hits)}, {len({hit.plan.kind for hit in hits})}", ""]
    for check in CHECKS:
        yield [f"violations: {check}", str(wrong[check]), "0"]
    yield [
        "endings told in the logs, per session: 1, 0, more",
        f"{endings[1]:,}, {endings[0]}, {_more(endings)}",
        "-, -, 0",
    ]
    for what, count in outcome.left.items():
        yield [f"left: {what}", str(count), "0"]
    yield ["recovery: median, worst", f"{statistics.median(seconds):.1f} s, {seconds[-1]:.1f} s", ""]
    errors = ", ".join(f"{event} {count}" for event, count in audit.told.errors.most_common())
    yield ["errors in the logs", errors or "none", ""]
    cpu = statistics.median(outcome.cpu_percent or [0.0])
    own = 100 * outcome.own_cpu_seconds / max(outcome.seconds, 1.0)
    yield ["CPU of the machine: median; the crowd's, of one core", f"{cpu:.0f} %; {own:.0f} %", ""]


def _done(readers: Sequence[Seen]) -> int:
    return sum(1 for seen in readers if seen.done is not None)


def _more(endings: Counter[int]) -> int:
    return sum(count for times, count in endings.items() if times > 1)


def _fault_table(outcome: Outcome) -> str:
    """Each kind: how often, what its longest pause was, and how long it took until everything went on."""
    rows = []
    for kind in schedule.FAULTS:
        hits = [hit for hit in outcome.hits if hit.plan.kind == kind]
        if hits:
            seconds = [hit.seconds for hit in hits]
            back = statistics.median(hit.back_at - hit.struck_at for hit in hits)
            pause = f"{longest_pause(outcome, hits)[0]:.1f} s"
            recovery = f"{statistics.median(seconds):.1f} s"
            rows.append([kind, str(len(hits)), pause, f"{back:.1f} s", recovery, f"{max(seconds):.1f} s"])
    heads = ["fault", "times", "longest pause of a reader", "processes back: median", "all on: median", "worst"]
    return _aligned(heads, rows)


def longest_pause(outcome: Outcome, hits: Sequence[Hit]) -> tuple[float, str]:
    """Of all readers, between two pieces of their streams, and whose; a pause is of the first fault that it met."""
    assert outcome.crowd
    pauses = (
        (end - begin, f"{one.plan.name} {one.session_id}")
        for one in outcome.crowd.streams
        for seen in one.readers
        for begin, end in seen.pauses
        if _met(outcome, begin, end) in hits
    )
    return max(pauses, default=(0.0, ""))


def _met(outcome: Outcome, begin: float, end: float) -> Hit | None:
    return next((hit for hit in outcome.hits if hit.recovered_at >= begin and hit.struck_at <= end), None)


def _aligned(heads: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(line[n]) for line in [heads, *rows]) for n in range(len(heads))]
    marks = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

    def line(cells: list[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]) + " |"

    return "\n".join([line(heads), line(marks), *map(line, rows)])


def figures(outcome: Outcome) -> dict[str, Any]:
    """All of it, for a file."""
    began = outcome.hits[0].struck_at if outcome.hits else 0.0
    return {
        "options": asdict(outcome.options),
        "table": list(_figures(outcome)),
        "faults": [
            asdict(hit.plan)
            | {
                "on": hit.on,
                "streams": hit.streams,
                "stuck": hit.stuck,
                "last": hit.last,
                "longest_pause": longest_pause(outcome, [hit]),
            }
            | {
                name: round(getattr(hit, name) - began, 3)
                for name in ("struck_at", "undone_at", "back_at", "recovered_at")
            }
            for hit in outcome.hits
        ],
        "findings": [asdict(finding) for finding in outcome.findings],
    }
