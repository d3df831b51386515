"""The whole system for a bench: the tests' processes, with a database, a Valkey and a scripted upstream."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.functional.nodes import Stack
from tests.services import postgres_server, stop_everything, valkey_server
from tests.upstream import UpstreamProcess


@dataclass(frozen=True)
class Rig:
    """What runs, and the server that plays the model."""

    stack: Stack
    upstream: UpstreamProcess


@contextmanager
def running(*, workers: int = 1, settings: Mapping[str, str] | None = None) -> Iterator[Rig]:
    """Web, workers, reaper and beat over PostgreSQL, for the block's time; `settings`: environment variables."""
    with tempfile.TemporaryDirectory(prefix="sluicegate-bench-") as name:
        directory = Path(name)
        try:
            yield _start(directory, workers, settings or {})
        finally:
            stop_everything()


def _start(directory: Path, workers: int, settings: Mapping[str, str]) -> Rig:
    upstream = UpstreamProcess(directory / "upstream.log")
    upstream.start()
    stack = Stack(
        directory,
        database_url=postgres_server(directory / "postgres.log").create_database(),
        valkey=valkey_server(directory / "valkey", append_only=True),
        upstream_url=upstream.url,
        settings=settings,
    )
    stack.release()
    for _ in range(workers):
        stack.start_worker()
    stack.start_reaper()
    stack.start_beat()
    stack.start_web()
    return Rig(stack, upstream)
