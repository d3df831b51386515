"""Runs one answer after another as a worker does, and kills each one's task, as Celery does, at another step.

A program of its own, for a worker's process is patched from its very start. It works on the system that its environment
names, and prints a line of JSON for each run: `python -m tests.functional.strikes MODEL`.
"""

# ruff: noqa: E402 - everything else is imported into a patched process
from gevent import monkey

monkey.patch_all()

import contextlib
import gc
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import gevent
from celery.worker import state as worker_state

from webapp.app import make_services
from webapp.config import load_settings
from webapp.database import Database
from webapp.logs import configure_logs
from webapp.streams import endings, rows
from webapp.streams.log import TokenLog
from webapp.streams.manager import StreamSessionManager
from webapp.streams.ports import NewMessage
from workers.generate import Generation
from workers.ollama import OllamaService
from workers.runtime import Runtime

OWNER = "worker@here"
RUN_SECONDS = 20.0
WITHIN_SECONDS = 0.02
"""After which a step that began is taken to be waiting for the upstream."""

Step = tuple[str, int]
"""What is done, and for which time."""

STEPS: dict[str, tuple[object, str]] = {
    "claim": (StreamSessionManager, "claim"),
    "claim, in its transaction": (rows, "claim"),
    "open": (TokenLog, "open"),
    "chat": (OllamaService, "chat"),
    "connect": (Generation, "_on_open"),
    "read": (OllamaService, "read"),
    "text": (Generation, "_on_text"),
    "flush": (TokenLog, "apply"),
    "end": (Generation, "_end"),
    "close": (Generation, "_close_upstream"),
    "fence": (TokenLog, "fence"),
    "finish": (StreamSessionManager, "finish"),
    "commit, in its transaction": (rows, "commit"),
    "commit": (StreamSessionManager, "_commit"),
    "report": (endings, "report"),
    "publish": (StreamSessionManager, "_publish"),
    "done": (TokenLog, "finish"),
    "published": (rows, "published"),
}

STRUCK_TWICE = ("before claim", "waiting after connect", "waiting after text", "before fence", "before publish")


class Striker:
    """Counts the steps of one run, and at one of them kills its task."""

    def __init__(self, runtime: Runtime, target: Step | None = None, times: int = 1) -> None:
        self._runtime = runtime
        self._target = target
        self._times = times
        self.seen: Counter[str] = Counter()
        self.session_id: Any = None
        self.task: gevent.Greenlet | None = None
        self.struck_while: str | None = None
        """What the session was at when it was struck: `running`, or `ending`, or not even that."""

    def step(self, name: str) -> None:
        self.seen[name] += 1
        if (name, self.seen[name]) == self._target:
            self.strike()

    def strike(self) -> None:
        """As Celery does: the kill, then the signal; twice, where somebody presses the button twice."""
        assert self.task is not None
        generation = self._runtime.table.get(self.session_id)
        self.struck_while = "ending" if generation is not None and generation._stop is not None else "running"
        for _ in range(self._times):
            worker_state.revoked.add(str(self.session_id))
            self.task.kill(block=False)
            gevent.spawn(self._runtime.on_revoked, str(self.session_id))
            for _ in range(3):
                gevent.sleep(0)  # it strikes here: the step that is under way sees what comes of it

    def around(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def stepped(*args: Any, **options: Any) -> Any:
            self.step(f"before {name}")
            if name in ("connect", "text"):
                gevent.spawn_later(WITHIN_SECONDS, self.step, f"waiting after {name}")
            answer = original(*args, **options)
            self.step(f"after {name}")
            return answer

        return stepped

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Have each of the steps counted."""
        with contextlib.ExitStack() as stack:
            for name, (owner, attribute) in STEPS.items():
                stack.enter_context(patch.object(owner, attribute, self.around(name, getattr(owner, attribute))))
            yield


class Runs:
    """A worker's runtime, and what it takes to begin a stream."""

    def __init__(self, model: str) -> None:
        settings = load_settings()
        configure_logs(settings)
        self._model = model
        self.services = make_services(settings)
        self.runtime = Runtime(self.services)
        self._user_id = self._make_user()
        # There is no broker: what would be told through it is told here.
        queue: Any = self.services.queue
        queue.enqueue = queue.revoke = lambda session_id: None
        queue.nudge = lambda session_id, owner, reason: self.runtime.stop(session_id, reason)

    def _make_user(self) -> Any:
        self.services.accounts.create_user("tester")
        return self.services.accounts.list_users()[0].id

    def run(self, target: Step | None = None, times: int = 1) -> dict[str, Any]:
        """One answer, struck at the target, or before it has begun."""
        striker = Striker(self.runtime, target, times)
        new = NewMessage(user_id=self._user_id, content="go on", model=self._model)
        session = self.services.manager.start(new)
        striker.session_id = session.session_id
        with striker.watching(), gevent.Timeout(RUN_SECONDS):
            striker.task = gevent.spawn(self.runtime.run, session.session_id, OWNER)
            if target == ("the start", 1):
                striker.strike()
            striker.task.join()
            gevent.sleep(WITHIN_SECONDS)
            while self.services.queries.row(session.session_id).published_at is None:
                gevent.sleep(0.01)
        return {
            "sessionId": str(session.session_id),
            "messageId": str(session.message_id),
            "target": target and f"{target[0]}, {target[1]}",
            "struckWhile": striker.struck_while,
            "steps": [(name, count) for name, count in striker.seen.items()],
            "inTable": len(self.runtime.table),
        }

    def left(self) -> dict[str, int]:
        """What is in use, which a run must not leave behind."""
        gc.collect()
        greenlets = [one for one in gc.get_objects() if isinstance(one, gevent.Greenlet) and not one.dead]
        return {"greenlets": len(greenlets), "databaseConnections": _checked_out(self.services.database)}


def _checked_out(database: Database) -> int:
    pool: Any = database.engine.pool
    return int(pool.checkedout())


def main() -> None:
    runs = Runs(sys.argv[1])
    undisturbed = runs.run()
    before = runs.left()
    targets: list[Step] = [("the start", 1)]
    targets += [(name, nth) for name, count in undisturbed["steps"] for nth in range(1, min(count, 2) + 1)]
    results = [runs.run(target) for target in targets]
    results += [runs.run((name, 1), times=2) for name in STRUCK_TWICE]
    print(json.dumps({"undisturbed": undisturbed, "before": before, "after": runs.left(), "results": results}))


if __name__ == "__main__":
    main()
