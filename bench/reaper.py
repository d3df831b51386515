"""What one pass of the reaper costs beside a million ended sessions, and whether any statement reads a whole table.

    python -m bench.reaper --rows 1000000 --database postgresql

A pass over `--rows` ended sessions is timed against one over 1,000, with the same hundred of them due: the cost
should follow what has gone wrong, not what exists. The plans are those of the statements that the pass executes.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import structlog
from sqlalchemy import select, update

from bench.history import SOON, add_due, add_healthy, analyse, fill
from bench.plans import PlanWatch, Walk
from bench.progress import LINE, Steps
from tests.integration.world import World, make_settings, make_world
from tests.services import PostgresServer, ValkeyServer, postgres_server, stop_everything, valkey_server
from webapp.models import StreamSession, User, now
from webapp.streams import rows
from webapp.streams.lifecycle import StreamStatus

FEW: Final = 1_000
HEALTHY: Final = 2_000
PASSES: Final = 5
"""That are timed; the median counts."""


@dataclass
class Cost:
    """Of one pass, over a past of so many ended sessions."""

    database: str
    ended: int
    fill_seconds: float
    pass_seconds: list[float] = field(default_factory=list)
    idle_seconds: list[float] = field(default_factory=list)
    """Of passes that find nothing."""
    statements: int = 0
    walks: list[Walk] = field(default_factory=list)
    plans: dict[str, list[str]] = field(default_factory=dict)

    @property
    def median_seconds(self) -> float:
        return statistics.median(self.pass_seconds)

    @property
    def idle_median_seconds(self) -> float:
        return statistics.median(self.idle_seconds)


def measure(database_url: str, valkey: ValkeyServer, ended: int, *, passes: int = PASSES) -> Cost:
    """Fill an empty database with a past, and let the reaper pass over it.

    Raises:
        AssertionError: a pass did not find what was due, and nothing else.
    """
    began = time.monotonic()
    steps = Steps(passes + 2, f"beside {ended:,} ended sessions, ")
    steps.begin("filling in")
    fill(database_url, ended)
    with _world(database_url, valkey) as world:
        world.database.write(lambda s: add_healthy(s, HEALTHY))
        analyse(world.database.engine)
        cost = Cost(world.database.engine.dialect.name, ended, time.monotonic() - began)
        _pass(world)  # which compiles the statements
        for _ in range(passes):
            steps.begin("passes")
            cost.pass_seconds.append(_pass(world))
            cost.idle_seconds.append(_timed(world))
        steps.begin("the plans")
        with PlanWatch(world.database.engine) as watch:
            _pass(world)
            cost.statements = watch.statements
            read_hot_paths(world)
        cost.walks, cost.plans = sorted(watch.walks, key=str), watch.plans
    return cost


def _pass(world: World) -> float:
    """Seconds of a pass that has work to do."""
    put_off(world)
    expected = world.database.write(add_due)
    began = time.perf_counter()
    found = dict(world.reaper.reap())
    seconds = time.perf_counter() - began
    assert found == expected, f"the pass found {found}, and there was {expected}"
    return seconds


def _timed(world: World) -> float:
    """Seconds of a pass that has none."""
    put_off(world)
    began = time.perf_counter()
    found = world.reaper.reap()
    assert not found, f"the pass found {found} where nothing was due"
    return time.perf_counter() - began


def put_off(world: World) -> None:
    """No worker is here to claim what a pass has queued again, and it must not be due in the next."""
    waiting = (StreamSession.status == StreamStatus.ACTIVE) & StreamSession.owner.is_(None)
    world.database.write(lambda s: s.execute(update(StreamSession).where(waiting).values(requeue_at=now() + SOON)))


def read_hot_paths(world: World) -> None:
    """The other questions that are asked often: of the hub, of the lists, and at the start of every stream."""
    session_ids, user_id = world.database.read(_some_active)
    world.database.read(lambda s: rows.crowd(s, user_id))
    world.queries.queue_position(session_ids[0])
    world.queries.ended_among(session_ids)
    world.queries.list_streams(active_only=True)
    world.queries.list_streams(active_only=True, user_id=user_id)
    world.queries.active_in(world.row(session_ids[0]).conversation_id)
    world.manager.watched(session_ids, now() + timedelta(hours=2))


def _some_active(s: Any) -> tuple[list[UUID], UUID]:
    """Fifty healthy sessions, and a user of the past, who has conversations and nothing that runs."""
    active = select(StreamSession.id).where(StreamSession.status == StreamStatus.ACTIVE).limit(50)
    return list(s.scalars(active)), s.scalars(select(User.id).where(User.name == "user7")).one()


@contextmanager
def _world(database_url: str, valkey: ValkeyServer) -> Iterator[World]:
    valkey.flush()
    with tempfile.TemporaryDirectory() as directory:
        world = make_world(make_settings(database_url, valkey.url, Path(directory)))
        try:
            yield world
        finally:
            world.close()
            world.database.engine.dispose()


@contextmanager
def empty_database(kind: str, postgres: PostgresServer | None, directory: Path) -> Iterator[str]:
    """URL of a database without tables."""
    if postgres is not None and kind == "postgresql":
        url = postgres.create_database()
        yield url
        postgres.drop_database(url)
        return
    path = directory / f"{time.monotonic_ns()}.db"
    yield f"sqlite:///{path}"
    for file in directory.glob(f"{path.name}*"):
        file.unlink()


# The command


def table(costs: Sequence[Cost]) -> str:
    """The figures as Markdown."""
    lines = [
        "| database | ended sessions | filled in | a pass, 100 due | one, none due | statements | whole tables read |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for cost in costs:
        size = f"{cost.database} | {cost.ended:,} | {cost.fill_seconds:.0f} s"
        times = f"{cost.median_seconds * 1000:.0f} ms | {cost.idle_median_seconds * 1000:.1f} ms"
        lines.append(f"| {size} | {times} | {cost.statements:,} | {len(cost.walks)} |")
    return "\n".join(lines)


def main() -> int:
    """Measure, print, and answer 1 where a statement reads a whole table or the cost follows what exists."""
    arguments = _arguments()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    kinds = ["postgresql", "sqlite"] if arguments.database == "both" else [arguments.database]
    failed = False
    costs: list[Cost] = []
    with tempfile.TemporaryDirectory(prefix="sluicegate-bench-") as name:
        directory = Path(name)
        valkey = valkey_server(directory / "valkey")
        postgres = postgres_server(directory / "postgres.log") if "postgresql" in kinds else None
        for kind in kinds:
            pair = []
            for ended in (FEW, arguments.rows):
                with empty_database(kind, postgres, directory) as url:
                    pair.append(measure(url, valkey, ended))
            costs += pair
            ratio = pair[1].median_seconds / pair[0].median_seconds
            failed |= ratio > arguments.max_ratio or any(cost.walks for cost in pair[1:])
            LINE.clear()
            print(f"{kind}: {pair[1].ended / FEW:,.0f} times the rows, {ratio:.2f} times the cost", file=sys.stderr)
            _explain(pair[1], everything=arguments.plans)
        stop_everything()
    print(table(costs))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(cost) for cost in costs], indent=2) + "\n")
    return int(failed)


def _explain(cost: Cost, *, everything: bool) -> None:
    for walk in cost.walks:
        print(f"reads a whole table: {walk.node}\n  {walk.statement}", file=sys.stderr)
    for statement, nodes in cost.plans.items() if everything else ():
        print(statement, *nodes, sep="\n    ", file=sys.stderr)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="the cost of a pass of the reaper")
    parser.add_argument("--rows", type=int, default=1_000_000, help="ended sessions (default: 1,000,000)")
    parser.add_argument("--database", choices=["postgresql", "sqlite", "both"], default="both")
    parser.add_argument("--max-ratio", type=float, default=3.0, help="of the two passes; more is a failure")
    parser.add_argument("--plans", action="store_true", help="print the plan of every statement")
    parser.add_argument("--json", type=Path, help="write the figures, and the plans, there")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
