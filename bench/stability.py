"""What many streams leave behind: nothing. And what a stream costs while it runs: memory, of web and worker.

    python -m bench.stability [--short] [--json PATH]

Three parts, each over the whole system as local processes: streams that are all stopped at the same moment; start-stop
cycles, by which memory must have levelled off; and more and more streams that stay active. The method and its caveats
are in `bench/README.md`.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil
import redis
import sqlalchemy as sa
from celery import Celery

from bench.progress import LINE
from bench.rig import Rig, running
from tests.functional.nodes import Client, EventStream, Reader, Stack
from tests.services import WaitTimeout, wait_until
from tests.upstream import Upstream

SAMPLES: Final = 20
"""Of memory, over all cycles."""
ALLOWED_GROWTH: Final = 0.05
CYCLES_AT_ONCE: Final = 10
STARTS_AT_ONCE: Final = 20
QUIET_SECONDS: Final = 5.0
"""That active streams are left alone before memory is read."""
LEASE_SECONDS: Final = 3.0
"""A lease that is older is renewed by nobody: renewals come every second."""
LEFTOVER_SECONDS: Final = 15.0
"""That the system has for putting everything away."""


class Differs(AssertionError):
    """What was seen is not what was saved, or a stop ended otherwise than it must."""


# What is left


def leftovers(stack: Stack, upstream: Upstream) -> dict[str, int]:
    """What is there although no stream runs; all of it must be 0. Waits a moment for what is being put away."""

    def look() -> dict[str, int]:
        return {
            "ACTIVE rows": _active_rows(stack),
            **_session_keys(stack),
            "tasks in workers": _tasks(stack),
            "chats open at the upstream": upstream.open_count(),
            "connections at the upstream": upstream.connection_count(),
        }

    found: dict[str, int] = {}

    def is_clean() -> bool:
        found.update(look())
        return not any(found.values())

    try:
        wait_until(is_clean, LEFTOVER_SECONDS)
    except WaitTimeout:
        return found
    return found


def _active_rows(stack: Stack) -> int:
    engine = sa.create_engine(stack.environment["DATABASE_URL"], poolclass=sa.NullPool)
    with engine.connect() as connection:
        return int(connection.scalar(sa.text("SELECT count(*) FROM stream_sessions WHERE status = 'ACTIVE'")) or 0)


def _session_keys(stack: Stack) -> dict[str, int]:
    with redis.Redis.from_url(stack.valkey.url, decode_responses=True) as client:
        keys = list(client.scan_iter("sg:{*", count=1000))
        pipeline = client.pipeline(transaction=False)
        for key in keys:
            pipeline.ttl(key)
        for key in states(keys):
            pipeline.hmget(key, "done", "lease_us")
        answers = pipeline.execute()
        seconds, microseconds = client.time()
    alive_since_us = seconds * 1_000_000 + microseconds - LEASE_SECONDS * 1_000_000
    found = answers[len(keys) :]
    return {
        "session keys without a TTL": answers[: len(keys)].count(-1),
        "states without an end": sum(1 for done, _ in found if not done),
        "leases": sum(1 for _, lease_us in found if lease_us and float(lease_us) > alive_since_us),
    }


def states(keys: Sequence[str]) -> list[str]:
    """The keys of sessions' states."""
    return [key for key in keys if key.endswith(":state")]


def _tasks(stack: Stack) -> int:
    with Celery(broker=stack.valkey.url, set_as_current=False) as app:
        inspect = app.control.inspect(timeout=1)
        answers = [inspect.active() or {}, inspect.reserved() or {}]
    return sum(len(tasks) for answer in answers for tasks in answer.values())


# Memory


@dataclass(frozen=True)
class Sample:
    """What web (its gunicorn master included) and the workers hold at one moment."""

    web_kb: float
    worker_kb: float
    web_files: int
    worker_files: int


def sample(stack: Stack) -> Sample:
    """Read it from the kernel: PSS, which counts what processes share once."""
    web = [process for one in stack.webs for process in one.family()]
    worker = [process for one in stack.workers for process in one.container.process.family()]
    return Sample(_pss_kb(web), _pss_kb(worker), _files(web), _files(worker))


