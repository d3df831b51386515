"""What a token, a stop and a stream cost, beside a naive proxy, resumable-stream and the model's server itself.

    python -m bench.speed [--short] [--only PART] [--json PATH]

All of them run at once, over one model's server (`bench/model.py`), and take turns at being measured, so that each
figure has the others' beside it, from the same minutes of the same machine. The method is in `bench/README.md`.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import psutil

from bench import wire
from bench.model import TOKEN_CHARACTERS
from bench.subjects import (
    Direct,
    Sluicegate,
    Subject,
    Talk,
    model_server,
    naive_proxy,
    resumable_stream,
    sluicegate,
)
from tests.services import postgres_server, stop_everything

TOKEN: Final = re.compile(rb"~(\d{13}) ")
PACE: Final = 50
LONG: Final = 1_000_000
WARM_STREAMS: Final = 20
SPOKEN_TOKENS: Final = 10
"""That a stream has said before it is stopped, or falls silent."""


class Reading:
    """A reader of one stream: how old each token was when it came."""

    def __init__(self, talk: Talk) -> None:
        self.talk = talk
        self.tokens = 0
        self.first_at = self.done_at = 0.0
        self.ages: list[float] = []
        self.keeps = False
        """Whether ages are noted."""
        self._rest = b""
        self._grown = asyncio.Event()
        self._task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        try:
            async for piece in self.talk.pieces():
                self._take(piece, time.monotonic())
        except wire.BROKEN:
            pass
        finally:
            self.done_at = self.done_at or time.monotonic()
            self._grown.set()

    def _take(self, piece: bytes, moment: float) -> None:
        data = self._rest + piece
        sent = TOKEN.findall(data)
        # A token may be cut by the end of what has come; nothing else in the stream looks like the beginning of one.
        cut = data.rfind(b"~", max(0, len(data) - TOKEN_CHARACTERS))
        self._rest = data[cut:] if cut >= 0 and len(data) - cut < TOKEN_CHARACTERS else b""
        if sent:
            self.tokens += len(sent)
            self.first_at = self.first_at or moment
            if self.keeps:
                self.ages += [moment - int(one) / 1e6 for one in sent]
        if b"event: done" in data or b'"done":true' in data:
            self.done_at = self.done_at or moment
        self._grown.set()

    async def until(self, true: Callable[[], bool], seconds: float = 60.0) -> None:
        """Wait for what this reader sees.

        Raises:
            TimeoutError: it does not come to it. AssertionError: the stream ended instead.
        """
        async with asyncio.timeout(seconds):
            while not true():
                assert not self.done_at, f"a stream ended after {self.tokens} tokens"
                self._grown.clear()
                await self._grown.wait()

    async def ended(self, seconds: float = 120.0) -> None:
        """Wait for its end."""
        async with asyncio.timeout(seconds):
            await self._task

    def leave(self) -> None:
        """Read no more."""
        self._task.cancel()


@asynccontextmanager
async def reading(subject: Subject, model: str) -> AsyncIterator[Reading]:
    """A stream and its reader."""
    async with subject.talk(model) as talk:
        reader = Reading(talk)
        try:
            yield reader
        finally:
            reader.leave()


@asynccontextmanager
async def crowd(subject: Subject, streams: int, model: str) -> AsyncIterator[list[Reading]]:
    """So many at once, all of them speaking; they are stopped at the end."""
    async with AsyncExitStack() as stack:
        readers = []
        for _ in range(streams):
            readers.append(await stack.enter_async_context(reading(subject, model)))
        for reader in readers:
            await reader.until(lambda reader=reader: reader.tokens > 0)
        yield readers
        for reader in readers:
            if not reader.done_at:
                await subject.stop(reader.talk)


async def model_says(model_url: str, name: str) -> dict[str, Any]:
    """What the model's server knows of a chat."""
    async with wire.request(model_url, "GET", f"/_record/{name}", {}, timeout_seconds=5) as answer:
        said: dict[str, Any] = json.loads(await answer.body(5)) or {}
        return said


