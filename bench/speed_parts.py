"""What `bench/speed.py` measures of one subject, part by part."""

from __future__ import annotations

import asyncio
import gc
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from bench import wire
from bench.reading import Reading, crowd, reading
from bench.subjects import Sluicegate, Subject

PACE: Final = 50
SLOW_PACE: Final = 5
"""Of parts with up to a thousand streams or readers: tokens a second."""
LONG: Final = 1_000_000
SPOKEN_TOKENS: Final = 5
"""That a stream has said before it is stopped, or falls silent."""
SETTLED_SECONDS: Final = 0.05
"""Between the last of them and the stop."""
TOLD_SECONDS: Final = 1.0
"""Between a change of what runs and the moment at which counting begins."""
IDLE_SILENCE_SECONDS: Final = 30.0
"""A naive proxy notices only behind it that its readers have gone."""
SPEAKING: Final = f"pace={PACE},tokens={LONG}"

Summary = dict[str, float | int | None]


def summary(values: Sequence[float | None]) -> Summary:
    """Median and p99 in ms, of seconds; how many there were, and how many never came."""
    there = sorted(value * 1000 for value in values if value is not None)
    if not there:
        return {"p50": None, "p99": None, "n": 0, "missing": len(values)}
    p99 = there[-(-len(there) * 99 // 100) - 1]
    return {"p50": statistics.median(there), "p99": p99, "n": len(there), "missing": len(values) - len(there)}


# Stops


@dataclass(frozen=True)
class Stop:
    """What a stop finds."""

    script: str = SPEAKING
    spoken_tokens: int = SPOKEN_TOKENS
    """None is waited for where it is 0: the stream is still queued."""
    freed_within_seconds: float = 5.0


STREAMING: Final = Stop()
SILENT: Final = Stop(f"{SPEAKING},silent_at={SPOKEN_TOKENS}", freed_within_seconds=20.0)
QUEUED: Final = Stop(spoken_tokens=0)


async def stops(model_url: str, subject: Subject, count: int, stop: Stop) -> dict[str, Summary]:
    """From the call to each of what follows from it, and from a question to its first token, one after another.

    A stop that fails is missing from what it did not come to.
    """
    found: dict[str, list[float | None]] = {}
    for _ in range(count):
        try:
            steps: Mapping[str, float | None] = await _stop_one(model_url, subject, stop)
        except (AssertionError, KeyError, ValueError, *wire.BROKEN) as error:
            print(f"a stop of {subject.name} failed: {error!r}", file=sys.stderr)
            steps = {"answer": None}
        for step, seconds in steps.items():
            found.setdefault(step, []).append(seconds)
    return {step: summary(values) for step, values in found.items()}


async def queued_stops(model_url: str, subject: Sluicegate, count: int) -> dict[str, Summary]:
    """The same for streams that no worker has taken."""
    with subject.frozen_workers():
        found = await stops(model_url, subject, count, QUEUED)
    await asyncio.sleep(TOLD_SECONDS)  # until the workers have seen that there is nothing left to do
    return found


async def _stop_one(model_url: str, subject: Subject, stop: Stop) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    asked_at = time.monotonic()
    async with reading(subject, stop.script) as reader:
        await reader.until(lambda: reader.received and reader.tokens >= stop.spoken_tokens)
        if stop.spoken_tokens:
            found["first token"] = reader.first_at - asked_at
        await asyncio.sleep(SETTLED_SECONDS)
        wall, called_at = time.time(), time.monotonic()
        receipt = await subject.stop(reader.talk)
        answered_at = time.monotonic()
        if stop.spoken_tokens:
            freed = await freed_at(model_url, reader.talk.name, stop.freed_within_seconds)
            found["freed"] = None if freed is None else freed - called_at
        if receipt:
            await reader.ended(10)
            found |= {"reader's done": reader.done_at - called_at}
            for step, key in (("fence", "fencedAt"), ("commit", "committedAt")):
                found[step] = datetime.fromisoformat(receipt[key]).timestamp() - wall
        if receipt is not None:
            found["answer"] = answered_at - called_at
    return found


async def freed_at(model_url: str, name: str, seconds: float) -> float | None:
    """When the model's server saw the client of a chat go; None where that did not happen in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        async with wire.request(model_url, "GET", f"/_record/{name}", {}, timeout_seconds=5) as answer:
            said: dict[str, Any] = json.loads(await answer.body(5)) or {}
        if closed := said.get("closed_at"):
            return float(closed)
        await asyncio.sleep(0.02)
    return None


async def stops_beside(model_url: str, subject: Subject, count: int, streams: int) -> dict[str, Summary]:
    """The same for streams that have so many others beside them."""
    async with crowd(subject, streams, SPEAKING):
        await asyncio.sleep(TOLD_SECONDS)
        return await stops(model_url, subject, count, STREAMING)


# Tokens


async def watched(subject: Subject, readers: Sequence[Reading], seconds: float) -> dict[str, Any]:
    """How old tokens are when they come, and the CPU seconds of each kind of process for 100,000 that came."""
    await asyncio.sleep(TOLD_SECONDS)
    gc.collect()
    cpu, before = subject.cpu_seconds(), sum(reader.tokens for reader in readers)
    await asyncio.sleep(0.2)  # what came while this looked elsewhere is read, and its age not noted
    for reader in readers:
        reader.ages, reader.keeps = [], True
    await asyncio.sleep(seconds)
    for reader in readers:
        reader.keeps = False
    after, count = subject.cpu_seconds(), sum(reader.tokens for reader in readers) - before
    used = {kind: (after[kind] - cpu[kind]) / count * 100_000 for kind in cpu}
    return {"age": summary([age for reader in readers for age in reader.ages]), "tokens": count, "cpu": used}


async def tokens(subject: Subject, streams: int, seconds: float) -> dict[str, Any]:
    """Of so many streams at once."""
    async with crowd(subject, streams, SPEAKING) as readers:
        return await watched(subject, readers, seconds)


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


# What being there takes


async def memory(subject: Subject, streams: int, before_kb: Mapping[str, float], seconds: float) -> dict[str, Any]:
    """KB more than with no stream, for each of so many slow ones; and what their tokens cost."""
    async with crowd(subject, streams, f"pace={SLOW_PACE},tokens={LONG}") as readers:
        await asyncio.sleep(TOLD_SECONDS)
        found = await watched(subject, readers, seconds)
        now_kb = subject.memory_kb()
    await asyncio.sleep(2 * TOLD_SECONDS)
    return found | {"kb": {kind: (now_kb[kind] - before_kb[kind]) / streams for kind in now_kb}}


async def idle(subject: Subject, streams: int, seconds: float) -> dict[str, float]:
    """CPU seconds a minute, of each kind of process, beside so many streams that say nothing and have a reader each."""
    script = f"{SPEAKING},silent_at=3,silence={IDLE_SILENCE_SECONDS}"
    async with crowd(subject, streams, script):
        await asyncio.sleep(2 * TOLD_SECONDS)
        began, before = time.monotonic(), subject.cpu_seconds()
        await asyncio.sleep(seconds)
        after, passed = subject.cpu_seconds(), time.monotonic() - began
    return {kind: (after[kind] - before[kind]) / passed * 60 for kind in before}


async def readers_of_one(subject: Sluicegate, readers: int, seconds: float) -> dict[str, Any]:
    """How old tokens are where so many read one stream, and what each that was delivered cost."""
    pace = PACE if readers <= 100 else SLOW_PACE
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(reading(subject, f"pace={pace},tokens={LONG}"))
        await first.until(lambda: first.tokens > 0)
        everyone = [first]
        for _ in range(readers - 1):
            talk = await stack.enter_async_context(subject.another_reader(first.talk))
            everyone.append(Reading(talk))
        try:
            return await watched(subject, everyone, seconds) | {"pace": pace}
        finally:
            await subject.stop(first.talk)
            for reader in everyone:
                reader.leave()
