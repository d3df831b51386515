"""The nemesis of a chaos run: it breaks one thing, waits until the system is whole again, and says how long that took.

One fault at a time is what the invariants are promised for. A fault is over when every process does its work and every
stream that met it has ended, or is run by a worker that said so since, and has sent its readers something.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final
from uuid import UUID

import psutil
import requests
import sqlalchemy as sa
from celery import Celery

from bench.crowd import Crowd
from bench.rig import Rig
from bench.schedule import FAULTS, FaultPlan
from bench.seen import Stream
from tests.functional.nodes import NO_PROXIES
from tests.services import LocalProcess

RECOVERY_LIMIT_SECONDS: Final = 40.0
EXIT_SECONDS: Final = 20.0
"""That a worker or a web process has for leaving when it is asked to."""
POLL_SECONDS: Final = 0.15
NAMED: Final = 5
"""Of what is waited for, so many are noted."""
MARGIN_SECONDS: Final = 0.5
"""What was under way when the fault struck is no progress."""


@dataclass
class Hit:
    """One fault that struck. Times are `time.monotonic()`'s."""

    plan: FaultPlan
    struck_at: float
    on: str
    streams: int
    """That were active."""
    undone_at: float = 0.0
    """When what was killed was started again, and what was stopped went on."""
    back_at: float = 0.0
    """When every process did its work."""
    recovered_at: float = 0.0
    stuck: list[str] = field(default_factory=list)
    """What had not come back within the limit."""
    last: list[str] = field(default_factory=list)
    """What was waited for last."""

    @property
    def seconds(self) -> float:
        """From the strike until everything went on."""
        return self.recovered_at - self.struck_at