def _pss_kb(processes: Sequence[psutil.Process]) -> float:
    return float(sum(process.memory_full_info().pss for process in processes) / 1024)


def _files(processes: Sequence[psutil.Process]) -> int:
    return sum(process.num_fds() for process in processes)


# Streams that are all stopped at once


@dataclass(frozen=True)
class Terminations:
    """How long each of the calls took, from its start to its receipt."""

    seconds: list[float]

    def quantile_ms(self, share: float) -> float:
        return sorted(self.seconds)[min(len(self.seconds) - 1, int(share * len(self.seconds)))] * 1000


def terminate_at_once(stack: Stack, upstream: Upstream, streams: int) -> Terminations:
    """Stop so many running streams at the same moment, each by a call of its own.

    Raises:
        Differs: a reader was sent something else than was saved, or the upstream was not freed.
    """
    client, model = stack.client(), "name=at-once,pace=10,tokens=1000000"
    with active_streams(client, streams, model) as readers:
        barrier = threading.Barrier(streams)

        def stop(session_id: str) -> tuple[float, dict[str, Any]]:
            barrier.wait()
            began = time.perf_counter()
            receipt = client.terminate(session_id)
            return time.perf_counter() - began, receipt

        with ThreadPoolExecutor(streams) as pool:
            stopped = list(pool.map(stop, readers))
        for reader, (_, receipt) in zip(readers.values(), stopped, strict=True):
            reader.wait_until_done()
            _require_same(client, reader.text, receipt)
    upstream.wait_until(lambda records: all(one.outcome == "disconnected" for one in records if one.model == model))
    return Terminations([seconds for seconds, _ in stopped])


@contextmanager
def active_streams(client: Client, count: int, model: str) -> Iterator[dict[str, Reader]]:
    """So many streams that run, each with one reader, who has been sent something: session id to reader."""
    with ThreadPoolExecutor(STARTS_AT_ONCE) as pool:
        sessions = list(pool.map(lambda number: client.post_message(f"message {number}", model=model), range(count)))
    readers = {session["sessionId"]: client.follow(session["sessionId"]) for session in sessions}
    try:
        for reader in readers.values():
            reader.wait_for_text(timeout_seconds=120)
        yield readers
    finally:
        _stop_all(client, readers)


def _stop_all(client: Client, readers: dict[str, Reader]) -> None:
    running = [session_id for session_id, reader in readers.items() if reader.done is None]
    with ThreadPoolExecutor(STARTS_AT_ONCE) as pool:
        list(pool.map(client.terminate, running))
    for reader in readers.values():
        reader.leave()


def _require_same(client: Client, seen: str, receipt: dict[str, Any]) -> None:
    """What was seen is what the receipt says, and what was saved."""
    saved = client.message(receipt)["content"]
    if not seen == receipt["partialResponse"] == saved:
        raise Differs(f"{len(seen)} code points seen, {receipt['length']} in the receipt, {len(saved)} saved")
    if (receipt["status"], receipt["reason"]) != ("TERMINATED", "user"):
        raise Differs(f"stopped by its user, and ended as {receipt['status']}, {receipt['reason']}")


# Start-stop cycles


