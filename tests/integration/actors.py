"""The processes of the stop protocol on a stage: each waits for its turn before every call to Redis or the database.

All of them are greenlets of one thread, over one SQLite file and one Valkey, and they run the real code. A *turn* is
one call that is about to be made (a transaction, a Lua script, a read), or a pause (a sleep, a wait for news): whoever
directs takes one turn after the other, in any order, and says for each what becomes of it.

Time does not pass by itself. A sleep of the product ends when its turn is taken; a time-out that it waits for
(`Patience`) is over when the director says so; what depends on a row's age is told that by changing the row. So no
example has to wait, and none comes out differently on a busy machine. No clock is changed.
"""

from __future__ import annotations

import hashlib
import math
import re
import time
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any, Final, TypeVar
from unittest.mock import patch
from uuid import UUID

import gevent
import redis
import redis.exceptions
from gevent.event import Event
from gevent.queue import Queue
from sqlalchemy.orm import Session

import webapp.streams.log
from tests.integration.world import RecordingQueue, World
from webapp.app import make_token_log
from webapp.config import Settings
from webapp.database import Database
from webapp.errors import Unavailable
from webapp.streams.events import DONE_SEQ, Position
from webapp.streams.follow import Follower
from webapp.streams.hub import Signal
from webapp.streams.lifecycle import TerminationReason
from webapp.streams.manager import StreamSessionManager
from webapp.streams.queries import SessionQueries
from webapp.streams.recovery import Reaper
from workers.keeper import Keeper
from workers.ollama import ChatEnd, ChatRequest, UpstreamError
from workers.runtime import Runtime

T = TypeVar("T")

_LUA: Final = sorted((Path(webapp.streams.log.__file__).parent / "lua").glob("*.lua"))
_VERBS: Final = {hashlib.sha1(path.read_bytes(), usedforsecurity=False).hexdigest(): path.stem for path in _LUA}
_CHANGES: Final = frozenset([*_VERBS.values(), "multi"])
_NOT_STEPS: Final = frozenset(["TIME", "PING", "SCRIPT LOAD"])
TOKEN: Final = re.compile(r"(\d+)([^\W\d_]) ")
"""What the played model says: a number and the letter of the request that it answers, so no two texts are alike."""


class Fate(Enum):
    """What becomes of a turn."""

    DONE = "done"
    REFUSED = "fails"
    LOST = "done, its answer lost"
    TWICE = "done twice"  # as redis-py does that has lost an answer
    DEATH_BEFORE = "its process dies before it"
    DEATH_AFTER = "done, and its process dies"


@dataclass(eq=False)
class Turn:
    """A call that a greenlet is about to make, or a pause of it."""

    process: Process
    role: str
    kind: str
    label: str
    fate: Fate = Fate.DONE
    taken: Event = field(default_factory=Event)

    @property
    def is_pause(self) -> bool:
        return self.kind == "pause"

    @property
    def is_idle(self) -> bool:
        """A pause that nothing waits for: a keeper's, a reader's, or that of a caller who has no reason to look up."""
        return self.is_pause and (self.label == "hear" or self.role == "leases")

    @property
    def changes(self) -> bool:
        """Whether the call may write something."""
        return self.label.startswith("write") or self.label in _CHANGES

    def __repr__(self) -> str:
        return f"{self.process.name}.{self.role}: {self.label}"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))


class Stage:
    """The turns that wait, and the processes that are there."""

    def __init__(self, world: World, pool: redis.ConnectionPool) -> None:
        self.world = world
        self.pool = pool
        self.queue = RecordingQueue()
        self.turns: list[Turn] = []
        self.processes: list[Process] = []
        self.upstreams: list[Upstream] = []
        self.redis_is_away = False
        self.told: Callable[[str], None] = lambda line: None
        """Told of each turn that is taken."""

    def take(self, turn: Turn, fate: Fate = Fate.DONE) -> None:
        """Let one turn happen, and everything that follows from it before the next."""
        self.told(f"{turn!r}" + ("" if fate is Fate.DONE else f" [{fate.value}]"))
        if fate is Fate.DEATH_BEFORE:
            turn.process.kill()
            return
        self.turns.remove(turn)
        turn.fate = fate
        turn.taken.set()
        self.settle()
        if fate is Fate.DEATH_AFTER:
            turn.process.kill()

    def settle(self) -> None:
        """Until every greenlet waits for a turn, or for another greenlet."""
        gevent.idle()

    def call(self, process: Process, kind: str, label: str, action: Callable[[], T]) -> T:
        """Make a call when its turn has come; for a process off stage, at once."""
        if process.free and kind != "pause":
            return action()
        if process.dead:
            raise gevent.GreenletExit
        turn = Turn(process, getattr(gevent.getcurrent(), "role", "main"), kind, label)
        self.turns.append(turn)
        try:
            turn.taken.wait()
        finally:
            if turn in self.turns:
                self.turns.remove(turn)
        if process.dead:
            raise gevent.GreenletExit
        return self._befall(turn, action)

    def _befall(self, turn: Turn, action: Callable[[], T]) -> T:
        if turn.kind == "redis" and self.redis_is_away:
            raise redis.exceptions.ConnectionError("Redis is away")
        failure = redis.exceptions.TimeoutError("lost") if turn.kind == "redis" else Unavailable("lost")
        if turn.fate is Fate.REFUSED:
            raise failure
        result = action()
        if turn.fate is Fate.LOST:
            raise failure
        if turn.fate is Fate.TWICE:
            return action()
        if turn.fate is Fate.DEATH_AFTER:
            turn.process.dead = True
            raise gevent.GreenletExit
        return result

    def close(self) -> None:
        """End every greenlet."""
        kill(self.processes)


