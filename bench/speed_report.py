"""What `bench/speed.py` found, told: a table, and the bounds; also of a run that was saved.

    python -m bench.speed_report bench/results/speed.json

The file has `parts`: part, case, subject, figures. Times of summaries are in ms, CPU is in seconds, memory in KB. Ends
with 1 where a bound is missed, or something could not be measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

DIRECT: Final = "direct"
NAIVE: Final = "naive Flask proxy"
RESUMABLE: Final = "resumable-stream 2.2"
OURS: Final = "Sluicegate"

PARTS: Final = ("start", "memory", "idle", "stops", "queued", "tokens", "unpaced", "readers")
"""As they can be chosen, in the order in which they are measured; what `queued` finds is one of the cases of stops."""
TOLD: Final = ("stops", "tokens", "unpaced", "memory", "idle", "readers", "start")
"""In the order of the table."""
STEPS: Final = ("first token", "fence", "freed", "commit", "reader's done", "answer")
DATABASE: Final = "database"
REAPER: Final = "reaper"


@dataclass(frozen=True)
class Bound:
    """A figure of Sluicegate's, and what it is meant to be at most, or at least."""

    what: str
    reached: float
    meant: float
    unit: str
    digits: int = 1
    at_least: bool = False
    note: str = ""

    @property
    def kept(self) -> bool:
        """Whether it is as it is meant to be."""
        return self.reached >= self.meant if self.at_least else self.reached <= self.meant

    def __str__(self) -> str:
        limit = f"{'≥' if self.at_least else '≤'} {self.meant:g}{self.unit}"
        reached = f"{self.reached:.{self.digits}f}{self.unit}{self.note}"
        return f"| {self.what} | {reached} | {limit} | {'yes' if self.kept else '**no**'} |"


def at(found: Mapping[str, Any], *path: str) -> Any:
    """What the file has there, below `parts`; None where that was not measured."""
    value: Any = found["parts"]
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


# The bounds


def bounds(found: Mapping[str, Any]) -> list[Bound]:
    """All that can be told from what was measured."""
    return [*_stop_bounds(found), *_token_bounds(found), *_memory_bounds(found)]


def _stop_bounds(found: Mapping[str, Any]) -> Iterator[Bound]:
    """In multiples of the naive proxy's first token, which is what the same machine needs for the least there is."""
    unit_ms = at(found, "stops", "streaming", NAIVE, "first token", "p50")
    for what, case, step, figure, meant in (
        ("stop, streaming → freed, median", "streaming", "freed", "p50", 1.5),
        ("stop, streaming → freed, p99", "streaming", "freed", "p99", 3),
        ("stop, silent → freed, median", "silent", "freed", "p50", 1.5),
        ("stop, silent → freed, p99", "silent", "freed", "p99", 3),
        ("stop, beside 50 → freed, p99", "beside 50", "freed", "p99", 6),
        ("stop, streaming → answer, median", "streaming", "answer", "p50", 4),
        ("first token, median", "streaming", "first token", "p50", 3),
    ):
        ours_ms = at(found, "stops", case, OURS, step, figure)
        if unit_ms and ours_ms is not None:
            yield Bound(what, ours_ms / unit_ms, meant, " ×")
    cases = [case[OURS] for case in (at(found, "stops") or {}).values() if OURS in case]
    if cases:
        failed = sum(max((summary["missing"] for summary in steps.values()), default=0) for steps in cases)
        yield Bound("stops that failed", failed, 0, "", digits=0)


def _token_bounds(found: Mapping[str, Any]) -> Iterator[Bound]:
    for figure, name, meant in (("p50", "median", 3), ("p99", "p99", 10)):
        ours, least = (at(found, "tokens", "50", subject, "age", figure) for subject in (OURS, DIRECT))
        if ours is not None and least is not None:
            yield Bound(f"age of a token at 50 streams, beyond direct, {name}", ours - least, meant, " ms")
    used, naives = (at(found, "tokens", "50", subject, "cpu") for subject in (OURS, NAIVE))
    if used and naives:
        ratio = sum(used.values()) / sum(naives.values())
        yield Bound("CPU for 100,000 tokens at 50 streams", ratio, 1.6, " × the naive proxy's")
    for streams in ("20", "100"):
        ours, naive = (at(found, "unpaced", streams, subject) for subject in (OURS, NAIVE))
        if ours and naive:
            what = f"unpaced tokens a second, {streams} streams"
            yield Bound(what, ours / naive, 1.5, " × the naive proxy's", digits=2, at_least=True)


def _memory_bounds(found: Mapping[str, Any]) -> Iterator[Bound]:
    """Of our own processes; the database's are somebody else's to dimension, and told beside. So is the reaper's of a
    system at rest: the bound is for web, worker, beat and Valkey."""
    for what, streams, kb_a_unit, meant, unit, apart in (
        ("memory of each of 100 streams", "100", 1, 60, " KB", (DATABASE,)),
        ("memory with no stream", "0", 1024, 350, " MB", (REAPER, DATABASE)),
    ):
        if kb := at(found, "memory", streams, OURS, "kb"):
            own = sum(value for kind, value in kb.items() if kind not in apart) / kb_a_unit
            besides = [f"{kind}: {kb[kind] / kb_a_unit:.0f}{unit}" for kind in apart if kind in kb]
            note = f" ({', '.join(besides)} besides)" if besides else ""
            yield Bound(what, own, meant, unit, digits=0, note=note)