class Nemesis:
    """Strikes as it is told, and waits. Blocks, so it has a thread of its own."""

    def __init__(self, rig: Rig, crowd: Crowd, ended: threading.Event) -> None:
        """`ended` is set when nobody waits for its doings any more."""
        self._ended = ended
        self._rig = rig
        self._crowd = crowd
        self._engine = sa.create_engine(rig.stack.environment["DATABASE_URL"], poolclass=sa.NullPool)
        self._app = Celery(broker=rig.stack.valkey.url, set_as_current=False)
        self._workers = [one.container.process for one in rig.stack.workers]
        self._nodes = [f"{one.container.name}@{one.container.id}" for one in rig.stack.workers]
        self._nodes.append(f"reaper@{os.uname().nodename}")
        self._beat, self._reaper = rig.stack.others["beat"], rig.stack.others["reaper"]

    def strike(self, plan: FaultPlan) -> Hit:
        """One fault, and all of its consequences."""
        target = self._target(plan)
        hit = Hit(plan, time.monotonic(), target.name, len(self._crowd.active()))
        _DEEDS[plan.kind](self, target, plan.seconds)
        hit.undone_at = time.monotonic()
        self._recover(hit)
        return hit

    def _target(self, plan: FaultPlan) -> LocalProcess:
        stack = self._rig.stack
        processes: dict[str, list[LocalProcess]] = {
            "worker": self._workers,
            "web": stack.webs,
            "beat": [self._beat],
            "reaper": [self._reaper],
            "Valkey": [stack.valkey],
            "PostgreSQL": [self._rig.postgres],
            "upstream": [self._rig.upstream.process],
        }
        candidates = processes[plan.kind.partition(" ")[0]]
        return candidates[plan.target % len(candidates)]

    # -- coming back ---------------------------------------------------------------------------

    def _recover(self, hit: Hit) -> None:
        deadline = time.monotonic() + RECOVERY_LIMIT_SECONDS
        since = datetime.now(UTC)
        hit.stuck = self._left_at(deadline, hit, self._not_working)
        hit.back_at = time.monotonic()
        active = self._crowd.active()  # also those that were accepted since it struck
        if not hit.stuck:
            hit.stuck = self._left_at(deadline, hit, lambda: self._not_going_on(active, hit, since))
        hit.recovered_at = time.monotonic()

    def _left_at(self, deadline: float, hit: Hit, look: Callable[[], list[str]]) -> list[str]:
        """Look until nothing is found any more, or it is too late; what is found then."""
        while found := look():
            hit.last = found[:NAMED]
            if time.monotonic() > deadline or self._ended.wait(POLL_SECONDS):
                break
        return found

    def _not_working(self) -> list[str]:
        """The processes that do not do their work, and why that is thought."""
        stack = self._rig.stack
        services = [stack.valkey, self._rig.postgres, self._rig.upstream.process, self._beat]
        with ThreadPoolExecutor(8) as pool:
            checks = [(one.name, pool.submit(one.is_ready)) for one in services]
            checks += [(one.name, pool.submit(self._is_web_ready, one)) for one in stack.webs]
            silent = pool.submit(self._silent)
            waiting = [name for name, check in checks if not check.result()]
            return waiting + [f"no ping: {name}" for name in silent.result()]

    def _is_web_ready(self, web: LocalProcess) -> bool:
        try:
            return requests.get(f"{self._rig.stack.url(web)}/readyz", timeout=2, proxies=NO_PROXIES).ok
        except requests.RequestException:
            return False

    def _silent(self) -> list[str]:
        """The Celery nodes that do not answer."""
        nodes = self._nodes
        try:
            with self._app.connection_for_write() as connection:
                answers = self._app.control.ping(nodes, timeout=0.4, limit=len(nodes), connection=connection)
        except Exception as error:  # the broker is away
            return [repr(error)]
        answered = {name for answer in answers for name in answer}
        return [name for name in nodes if name not in answered]

    def _not_going_on(self, active: list[Stream], hit: Hit, since: datetime) -> list[str]:
        """Of the streams that met the fault: those that neither ended nor moved since it was undone."""
        moved_since = max(hit.struck_at + MARGIN_SECONDS, hit.undone_at)
        waiting = [one for one in active if not one.ended_at]
        if not waiting:
            return []
        run = self._heard_of([UUID(one.session_id) for one in waiting], since)
        return [
            f"{one.plan.name} {one.session_id} {run[one.session_id]}"
            for one in waiting
            if not one.ended_at
            and (
                not run[one.session_id].startswith("ok")
                or (one.watching and one.progress_at < moved_since and "ended" not in run[one.session_id])
            )
        ]

    def _heard_of(self, ids: list[UUID], since: datetime) -> dict[str, str]:
        """What the rows say: "ok" where a worker had the session after `since`, or it has ended."""
        statement = sa.text(
            "SELECT id, status, owner, heartbeat_at, requeue_at FROM stream_sessions WHERE id = ANY(:ids)"
        )
        with self._engine.connect() as connection:
            rows = connection.execute(statement, {"ids": ids}).all()
        words = {str(one): "lost: no row" for one in ids}
        for row in rows:
            if row.status != "ACTIVE":
                words[str(row.id)] = "ok, ended"
            elif row.owner and row.heartbeat_at and row.heartbeat_at >= since:
                words[str(row.id)] = f"ok, {row.owner}"
            else:
                words[str(row.id)] = f"owner {row.owner}, heard {row.heartbeat_at}, requeue {row.requeue_at}"
        return words

    # -- what it does to them ------------------------------------------------------------------

    def kill(self, process: LocalProcess, seconds: float) -> None:
        """SIGKILL to all of it, and start it again at once, as a supervisor would."""
        process.kill()
        process.start()

    def ask_to_leave(self, process: LocalProcess, seconds: float) -> None:
        """SIGTERM, or what a database takes for it; start it again when it has gone."""
        default = signal.SIGINT if process is self._rig.postgres else signal.SIGTERM
        process.stop(EXIT_SECONDS, default)
        process.start()

    def quit(self, process: LocalProcess, seconds: float) -> None:
        """SIGQUIT: Celery's cold shutdown."""
        process.stop(EXIT_SECONDS, signal.SIGQUIT)
        process.start()

    def freeze(self, process: LocalProcess, seconds: float) -> None:
        """SIGSTOP to it and all its children; SIGCONT after some seconds."""
        family = [psutil.Process(process.pid)]
        family += family[0].children(recursive=True)
        for one in family:
            _signal(one, signal.SIGSTOP)
        time.sleep(seconds)
        for one in reversed(family):
            _signal(one, signal.SIGCONT)

    def empty(self, process: LocalProcess, seconds: float) -> None:
        """SIGKILL to Valkey, and start it with nothing."""
        process.kill()
        shutil.rmtree(Path(process.directory) / "appendonlydir", ignore_errors=True)
        process.start()

    def flush(self, process: LocalProcess, seconds: float) -> None:
        """Empty Valkey while everybody is connected."""
        self._rig.stack.valkey.flush()


def _signal(process: psutil.Process, number: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


_DEEDS: Final[dict[str, Callable[[Nemesis, LocalProcess, float], None]]] = {
    "worker SIGKILL": Nemesis.kill,
    "worker SIGTERM": Nemesis.ask_to_leave,
    "worker SIGQUIT": Nemesis.quit,
    "worker SIGSTOP beyond its lease": Nemesis.freeze,
    "web SIGKILL": Nemesis.kill,
    "web SIGTERM": Nemesis.ask_to_leave,
    "web SIGSTOP": Nemesis.freeze,
    "beat SIGKILL": Nemesis.kill,
    "reaper SIGKILL": Nemesis.kill,
    "Valkey SIGKILL": Nemesis.kill,
    "Valkey SIGKILL and emptied": Nemesis.empty,
    "Valkey FLUSHALL": Nemesis.flush,
    "Valkey SIGSTOP": Nemesis.freeze,
    "PostgreSQL SIGKILL": Nemesis.kill,
    "PostgreSQL fast shutdown": Nemesis.ask_to_leave,
    "PostgreSQL SIGSTOP": Nemesis.freeze,
    "upstream SIGKILL": Nemesis.kill,
    "upstream SIGSTOP": Nemesis.freeze,
}
assert _DEEDS.keys() == FAULTS.keys()