class Process:
    """One process: its connections, its manager, and the greenlets that it runs. It dies as a whole."""

    def __init__(self, stage: Stage, name: str, *, settings: Settings | None = None, free: bool = False) -> None:
        self.stage = stage
        self.name = name
        self.free = free
        """Whether only its pauses are turns."""
        self.dead = False
        self.is_impatient = False
        """Whether what it waits for with a time-out has lasted too long."""
        self.greenlets: list[gevent.Greenlet] = []
        self.settings = settings or stage.world.settings
        self.database = SteppedDatabase(self)
        self.redis = SteppedRedis(self)
        self.log = make_token_log(self.redis, self.settings)
        self.queries = SessionQueries(self.database, self.log)
        self.manager = StreamSessionManager(self.database, self.log, self.stage.queue, self.settings, self.queries)  # type: ignore[arg-type]
        self.manager.wait_done = self._wait_done
        stage.processes.append(self)

    def run(self, role: str, action: Callable[..., object], *args: object) -> gevent.Greenlet:
        """Start a greenlet of this process; returns it once it waits."""
        greenlet = self.spawn(role, action, *args)
        self.stage.settle()
        return greenlet

    def spawn(self, role: str, action: Callable[..., object], *args: object) -> gevent.Greenlet:
        greenlet = gevent.Greenlet(action, *args)
        greenlet.role, greenlet.process = role, self
        self.greenlets.append(greenlet)
        greenlet.start()
        return greenlet

    def pause(self, label: str) -> None:
        """Wait until the director goes on."""
        self.stage.call(self, "pause", label, lambda: None)

    def kill(self) -> None:
        """Die, wherever each greenlet is; what they would do on their way out does not get anywhere."""
        kill([self])

    @property
    def is_running(self) -> bool:
        """Whether one of its greenlets has not ended; those of a worker that serve all sessions do not count."""
        return any(not one.dead and one.role not in Worker.LOOPS for one in self.greenlets)

    def lose_patience(self) -> None:
        """What it waits for with a time-out has lasted too long."""
        self.is_impatient = True

    def _wait_done(self, session_id: UUID, timeout_seconds: float) -> bool:
        self.pause("wait")
        last = None if self.stage.redis_is_away else self.stage.world.log.last_position(session_id)
        return last is not None and last.seq == DONE_SEQ


def kill(processes: Sequence[Process]) -> None:
    """Have processes die, all at once."""
    for process in processes:
        process.dead = True
    while left := [one for process in processes for one in process.greenlets if not one.dead]:
        gevent.killall(left, block=False)  # again, where one waits for another on its way out
        gevent.idle()


class Worker(Process):
    """A worker process: the real runtime, over an upstream that is played."""

    LOOPS: Final = ("flusher", "leases", "heartbeats")

    def __init__(self, stage: Stage, name: str, settings: Settings) -> None:
        super().__init__(stage, name, settings=settings)
        services = replace(
            stage.world.services, settings=self.settings, manager=self.manager, log=self.log, queue=stage.queue
        )  # type: ignore[arg-type]
        with ExitStack() as stack:
            stack.enter_context(patch("workers.runtime.make_redis", lambda settings: self.redis))
            stack.enter_context(patch("workers.runtime.OllamaService", lambda *_, **__: self))
            stack.enter_context(patch("workers.runtime.Keeper", self._make_keeper))
            stack.enter_context(_as(self))
            self.runtime = Runtime(services)
        stage.settle()

    def _make_keeper(self, *args: Any) -> Keeper:
        self.keeper = Keeper(*args)
        return self.keeper

    def beat(self) -> None:
        """A heartbeat is due: what it says is fixed now, and written when its turn comes."""
        self.keeper.beat_soon()
        self.stage.settle()

    def deliver(self, session_id: UUID) -> None:
        """Celery's message comes."""
        self.run("task", self.runtime.run, session_id, self.name)

    def lose_patience(self) -> None:
        super().lose_patience()
        for generation in self.runtime.table.values():
            generation._flushed.set()
        self.stage.settle()

    def chat(self, request: ChatRequest, on_text: Callable[[str, str], None], on_open: Callable[[], None]) -> ChatEnd:
        """As `OllamaService.chat`: what is said is what the director says."""
        upstream = Upstream(self, len(self.stage.upstreams), request)
        self.stage.upstreams.append(upstream)
        on_open()
        try:
            while isinstance(said := upstream.inbox.get(), tuple):
                on_text(*said)
            if said is TerminationReason.UPSTREAM_ERROR:
                raise UpstreamError("The model's server broke off")
            return ChatEnd(said, {"eval_count": upstream.count})
        finally:
            upstream.is_open = False