def bounds_table(found: Mapping[str, Any]) -> str:
    """As Markdown. × alone are multiples of the naive proxy's median first token."""
    head = ["| Sluicegate's | reached | meant | there |", "| --- | ---: | ---: | --- |"]
    return "\n".join([*head, *map(str, bounds(found))])


# The table


Cell = Callable[[Any], str]


def table(found: Mapping[str, Any]) -> str:
    """As Markdown: rows of what was measured, columns of whom. Times are in ms: the median, and p99 behind the bar."""
    parts = found["parts"]
    there = {name for cases in parts.values() for subjects in cases.values() for name in subjects}
    names = [name for name in (DIRECT, NAIVE, RESUMABLE, OURS) if name in there]
    lines = ["| | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
    for part in TOLD:
        for case, subjects in parts.get(part, {}).items():
            for title, cell in _ROWS[part](case):
                cells = [cell(subjects[name]) if name in subjects else "" for name in names]
                if any(cells):
                    lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _stop_rows(case: str) -> Iterator[tuple[str, Cell]]:
    for step in STEPS:
        title = f"{step}, {case}" if step == "first token" else f"stop, {case} → {step}"
        yield title, lambda steps, step=step: _times(steps.get(step))


def _token_rows(case: str) -> Iterator[tuple[str, Cell]]:
    title = f"tokens, {_counted(case, 'stream')} of 50 a second"
    yield f"{title}: age of one", lambda figures: _times(figures["age"])
    yield f"{title}: CPU s for 100,000", lambda figures: _kinds(figures["cpu"], digits=1)


def _unpaced_rows(case: str) -> Iterator[tuple[str, Cell]]:
    yield f"unpaced, {_counted(case, 'stream')}: tokens a second", lambda figure: f"{figure:,.0f}"


def _memory_rows(case: str) -> Iterator[tuple[str, Cell]]:
    if case == "0":
        yield "with no stream: memory, MB", lambda figures: _kinds(figures["kb"], each=1 / 1024)
        return
    title = f"{_counted(case, 'stream')} of 5 tokens a second"
    yield f"{title}: memory of each, KB", lambda figures: _kinds(figures["kb"])
    yield f"{title}: age of a token", lambda figures: _times(figures["age"])
    yield f"{title}: CPU s for 100,000", lambda figures: _kinds(figures["cpu"], digits=1)


def _idle_rows(case: str) -> Iterator[tuple[str, Cell]]:
    title = "with no stream" if case == "0" else f"{case} silent streams, with a reader each"
    yield f"{title}: CPU s a minute", lambda used: _kinds(used, digits=2)


def _reader_rows(case: str) -> Iterator[tuple[str, Cell]]:
    title = f"{_counted(case, 'reader')} of one stream"
    yield f"{title}: age of a token", lambda figures: _times(figures["age"]) + _slow(figures)
    yield f"{title}: CPU s for 100,000 delivered", lambda figures: _kinds(figures.get("cpu", {}), digits=1)


def _start_rows(case: str) -> Iterator[tuple[str, Cell]]:
    until = "/readyz is 200" if case == "ready" else "the first token of a first message"
    yield f"`sluicegate up`, nothing there → {until}, s", lambda seconds: f"{seconds:.1f}"


_ROWS: Final[Mapping[str, Callable[[str], Iterator[tuple[str, Cell]]]]] = {
    "stops": _stop_rows,
    "tokens": _token_rows,
    "unpaced": _unpaced_rows,
    "memory": _memory_rows,
    "idle": _idle_rows,
    "readers": _reader_rows,
    "start": _start_rows,
}


def _counted(case: str, noun: str) -> str:
    return f"{int(case):,} {noun}{'s' if case != '1' else ''}"


def _times(summary: Mapping[str, Any] | None) -> str:
    return f"{summary['p50']:.1f} \\| {summary['p99']:.1f}" if summary and summary["n"] else ""


def _slow(figures: Mapping[str, Any]) -> str:
    """A stream of many readers is a slower one."""
    pace = figures.get("pace", 50)
    return "" if pace == 50 else f" (at {pace} a second)"


def _kinds(used: Mapping[str, float], digits: int = 0, each: float = 1) -> str:
    """All, and of which kind of process how much."""
    shown = {kind: f"{value * each:.{digits}f}" for kind, value in used.items()}
    named = [f"{kind} {text}" for kind, text in shown.items() if float(text)]
    total = f"{sum(used.values()) * each:,.{digits}f}" if used else ""
    return f"{total} ({', '.join(named)})" if len(named) > 1 else total


# Telling


def tell(found: Mapping[str, Any]) -> int:
    """Print both tables, and name on stderr what is not as it is meant to be; the exit code."""
    print(f"{table(found)}\n\n{bounds_table(found)}")
    missed = [bound for bound in bounds(found) if not bound.kept]
    for bound in missed:
        print(f"missed: {bound.what}: {bound.reached:.2f}{bound.unit}, meant {bound.meant:g}", file=sys.stderr)
    for one in found["failed"]:
        print(f"not measured: {one['part']}, {one['case']}, {one['subject']}: {one['error']}", file=sys.stderr)
    return int(bool(missed or found["failed"]))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("json", type=Path, help="what a run has written")
    path: Path = parser.parse_args(arguments).json
    return tell(json.loads(path.read_text(encoding="utf-8")))


if __name__ == "__main__":
    sys.exit(main())