@dataclass
class Cycles:
    """Memory while streams were started and stopped again and again; the first sample is from before the first."""

    cycles: int = 0
    seconds: float = 0.0
    samples: list[Sample] = field(default_factory=list)

    def levelled_off(self, of: Callable[[Sample], float]) -> float:
        """The median of the samples between 40 and 60 % of the cycles: by then everything has run many times."""
        count = len(self.samples)
        return statistics.median(of(one) for one in self.samples[int(count * 0.4) : int(count * 0.6) + 1])

    def at_the_end(self, of: Callable[[Sample], float]) -> float:
        """The median of the last tenth, of two samples at least."""
        return statistics.median(of(one) for one in self.samples[-max(2, len(self.samples) // 10) :])

    def growth(self, of: Callable[[Sample], float]) -> float:
        """From where it had levelled off to the end, as a share."""
        return self.at_the_end(of) / self.levelled_off(of) - 1


def cycle(stack: Stack, cycles: int) -> Cycles:
    """Start a stream, read some tokens, stop it, compare; so many times, a few at once.

    Raises:
        Differs: a reader was sent something else than was saved.
    """
    client = stack.client()
    done = Cycles(samples=[sample(stack)])
    tokens = random.Random(cycles)
    began = time.monotonic()
    with ThreadPoolExecutor(CYCLES_AT_ONCE) as pool:
        while done.cycles < cycles:
            count = min(max(1, cycles // SAMPLES), cycles - done.cycles)
            list(pool.map(lambda wanted: _cycle_once(client, wanted), [tokens.randint(1, 20) for _ in range(count)]))
            done.cycles += count
            done.samples.append(sample(stack))
    done.seconds = time.monotonic() - began
    return done


def _cycle_once(client: Client, tokens: int) -> None:
    with client.post_stream("go on", model="name=cycle,pace=100,tokens=1000000,thinking=0") as stream:
        text, receipt = _read_and_stop(client, stream, tokens)
    _require_same(client, text, receipt)


def _read_and_stop(client: Client, stream: EventStream, tokens: int) -> tuple[str, dict[str, Any]]:
    text, receipt = "", {}
    for event in stream:
        if event.event == "message":
            text += event.data["content"]
        if not receipt and text.count(" ") >= tokens:
            receipt = client.terminate(stream.session_id)
    return text, receipt


# Streams that stay active


@dataclass(frozen=True)
class Load:
    """Memory beside so many active streams, each with one reader, and just before they were started."""

    sessions: int
    idle: Sample
    busy: Sample


def load(stack: Stack, sizes: Sequence[int]) -> list[Load]:
    """Memory with ever more streams, which say little, so that it is their being there that is measured."""
    client, loads = stack.client(), []
    for size in sizes:
        idle = sample(stack)
        with active_streams(client, size, "name=load,pace=0.1,tokens=1000000"):
            time.sleep(QUIET_SECONDS)
            loads.append(Load(size, idle, sample(stack)))
    return loads


def slope_kb(loads: Sequence[Load], of: Callable[[Sample], float]) -> float:
    """KB that one more session takes: least squares over all sizes, and none before the first."""
    points = [(0, of(loads[0].idle)), *((one.sessions, of(one.busy)) for one in loads)]
    return statistics.linear_regression(*zip(*points, strict=True)).slope


# The report


@dataclass(frozen=True)
class Line:
    """One line of the table; `bound` says what is allowed, where anything is."""

    what: str
    figure: str
    bound: str = ""
    ok: bool = True


@dataclass
class Report:
    """All that was measured."""

    terminations: Terminations | None = None
    cycles: Cycles | None = None
    left: dict[str, int] = field(default_factory=dict)
    loads: list[Load] = field(default_factory=list)
    left_after_load: dict[str, int] = field(default_factory=dict)

    def lines(self) -> list[Line]:
        """The table, in order."""
        return [
            *(_termination_lines(self.terminations) if self.terminations else ()),
            *(_cycle_lines(self.cycles) if self.cycles else ()),
            *_left_lines("left afterwards", self.left),
            *(_load_lines(self.loads) if self.loads else ()),
            *_left_lines("left after the active sessions", self.left_after_load),
        ]


def _termination_lines(done: Terminations) -> Iterator[Line]:
    quantiles = ", ".join(f"{name} {done.quantile_ms(share):.0f} ms" for name, share in _QUANTILES.items())
    yield Line(f"{len(done.seconds)} streams stopped at once: until the receipt", quantiles)


_QUANTILES: Final = {"median": 0.5, "p95": 0.95, "slowest": 1.0}
_PARTS: Final[dict[str, tuple[Callable[[Sample], float], Callable[[Sample], float]]]] = {
    "web": (lambda one: one.web_kb, lambda one: one.web_files),
    "worker": (lambda one: one.worker_kb, lambda one: one.worker_files),
}


def _cycle_lines(done: Cycles) -> Iterator[Line]:
    rate = done.cycles / done.seconds
    yield Line(f"{done.cycles:,} start-stop cycles, {CYCLES_AT_ONCE} at a time, seen = saved", f"{rate:.1f} a second")
    for part, (memory, files) in _PARTS.items():
        growth = done.growth(memory)
        figure = f"{done.levelled_off(memory) / 1024:.1f} MB, then {growth:+.1%}"
        yield Line(f"memory of {part}: levelled off, at the end", figure, f"+{ALLOWED_GROWTH:.0%}", _is_level(growth))
        yield Line(f"open files of {part}: levelled off, at the end", _from_to(done, files))


def _is_level(growth: float) -> bool:
    """What is given back is no fault."""
    return growth <= ALLOWED_GROWTH


def _from_to(done: Cycles, of: Callable[[Sample], float]) -> str:
    return f"{done.levelled_off(of):.0f}, {done.at_the_end(of):.0f}"


def _left_lines(when: str, left: dict[str, int]) -> Iterator[Line]:
    for what, count in left.items():
        yield Line(f"{when}: {what}", str(count), "0", count == 0)


def _load_lines(loads: Sequence[Load]) -> Iterator[Line]:
    for part, (memory, _) in _PARTS.items():
        for one in loads:
            each_kb = (memory(one.busy) - memory(one.idle)) / one.sessions
            figure = f"{memory(one.busy) / 1024:.1f} MB ({each_kb:+.1f} KB each)"
            yield Line(f"memory of {part} beside {one.sessions:,} active sessions", figure)
        yield Line(f"memory of {part}: each further session", f"{slope_kb(loads, memory):.1f} KB")


def table(lines: Sequence[Line]) -> str:
    """As Markdown."""
    rows = [f"| {one.what} | {one.figure} | {one.bound} | {'' if one.ok else '**no**'} |" for one in lines]
    return "\n".join(["| what | figure | allowed | |", "| --- | ---: | ---: | --- |", *rows])


def main() -> int:
    """Measure, print the table, and answer 1 where anything is left over or memory goes on growing."""
    arguments = _arguments()
    report = Report()
    concurrency = max([200, arguments.streams, *arguments.sessions]) + 50
    settings = {"SLUICEGATE_WORKER_CONCURRENCY": str(concurrency)}
    with running(workers=arguments.workers, settings=settings) as rig:
        _measure_stops(rig, arguments, report)
    if arguments.sessions:
        with running(workers=arguments.workers, settings=settings) as rig:  # which has no room left from before
            _measure_load(rig, arguments, report)
    LINE.clear()
    lines = report.lines()
    print(table(lines))
    if arguments.json:
        figures = {"lines": [asdict(one) for one in lines], "measured": asdict(report)}
        arguments.json.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    return int(not all(one.ok for one in lines))


def _measure_stops(rig: Rig, arguments: argparse.Namespace, report: Report) -> None:
    _say(f"{arguments.streams} streams are stopped at once")
    report.terminations = terminate_at_once(rig.stack, rig.upstream, arguments.streams)
    _say(f"{arguments.cycles} cycles")
    report.cycles = cycle(rig.stack, arguments.cycles)
    report.left = leftovers(rig.stack, rig.upstream)


def _measure_load(rig: Rig, arguments: argparse.Namespace, report: Report) -> None:
    _say(f"memory beside {arguments.sessions} active sessions")
    cycle(rig.stack, CYCLES_AT_ONCE)  # what is made once is no session's
    report.loads = load(rig.stack, arguments.sessions)
    report.left_after_load = leftovers(rig.stack, rig.upstream)


def _say(what: str) -> None:
    LINE.say(f"{time.strftime('%H:%M:%S')} {what}")
    LINE.show(what)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="what many streams leave behind, and what each takes")
    parser.add_argument("--streams", type=int, default=100, help="stopped at once (default: 100)")
    parser.add_argument("--cycles", type=int, default=1000, help="of start and stop (default: 1,000)")
    parser.add_argument("--sessions", type=_sizes, default=[10, 100, 1000], help="active at once, e.g. 10,100,1000")
    parser.add_argument("--workers", type=int, default=1, help="worker processes (default: 1)")
    parser.add_argument("--short", action="store_true", help="100 cycles, and no more than 100 active sessions")
    parser.add_argument("--json", type=Path, help="write all figures there")
    arguments = parser.parse_args()
    if arguments.short:
        arguments.cycles, arguments.sessions = min(100, arguments.cycles), [10, 100]
    return arguments


def _sizes(text: str) -> list[int]:
    return sorted(int(size) for size in text.split(",") if size)


if __name__ == "__main__":
    sys.exit(main())