class Upstream:
    """One request to the model: it counts on from where the partial answer stops."""

    def __init__(self, process: Process, number: int, request: ChatRequest) -> None:
        last = request.messages[-1]
        self.process = process
        self.letter = chr(0x1D51E + number)  # beyond the Basic Multilingual Plane: code points are no bytes, nor UTF-16
        self.prefill = self.content = last["content"] if last["role"] == "assistant" else ""
        self.count = len(TOKEN.findall(self.content))
        self.thoughts = 0
        self.inbox: Queue = Queue()
        self.is_open = True
        self.ended_as: TerminationReason | None = None

    def think(self) -> None:
        """One more token of thinking."""
        self.thoughts += 1
        self.inbox.put((f"{self.thoughts}{self.letter} ", ""))
        self.process.stage.settle()

    def say(self) -> None:
        """One more token of content."""
        self.count += 1
        token = f"{self.count}{self.letter} "
        self.content += token
        self.inbox.put(("", token))
        self.process.stage.settle()

    def end(self, reason: TerminationReason) -> None:
        """Come to an end, or break off."""
        self.ended_as = reason
        self.inbox.put(reason)
        self.process.stage.settle()

    def __repr__(self) -> str:
        return f"model {self.letter} of {self.process.name}"


class Reader(Process):
    """A reader over the real follower; it reads the log whenever it is told that there is news."""

    def __init__(self, stage: Stage, name: str, session_id: UUID, cursor: Position, *, free: bool) -> None:
        super().__init__(stage, name, free=free)
        self.session_id = session_id
        self.follower = Follower(
            replace(stage.world.queries.view(session_id)),
            cursor,
            queries=self.queries,
            token_log=self.log,
            hub=self,  # type: ignore[arg-type]
            settings=self.settings,
        )
        self.hears_of_the_end = False
        """Whether the hub has asked the database about this stream; else only the log tells."""

    # As `StreamHub`, for one follower

    @property
    def healthy(self) -> bool:
        return self.free or not self.stage.redis_is_away

    def arrive(self, session_id: UUID, *, abandonable: bool) -> None:
        pass

    def leave(self, session_id: UUID) -> None:
        pass

    def attach(self, session_id: UUID, last: Position) -> tuple[Reader, Position]:
        return self, last

    def detach(self, session_id: UUID, subscription: Reader) -> None:
        pass

    def wait_for_redis(self, session_id: UUID) -> Reader:
        return self

    def wait_no_longer(self, subscription: Reader) -> None:
        pass

    def take(self, timeout_seconds: float) -> tuple[list[Any], Signal | None]:
        self.pause("hear")
        if self.hears_of_the_end:
            return [], Signal.ENDED
        return [], Signal.BEHIND if self.healthy else None


class SteppedDatabase(Database):
    """A process's database: every transaction is a turn."""

    def __init__(self, process: Process) -> None:
        vars(self).update(vars(process.stage.world.database))
        self._process = process

    def read(self, work: Callable[[Session], T], **more: Any) -> T:
        run = super().read
        return self._step("read", work, lambda: run(work, **more))

    def write(self, work: Callable[[Session], T], **more: Any) -> T:
        run = super().write
        return self._step("write", work, lambda: run(work, **more))

    def write_one(self, work: Callable[[Session], T]) -> T:
        run = super().write_one
        return self._step("write", work, lambda: run(work))

    def _step(self, way: str, work: Callable[[Session], T], action: Callable[[], T]) -> T:
        names = [name for name in work.__qualname__.split(".") if name not in ("<lambda>", "<locals>", "work")]
        return self._process.stage.call(self._process, "database", f"{way} {names[-1].strip('_')}", action)


