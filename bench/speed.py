"""What a token, a stop and a stream cost, beside a naive proxy, resumable-stream and the model's server itself.

    python -m bench.speed [--short] [--only PARTS] [--without PARTS] [--subjects NAMES] [--json PATH]

All of them run at once, over one model's server (`bench/model.py`), and take turns at being measured, so that each
figure has the others' beside it, from the same minutes of the same machine. The method is in `bench/README.md`. Ends
with 1 where a bound is missed, or something could not be measured.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import psutil

from bench import speed_parts as parts
from bench import speed_report
from bench.progress import LINE
from bench.reading import crowd
from bench.speed_report import DIRECT, NAIVE, OURS, PARTS, RESUMABLE
from bench.speed_start import start_once
from bench.subjects import Direct, Sluicegate, Subject, model_server, naive_proxy, resumable_stream, sluicegate
from tests.services import postgres_server, stop_everything

WARM_STREAMS: Final = 20
BESIDE: Final = 50
SUBJECTS: Final = {name.split()[0].lower(): name for name in (DIRECT, NAIVE, RESUMABLE, OURS)}


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    stops: int = 100
    """So many that their p99 is not simply the slowest."""
    naive_silent_stops: int = 3
    """Each takes as long as the silence."""
    seconds: float = 5.0
    idle_seconds: float = 10.0
    starts: int = 3
    many: Sequence[int] = (10, 100, 1000)
    """Streams, and readers of one."""
    unpaced: Sequence[tuple[int, int]] = ((1, 50_000), (20, 200_000), (100, 200_000))
    """Streams, and the tokens of all of them together."""


SHORT: Final = Size(10, 1, 3.0, 8.0, 1, many=(10, 100), unpaced=((1, 12_500), (20, 50_000), (100, 50_000)))


@dataclass
class Record:
    """What has been found so far; a file has it after each figure, so that a run that is killed keeps what it has."""

    path: Path | None
    found: dict[str, Any] = field(default_factory=dict)
    place: str = ""
    """Which part is being measured, of how many, for the progress line."""

    def __post_init__(self) -> None:
        machine = {"cores": psutil.cpu_count(), "python": sys.version.split()[0]}
        self.found = {"machine": machine, "seconds": 0.0, "failed": [], "parts": {}}
        self._began = time.monotonic()

    def keep(self, part: str, case: str, name: str, figures: Any) -> None:
        """Of a part, in one case, of a subject."""
        self.found["parts"].setdefault(part, {}).setdefault(case, {})[name] = figures
        self._save()
        LINE.say(f"{self.found['seconds']:4.0f} s | {part}, {case} | {name} | {_rounded(figures)}")

    def fail(self, part: str, case: str, name: str, error: Exception) -> None:
        """It could not be measured; the rest is."""
        LINE.say("".join(traceback.format_exception(error)).rstrip())
        self.found["failed"].append({"part": part, "case": case, "subject": name, "error": repr(error)})
        self._save()

    def _save(self) -> None:
        self.found["seconds"] = round(time.monotonic() - self._began, 1)
        if self.path:
            self.path.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")


def _rounded(figures: Any) -> str:
    return json.dumps(json.loads(json.dumps(figures), parse_float=lambda text: round(float(text), 2)))


@dataclass(frozen=True)
class Run:
    """The parts, in the order in which they are measured.

    Memory comes first, because what processes were given once they keep, and later growth would not show.
    """

    model_url: str
    subjects: Sequence[Subject]
    size: Size
    record: Record

    async def measure(self, wanted: Sequence[str]) -> None:
        """Each part of each subject."""
        LINE.show("warming up")
        await self._warm_up()
        parts_wanted = [part for part in PARTS if part in wanted and part != "start"]
        for number, part in enumerate(parts_wanted, start=1):
            self.record.place = f"part {number} of {len(parts_wanted)}: {part}"
            LINE.show(self.record.place)
            await getattr(self, part)()

    async def each(
        self, part: str, case: str, what: Callable[[Any], Awaitable[Any]], among: Sequence[Subject] | None = None
    ) -> None:
        """One after another, by default all; what fails is noted, and hinders no other."""
        for subject in self.subjects if among is None else among:
            LINE.show(f"{self.record.place}, {case} | {subject.name}")
            try:
                self.record.keep(part, case, subject.name, await what(subject))
            except Exception as error:
                self.record.fail(part, case, subject.name, error)

    @property
    def _with_processes(self) -> list[Subject]:
        """Those that are more than the model's server, which all of them share."""
        return [subject for subject in self.subjects if subject.processes]

    @property
    def _ours(self) -> list[Subject]:
        return [subject for subject in self.subjects if isinstance(subject, Sluicegate)]

    async def _warm_up(self) -> None:
        """What is done for the first time is not what is asked about."""
        for subject in self.subjects:
            try:
                async with crowd(subject, WARM_STREAMS, parts.SPEAKING):
                    await asyncio.sleep(1)
                await parts.unpaced(subject, 4, 8_000)
            except Exception as error:
                self.record.fail("warm-up", "", subject.name, error)

    async def memory(self) -> None:
        seconds = self.size.seconds
        for subject in self._with_processes:
            before = subject.memory_kb()
            self.record.keep("memory", "0", subject.name, {"kb": before})
            for streams in self.size.many:
                what = partial(parts.memory, streams=streams, before_kb=before, seconds=seconds)
                await self.each("memory", str(streams), what, [subject])

    async def idle(self) -> None:
        for streams in (0, 100):
            what = partial(parts.idle, streams=streams, seconds=self.size.idle_seconds)
            await self.each("idle", str(streams), what, self._with_processes)

    async def stops(self) -> None:
        def stops(subject: Subject, stop: parts.Stop) -> Awaitable[Any]:
            patient = stop is parts.SILENT and subject.name == NAIVE
            count = self.size.naive_silent_stops if patient else self.size.stops
            return parts.stops(self.model_url, subject, count, stop)

        await self.each("stops", "streaming", partial(stops, stop=parts.STREAMING))
        await self.each("stops", "silent", partial(stops, stop=parts.SILENT))
        beside = partial(parts.stops_beside, self.model_url, count=self.size.stops, streams=BESIDE)
        await self.each("stops", f"beside {BESIDE}", beside)

    async def queued(self) -> None:
        what = partial(parts.queued_stops, self.model_url, count=self.size.stops)
        await self.each("stops", "queued", what, self._ours)

    async def tokens(self) -> None:
        for streams in (1, 50, 200):
            await self.each("tokens", str(streams), partial(parts.tokens, streams=streams, seconds=self.size.seconds))

    async def unpaced(self) -> None:
        for streams, total in self.size.unpaced:
            await self.each("unpaced", str(streams), partial(parts.unpaced, streams=streams, total=total))

    async def readers(self) -> None:
        for readers in (1, *self.size.many):
            what = partial(parts.readers_of_one, readers=readers, seconds=self.size.seconds)
            await self.each("readers", str(readers), what, self._ours)


