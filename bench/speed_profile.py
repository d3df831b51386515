"""Where the time of the web process and of the worker goes, while tokens pass or streams are stopped: by py-spy.

    python -m bench.speed_profile [--seconds N]

Samples of Python's stacks, taken while a process is on a core, are sorted by what the innermost frame that tells
belongs to. What an extension in C does counts for the frame that called it. py-spy may look at processes that it has
not started only as root, or where the kernel's `ptrace_scope` is 0.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from bench import speed_parts as parts
from bench.reading import crowd
from bench.speed import running
from bench.speed_report import OURS
from bench.subjects import Sluicegate

KINDS: Final = ("web", "worker")
SAMPLES_A_SECOND: Final = 400
PY_SPY: Final = str(Path(sys.executable).with_name("py-spy"))
STREAMS: Final = 50
STOPS: Final = 1_000_000
PLACES: Final = (
    ("Redis: packing commands, parsing answers, its socket", r"/?redis/"),
    ("PostgreSQL: SQLAlchemy, psycopg, its socket", r"(sqlalchemy|psycopg)/|webapp/(database|postgres|deadline)\.py"),
    ("Celery and kombu", r"(celery|kombu|billiard|vine)/"),
    ("the upstream's socket and HTTP", r"(requests|urllib3|http)/|socket\.py$|workers/chunked\.py"),
    ("the upstream's lines: JSON, text", r"workers/ollama\.py"),
    ("readers' and callers' HTTP: gunicorn, its sockets", r"gunicorn/"),
    ("Flask and Werkzeug", r"(flask|werkzeug|itsdangerous|flask_\w+|jinja2)/"),
    (
        "logging, tracing, metrics",
        r"(structlog|logging|opentelemetry|prometheus_client)/|webapp/(logs|access|metrics|tracing)",
    ),
    ("our own: hub, readers, events", r"webapp/(streams/(hub|follow|events)|rest/sse|readers)"),
    ("our own: flusher and log", r"workers/flusher|webapp/streams/(log|keys)"),
    ("our own: the rest", r"(webapp|workers)/"),
)
"""Innermost frame first; the first pattern that is found in a frame tells."""
LOOP: Final = "gevent: its loop, waking, switching"
OTHER: Final = "the rest"
_FRAME: Final = re.compile(r"\((?:.*site-packages/)?([^()]*):\d+\)$")
_WAITS: Final = ("acquire_with_timeout", "wait_for_signals")
"""Threads that py-spy takes for busy."""


def place(stack: Sequence[str]) -> str:
    """What a stack, outermost frame first, was busy with."""
    files = [found[1] for frame in reversed(stack) if (found := _FRAME.search(frame))]
    for file in files:
        for name, pattern in PLACES:
            if re.match(pattern, file):
                return name
    return LOOP if any(file.startswith("gevent/") for file in files) else OTHER


def sorted_samples(lines: Sequence[str]) -> Counter[str]:
    """Places to samples, of py-spy's raw form."""
    found: Counter[str] = Counter()
    for line in lines:
        stack, _, samples = line.rpartition(" ")
        if not any(wait in stack for wait in _WAITS):
            found[place(stack.split(";"))] += int(samples)
    return found


async def profiled(subject: Sluicegate, seconds: int, directory: Path) -> dict[str, Counter[str]]:
    """Kinds of processes to places to samples, of what goes on meanwhile."""
    spies: list[tuple[str, Path, asyncio.subprocess.Process]] = []
    for kind in KINDS:
        for process in subject.processes[kind]():
            path = directory / f"{kind}-{process.pid}-{time.monotonic_ns()}.raw"
            options = ["--rate", str(SAMPLES_A_SECOND), "--duration", str(seconds), "--format", "raw"]
            spy = await asyncio.create_subprocess_exec(
                *(PY_SPY, "record", *options, "--output", str(path), "--pid", str(process.pid)),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
            spies.append((kind, path, spy))
    found: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    for kind, path, spy in spies:
        _, said = await spy.communicate()
        if spy.returncode:
            raise RuntimeError(f"py-spy: {said.decode(errors='replace').strip()}")
        found[kind] += sorted_samples(path.read_text(encoding="utf-8").splitlines())
    return found


@asynccontextmanager
async def stopping(model_url: str, subject: Sluicegate) -> AsyncIterator[None]:
    """One stream after another is begun and stopped."""
    task = asyncio.create_task(parts.stops(model_url, subject, STOPS, parts.STREAMING))
    try:
        await asyncio.sleep(parts.TOLD_SECONDS)
        yield
        if task.done():
            task.result()  # what ended it
            raise RuntimeError("the stops were over before the samples")
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def table(title: str, found: dict[str, Counter[str]]) -> str:
    """As Markdown, in shares of each process's samples."""
    rows = [f"| {title} | {' | '.join(KINDS)} |", f"| --- |{' ---: |' * len(KINDS)}"]
    for name in dict.fromkeys([*(name for name, _ in PLACES), LOOP, OTHER]):
        shares = [found[kind][name] / max(1, found[kind].total()) for kind in KINDS]
        if max(shares) >= 0.005:
            rows.append(f"| {name} | {' | '.join(f'{share:.0%}' for share in shares)} |")
    rows.append(f"| samples | {' | '.join(f'{found[kind].total():,}' for kind in KINDS)} |")
    return "\n".join(rows)


async def measure(model_url: str, subject: Sluicegate, seconds: int) -> list[str]:
    """The tables."""
    tables = []
    with tempfile.TemporaryDirectory(prefix="sluicegate-profile-") as name:
        async with crowd(subject, STREAMS, parts.SPEAKING):
            await asyncio.sleep(parts.TOLD_SECONDS)
            title = f"{STREAMS} streams of {parts.PACE} tokens a second"
            tables.append(table(title, await profiled(subject, seconds, Path(name))))
        async with stopping(model_url, subject):
            title = "starts and stops, one after another"
            tables.append(table(title, await profiled(subject, seconds, Path(name))))
    return tables


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=int, default=10, help="of each of the two (default: %(default)s)")
    options = parser.parse_args(arguments)
    with running([OURS]) as (model_url, subjects):
        ours: Any = subjects[0]
        print("\n\n".join(asyncio.run(measure(model_url, ours, options.seconds))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