class SteppedRedis(redis.Redis):
    """A process's Redis: every command is a turn, also each of a pipeline; a transaction is one."""

    def __init__(self, process: Process) -> None:
        super().__init__(connection_pool=process.stage.pool)
        self._process = process

    def execute_command(self, *args: Any, **options: Any) -> Any:
        run = super().execute_command
        if args[0] in _NOT_STEPS:
            return run(*args, **options)
        label = _VERBS[args[1]] if args[0] == "EVALSHA" else f"read {args[0]}"
        return self._process.stage.call(self._process, "redis", label, lambda: run(*args, **options))

    def pipeline(self, transaction: bool = True, shard_hint: Any = None) -> Any:
        pipe = super().pipeline(transaction, shard_hint)
        whole = pipe.execute

        def one_by_one(raise_on_error: bool = True) -> list[Any]:
            return [self._one(args, options, raise_on_error) for args, options in pipe.command_stack]

        def at_once(raise_on_error: bool = True) -> Any:
            return self._process.stage.call(self._process, "redis", "multi", lambda: whole(raise_on_error))

        pipe.execute = at_once if transaction else one_by_one
        return pipe

    def _one(self, args: Any, options: Any, raise_on_error: bool) -> Any:
        try:
            return self.execute_command(*args, **options)
        except redis.exceptions.ResponseError as error:
            if raise_on_error:
                raise
            return error


class Patience(float):
    """A time-out, in seconds, that is over when the director says so: added to a moment it makes a `Deadline`."""

    def __radd__(self, moment: float) -> Deadline:
        return Deadline(math.inf)


class Deadline(float):
    """Over when its process is out of patience."""

    @property
    def _is_over(self) -> bool:
        return bool(getattr(_process_here(), "is_impatient", False))

    def __gt__(self, moment: float) -> bool:
        return not self._is_over

    def __lt__(self, moment: float) -> bool:
        return self._is_over

    def __sub__(self, moment: float) -> float:
        return 0.0 if self._is_over else 3600.0


_building: list[Process] = []


@contextmanager
def _as(process: Process) -> Iterator[None]:
    _building.append(process)
    yield
    _building.pop()


def _process_here() -> Process | None:
    return _building[-1] if _building else getattr(gevent.getcurrent(), "process", None)


def _spawn(action: Callable[..., object], *args: Any) -> gevent.Greenlet:
    """`gevent.spawn` of the product: the new greenlet is its process's, and named after what it runs."""
    names = [one if isinstance(one, str) else getattr(one, "__name__", "") for one in args]
    process = _process_here()
    assert process is not None
    return process.spawn(next((name.strip("_") for name in names if name), "other"), action, *args)


def _sleep(seconds: float) -> None:
    process = _process_here()
    assert process is not None
    process.pause("sleep")


def _without_sleep() -> types.ModuleType:
    stand_in = types.ModuleType("time")
    stand_in.__dict__.update(vars(time) | {"sleep": _sleep})
    return stand_in


@contextmanager
def on_stage() -> Iterator[None]:
    """Have the product's sleeps and greenlets be the stage's, its time-outs the director's, and its errors nobody's."""
    stand_in = types.ModuleType("gevent")
    stand_in.__dict__.update(gevent.__dict__ | {"spawn": _spawn, "sleep": _sleep})
    hub = gevent.get_hub()
    stream, hub.exception_stream = hub.exception_stream, None  # each greenlet's error is looked at in the end
    with ExitStack() as stack:
        for module in ("generate", "flusher", "keeper", "runtime"):
            stack.enter_context(patch(f"workers.{module}.gevent", stand_in))
        for module in ("follow", "manager"):
            stack.enter_context(patch(f"webapp.streams.{module}.time", _without_sleep()))
        for name in ("WITHOUT_REDIS_SECONDS", "GIVE_UP_SECONDS"):
            stack.enter_context(patch(f"workers.generate.{name}", Patience()))
        stack.enter_context(patch("webapp.streams.manager.WITHOUT_REDIS_WAIT_SECONDS", Patience()))
        stack.enter_context(patch("webapp.streams.recovery.PUBLISH_GRACE_SECONDS", 0))
        yield
    hub.exception_stream = stream


def load_scripts(client: redis.Redis) -> None:
    """Have Redis know every verb beforehand: the first call of one would else be two."""
    for path in _LUA:
        client.script_load(path.read_text(encoding="utf-8"))


def make_reaper(process: Process) -> Reaper:
    """A process's reaper, which removes nothing old."""
    with patch("webapp.streams.recovery.Retention", lambda *_: types.SimpleNamespace(sweep=dict)):
        return Reaper(process.database, process.log, process.manager, process.queries, process.settings)