def measure_start(record: Record, times: int) -> None:
    """Before anything else runs."""
    try:
        every = []
        for number in range(1, times + 1):
            LINE.show(f"start {number} of {times}")
            every.append(start_once())
    except Exception as error:
        record.fail("start", "", OURS, error)
        return
    for case in every[0]:
        record.keep("start", case, OURS, statistics.median(one[case] for one in every))


@contextmanager
def running(names: Sequence[str]) -> Iterator[tuple[str, list[Subject]]]:
    """URL of the model's server, and those of the subjects that are wanted and can be had."""
    with tempfile.TemporaryDirectory(prefix="sluicegate-speed-") as name, ExitStack() as stack:
        stack.callback(stop_everything)
        directory = Path(name)
        model_url = stack.enter_context(model_server(directory))
        subjects: list[Subject | None] = []
        if DIRECT in names:
            subjects.append(Direct(DIRECT, model_url))
        if NAIVE in names:
            subjects.append(stack.enter_context(naive_proxy(directory, model_url)))
        if RESUMABLE in names:
            subjects.append(stack.enter_context(resumable_stream(directory, model_url)))
        if OURS in names:
            postgres = postgres_server(directory / "postgres.log")
            subjects.append(stack.enter_context(sluicegate(directory, model_url, postgres)))
        yield model_url, [subject for subject in subjects if subject]


def _words(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    """Of an option: some of these, with commas between."""

    def read(text: str) -> list[str]:
        words = text.split(",")
        if unknown := [word for word in words if word not in allowed]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: none of {', '.join(allowed)}")
        return words

    return read


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--short", action="store_true", help="fewer of everything")
    for option, text in (("--only", "measure these alone"), ("--without", "leave these out")):
        help_text = f"{text}: {', '.join(PARTS)}"
        parser.add_argument(option, type=_words(PARTS), action="extend", default=[], metavar="PARTS", help=help_text)
    names = list(SUBJECTS)
    text = f"beside each other: {', '.join(names)}"
    parser.add_argument("--subjects", type=_words(names), default=names, metavar="NAMES", help=text)
    parser.add_argument("--json", type=Path, help="write all figures there, as they come")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    wanted = [part for part in PARTS if part in (options.only or PARTS) and part not in options.without]
    size, record = SHORT if options.short else Size(), Record(options.json)
    if "start" in wanted and "sluicegate" in options.subjects:
        measure_start(record, size.starts)
    if wanted != ["start"]:
        with running([SUBJECTS[name] for name in options.subjects]) as (model_url, subjects):
            asyncio.run(Run(model_url, subjects, size, record).measure(wanted))
    LINE.clear()
    return speed_report.tell(json.loads(json.dumps(record.found)))


if __name__ == "__main__":
    sys.exit(main())
