"""The whole system for a bench: the tests' processes, with a database, a Valkey and a scripted upstream."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.functional.nodes import Stack
from tests.services import PostgresServer, postgres_server, stop_everything, valkey_server
from tests.upstream import UpstreamProcess


@dataclass(frozen=True)
class Rig:
    """What runs, and the server that plays the model."""

    stack: Stack
    upstream: UpstreamProcess
    postgres: PostgresServer


@contextmanager
def running(*, workers: int = 1, webs: int = 1, settings: Mapping[str, str] | None = None) -> Iterator[Rig]:
    """Webs, workers, reaper and beat over PostgreSQL, for the block's time; `settings`: environment variables."""
    with tempfile.TemporaryDirectory(prefix="sluicegate-bench-") as name:
        directory = Path(name)
        try:
            yield start(directory, workers=workers, webs=webs, settings=settings or {})
        finally:
            stop_everything()


def start(directory: Path, *, workers: int, webs: int, settings: Mapping[str, str]) -> Rig:
    """Start it all, with logs and data in `directory`; whoever calls sees to its end."""
    upstream = UpstreamProcess(directory / "upstream.log")
    upstream.start()
    postgres = postgres_server(directory / "postgres.log")
    stack = Stack(
        directory,
        database_url=postgres.create_database(),
        valkey=valkey_server(directory / "valkey", append_only=True),
        upstream_url=upstream.url,
        settings=settings,
    )
    stack.release()
    started = [stack.start_worker(wait=False) for _ in range(workers)]
    stack.start_recovery()
    for _ in range(webs):
        stack.start_web()
    for worker in started:
        worker.ready()
    return Rig(stack, upstream, postgres)