async def freed_at(model_url: str, name: str, seconds: float) -> float | None:
    """When the model's server saw its client go; None where that did not happen in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if closed := (await model_says(model_url, name)).get("closed_at"):
            return float(closed)
        await asyncio.sleep(0.02)
    return None


# The parts


async def stops(
    model_url: str, subject: Subject, count: int, *, silent: bool, wait_seconds: float
) -> dict[str, list[float | None]]:
    """Seconds from the call to each of what follows from it, and from a question to its first token."""
    found: dict[str, list[float | None]] = {"first token": [], "freed": [], "answer": [], "reader's done": []}
    for _ in range(count):
        asked_at = time.monotonic()
        script = f"pace={PACE},tokens={LONG}" + (f",silent_at={SPOKEN_TOKENS}" if silent else "")
        async with reading(subject, script) as reader:
            await reader.until(lambda reader=reader: reader.tokens >= SPOKEN_TOKENS)
            found["first token"].append(reader.first_at - asked_at)
            await asyncio.sleep(0.1)
            wall, called_at = time.time(), time.monotonic()
            receipt = await subject.stop(reader.talk)
            found["answer"].append(time.monotonic() - called_at)
            freed = await freed_at(model_url, reader.talk.name, wait_seconds)
            found["freed"].append(None if freed is None else freed - called_at)
            if receipt:
                await reader.ended(10)
                found["reader's done"].append(reader.done_at - called_at)
                for name, key in (("fence", "fencedAt"), ("commit", "committedAt")):
                    moment = datetime.fromisoformat(receipt[key]).timestamp()
                    found.setdefault(name, []).append(moment - wall)
    return found


async def tokens(subject: Subject, streams: int, seconds: float) -> dict[str, Any]:
    """How old tokens are when they come, and the CPU that they cost."""
    async with crowd(subject, streams, f"pace={PACE},tokens={LONG}") as readers:
        await asyncio.sleep(1)
        gc.collect()
        cpu, before = subject.cpu_seconds(), sum(reader.tokens for reader in readers)
        await asyncio.sleep(0.2)  # what came while this looked elsewhere is read, and its age not noted
        for reader in readers:
            reader.keeps = True
        await asyncio.sleep(seconds)
        for reader in readers:
            reader.keeps = False
        after, count = subject.cpu_seconds(), sum(reader.tokens for reader in readers) - before
        used = {kind: (after[kind] - cpu[kind]) / count * 100_000 for kind in cpu}
        ages = [age for reader in readers for age in reader.ages]
        return {"ages": ages, "tokens": count, "cpu": used}


async def unpaced(subject: Subject, streams: int, total: int) -> float:
    """Tokens a second, of all streams together, from the first of them to the last."""
    model = f"pace=0,tokens={total // streams}"
    async with AsyncExitStack() as stack:
        began = time.monotonic()
        entering = [stack.enter_async_context(reading(subject, model)) for _ in range(streams)]
        readers = await asyncio.gather(*entering)
        for reader in readers:
            await reader.ended(300)
        first, last = min(reader.first_at for reader in readers), max(reader.done_at for reader in readers)
        count = sum(reader.tokens for reader in readers)
        assert count == total // streams * streams, f"{count} of {total} tokens in {last - began:.1f} s"
        return count / (last - first)


async def memory(subject: Subject, sizes: Sequence[int]) -> dict[int, dict[str, float]]:
    """KB more than with none, for each of so many streams at 5 tokens a second; and how old their tokens are."""
    before, found = subject.memory_kb(), {}
    for size in sizes:
        async with crowd(subject, size, f"pace=5,tokens={LONG}") as readers:
            await asyncio.sleep(3)
            cpu, count = subject.cpu_seconds(), sum(reader.tokens for reader in readers)
            await asyncio.sleep(0.2)
            for reader in readers:
                reader.keeps = True
            await asyncio.sleep(5)
            for reader in readers:
                reader.keeps = False
            after, count = subject.cpu_seconds(), sum(reader.tokens for reader in readers) - count
            ages = sorted(age for reader in readers for age in reader.ages)
            now_kb = subject.memory_kb()
            found[size] = {kind: (now_kb[kind] - before[kind]) / size for kind in before} | {
                "age p50": ages[len(ages) // 2],
                "age p99": ages[len(ages) * 99 // 100],
                "cpu per 100k": sum(after.values()) - sum(cpu.values()),
            }
            found[size]["cpu per 100k"] *= 100_000 / count
        await asyncio.sleep(2)
    return found


async def readers_of_one(subject: Sluicegate, counts: Sequence[int], seconds: float) -> dict[int, list[float]]:
    """How old tokens are where many read one stream."""
    found = {}
    for count in counts:
        async with AsyncExitStack() as stack:
            first = await stack.enter_async_context(reading(subject, f"pace={PACE},tokens={LONG}"))
            await first.until(lambda first=first: first.tokens > 0)
            readers = [first]
            for _ in range(count - 1):
                talk = await stack.enter_async_context(subject.another_reader(first.talk))
                readers.append(Reading(talk))
            await asyncio.sleep(1)
            for reader in readers:
                reader.keeps = True
            await asyncio.sleep(seconds)
            found[count] = [age for reader in readers for age in reader.ages]
            await subject.stop(first.talk)
            for reader in readers:
                reader.leave()
    return found


# Figures


def summary(values: Sequence[float | None]) -> dict[str, float | int | None]:
    """Median and p99 in ms; how many there were, and how many never came."""
    there = sorted(value * 1000 for value in values if value is not None)
    if not there:
        return {"p50": None, "p99": None, "n": 0, "missing": len(values)}
    p99 = there[min(len(there) - 1, len(there) * 99 // 100)]
    return {"p50": statistics.median(there), "p99": p99, "n": len(there), "missing": len(values) - len(there)}


async def measure(
    model_url: str, subjects: Sequence[Subject], short: bool, only: Sequence[str], found: dict[str, Any]
) -> None:
    """Every part, of every subject; what was found so far is kept where one fails."""
    count, seconds = (10, 3.0) if short else (40, 8.0)

    def wanted(part: str) -> bool:
        return not only or part in only

    def say(part: str, subject: Subject, figures: Any) -> None:
        found.setdefault(part, {})[subject.name] = figures
        print(
            f"{part} | {subject.name} | {json.dumps(figures, default=lambda value: round(value, 2))}", file=sys.stderr
        )

    for subject in subjects:  # what is done for the first time is not what is asked about
        async with crowd(subject, WARM_STREAMS, f"pace={PACE},tokens={LONG}"):
            await asyncio.sleep(1)
        await unpaced(subject, 4, 8_000)
    if wanted("stops"):
        for subject in subjects:
            figures = await stops(model_url, subject, count, silent=False, wait_seconds=5)
            say("stop, streaming", subject, {key: summary(value) for key, value in figures.items()})
        for subject in subjects:
            few = 3 if subject.name.startswith("naive") else count
            figures = await stops(model_url, subject, few, silent=True, wait_seconds=20)
            say("stop, silent", subject, {key: summary(value) for key, value in figures.items()})
        for subject in subjects:
            async with crowd(subject, 50, f"pace={PACE},tokens={LONG}"):
                await asyncio.sleep(1)
                figures = await stops(model_url, subject, count, silent=False, wait_seconds=5)
            say("stop, beside 50", subject, {key: summary(value) for key, value in figures.items()})
    if wanted("tokens"):
        for streams in (1, 50, 200):
            for subject in subjects:
                figures = await tokens(subject, streams, seconds)
                ages, cpu = summary(figures["ages"]), figures["cpu"]
                say(f"tokens, {streams} streams", subject, {"age": ages, "cpu": cpu | {"all": sum(cpu.values())}})
    if wanted("unpaced"):
        for streams, total in ((1, 50_000), (20, 200_000), (100, 200_000)):
            for subject in subjects:
                say(
                    f"unpaced, {streams} streams",
                    subject,
                    await unpaced(subject, streams, total // (4 if short else 1)),
                )
    if wanted("memory"):
        for subject in subjects:
            if subject.processes:
                say("idle", subject, subject.memory_kb())
                say("memory", subject, await memory(subject, (10, 100) if short else (10, 100, 1000)))
    if wanted("readers"):
        for subject in subjects:
            if isinstance(subject, Sluicegate):
                ages = await readers_of_one(subject, (1, 10, 100) if short else (1, 10, 100, 1000), seconds)
                say("readers", subject, {count: summary(values) for count, values in ages.items()})


def table(found: dict[str, Any]) -> str:
    """As Markdown: rows of what was measured, columns of whom. Times are in ms: the median, and p99 behind the bar."""
    names = list(dict.fromkeys(name for part in found.values() for name in part))
    lines = ["| | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]

    for part, subjects in found.items():

        def row(title: str, cell: Callable[[str], str], there: Any = subjects) -> None:
            lines.append(f"| {title} | " + " | ".join(cell(name) if name in there else "" for name in names) + " |")

        if part.startswith("stop"):
            for step in dict.fromkeys(step for steps in subjects.values() for step in steps):
                if step != "answer" and any(steps.get(step, {}).get("n") for steps in subjects.values()):
                    title = part.replace("stop", step) if step == "first token" else f"{part} → {step}"
                    row(title, lambda name, subjects=subjects, step=step: _times(subjects[name].get(step)))
            row(f"{part} → answer", lambda name, subjects=subjects: _times(_answers(subjects[name])))
        elif part.startswith("tokens"):
            row(f"{part}: age of one", lambda name, subjects=subjects: _times(subjects[name]["age"]))
            row(f"{part}: CPU s for 100,000", lambda name, subjects=subjects: _cpu(subjects[name]["cpu"]))
        elif part.startswith("unpaced"):
            row(f"{part}: tokens a second", lambda name, subjects=subjects: f"{subjects[name]:,.0f}")
        elif part == "idle":
            row("with no stream: MB", lambda name, subjects=subjects: _megabytes(subjects[name]))
        elif part == "memory":
            for size in next(iter(subjects.values())):
                title = f"{size} streams of 5 tokens a second: KB each, age of a token, CPU s for 100,000"
                row(title, lambda name, subjects=subjects, size=size: _memory(subjects[name][size]))
        elif part == "readers":
            for count, ages in next(iter(subjects.values())).items():
                row(f"{count} readers of one stream: age of a token", lambda name, ages=ages: _times(ages))
    return "\n".join(lines)


def _times(ages: dict[str, Any] | None) -> str:
    return f"{ages['p50']:.1f} \\| {ages['p99']:.1f}" if ages and ages["n"] else ""


def _answers(steps: dict[str, Any]) -> dict[str, Any] | None:
    return steps["answer"] if "commit" in steps else None


def _cpu(used: dict[str, float]) -> str:
    """All, and of which kind of process how much."""
    kinds = ", ".join(f"{kind} {seconds:.1f}" for kind, seconds in used.items() if kind != "all" and seconds >= 0.1)
    return f"{used['all']:.1f} ({kinds})" if kinds else ""


def _megabytes(used: dict[str, float]) -> str:
    return f"{sum(used.values()) / 1024:.0f} ({', '.join(f'{kind} {kb / 1024:.0f}' for kind, kb in used.items())})"


def _memory(figures: dict[str, float]) -> str:
    kinds = {kind: kb for kind, kb in figures.items() if kind not in ("age p50", "age p99", "cpu per 100k")}
    each = ", ".join(f"{kind} {kb:.0f}" for kind, kb in kinds.items() if kb >= 1)
    ages = f"{figures['age p50'] * 1000:.1f} \\| {figures['age p99'] * 1000:.1f}"
    return f"{sum(kinds.values()):.0f} ({each}); {ages} ms; {figures['cpu per 100k']:.1f}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--short", action="store_true", help="fewer of everything")
    parser.add_argument("--only", action="append", default=[], help="stops, tokens, unpaced, memory or readers")
    parser.add_argument("--json", type=Path, help="write all figures there")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="sluicegate-speed-") as name, ExitStack() as stack:
        stack.callback(stop_everything)
        directory = Path(name)
        model_url = stack.enter_context(model_server(directory))
        postgres = postgres_server(directory / "postgres.log")
        subjects: list[Subject] = [Direct("direct", model_url)]
        subjects.append(stack.enter_context(naive_proxy(directory, model_url)))
        if resumable := stack.enter_context(resumable_stream(directory, model_url)):
            subjects.append(resumable)
        subjects.append(stack.enter_context(sluicegate(directory, model_url, postgres)))
        found: dict[str, Any] = {}
        try:
            asyncio.run(measure(model_url, subjects, options.short, options.only, found))
        finally:
            print(table(found))
            if options.json:
                machine = {"cores": psutil.cpu_count(), "python": sys.version.split()[0]}
                options.json.write_text(json.dumps(found | {"machine": machine}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
