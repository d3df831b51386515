"""The whole stop protocol, explored: the real manager, reaper, worker and follower, a step at a time and in any order.

A step is one transaction or one Lua script, on a real SQLite and a real Valkey; only the model is played, and the hub.
`actors.py` makes each process wait for its turn, `claims.py` has what must hold. The machine below decides what happens
next: two workers (a third when one has died), two people who stop the stream for different reasons, passes of the
reaper, the web process that opens the log late, messages that come twice, a worker that stops, a reader who lags. A
witness reads all that is ever in the log. In the end everything is let run, and what was seen is held against what is
saved. Durations of the product are replaced, never a clock: see `actors.py`.

An example has one fault at most: a call to Redis or the database that fails, is done but not answered, or is done
twice; a process that dies before or after a call; a Redis that is emptied, or away; a worker that is only slow and is
taken for lost. With two of them, only the weaker claims are made: what was checkpointed stays, and all agree on one
ending.

`make fuzz-protocol` is the same with more examples: SLUICEGATE_FUZZ_EXAMPLES of them, SLUICEGATE_FUZZ_SECONDS at most,
and SLUICEGATE_FUZZ_SEED, which repeats a run.

What the machine said when one guard was taken out; 150 examples with one fault each, seed 7. The weights of the moves
were changed between some of these runs, so "found" means in at least one of them, and "rarely" not in every one.

| taken out | found | by the claim |
| --- | --- | --- |
| APPEND: at the log's end | rarely | the first fence's reason is committed |
| APPEND: not after the fence | yes | nothing is appended after the fence |
| APPEND: only at the state's epoch | yes | a log has one writer, its owner |
| APPEND: a state that is gone is ABSENT | yes | every key of a session has a TTL |
| FENCE: the first stays | yes | the first fence stays |
| FENCE: at the epoch that is named | not in 150, in 271 of another seed | only its owner comes to an answer's end |
| FENCE: the epoch, not named by a worker's end | rarely | only its owner comes to an answer's end |
| OPEN: raises the epoch | yes | what is checkpointed is in the log |
| OPEN: only if absent | yes | a log only grows |
| CLAIM: only what nobody owns, in the UPDATE and in the reading | yes | what is owned is not claimed |
| CLAIM: only while ACTIVE | yes | what has ended is not claimed |
| CLAIM: raises the epoch | yes | it comes to rest |
| COMMIT: only from ACTIVE | yes | a session ends once |
| COMMIT: after the fence (a worker's) | yes | the fence comes before the commit |
| COMMIT: after the fence (`settle`) | rarely | the fence comes before the commit |
| COMMIT: cut at the fence | yes | the committed text is cut at the fence |
| COMMIT: the fence's reason | yes | the first fence's reason is committed |
| RECORD: the first stays | yes | the first stop request stays on record |
| `done` after the commit | yes | done comes after the commit |
| the receipt is read from the row | yes | a caller has the same receipt |
| a checkpoint has acknowledged text only | yes | what is checkpointed is in the log |
| an answer's own end waits for its text, and names its end | yes | an answer's own end loses nothing |
| the heartbeat brings a recorded stop | rarely | it comes to rest |
| the heartbeat's news of a stop, and the lease's | not in 1,400; in 150 with one caller | it comes to rest |
| settling: a lost log is left to an owner that lives | after 1,050 | only its owner comes to an answer's end |
| a reader slices what it has seen a part of | yes | an id is the number of code points sent |

Not found:

- behind a second guard, as far as reading the code tells: CLAIM's `owner IS NULL` (the same transaction has read the
  owner), the end that FENCE expects (the text was flushed before), COMMIT's epoch (`finish` has read it; the window is
  one step), `finish` with the checkpoint and COMMIT's look at it (each does for the other), OPEN's FENCED (the next
  APPEND says so), a claim that settles a stop (OPEN says so), a lost worker's unanswered heartbeat (the lease says so),
  the lease's news of a fence (the heartbeat brings the stop; not in 1,350), a commit whose answer was lost and that is
  published all the same (the reaper does it; not in 1,300);
- for want of the right moment, as far as reading tells: the row asked before a rebuild (not in 1,000). Redis would have
  to be emptied when somebody who settles has read the log and not committed yet, and the owner to have made it anew
  and said more before that commit, without a heartbeat of its in between;
- without harm to a text: `published_at` once, RELEASE only while ACTIVE, FINISH's own fence;
- for no reason that is known, so more examples may find them: OPEN's epoch (nor in 700 of another seed), `done` once,
  the epochs of RELEASE and of a heartbeat, the heartbeat's start, COMMIT's epoch together with its reading (nor in
  700), the log read after OPEN, what was seen counting where Redis lost the fence, text after the stop, a handover
  that first writes all text, `settle` with the checkpoint and its look for a Redis emptied meanwhile, a reaper that
  looks again, the log's own TTL, a reader who sees gaps.

The last three rows, and the counts of 1,000 and more, are of runs of their own: from seed 7 on, in batches of 50, each
with the next seed. "With one caller": of three that call terminate, a later one mostly ends what its worker did not
hear of, so the budget was set to one.
"""

from __future__ import annotations

import os
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, TypeVar
from uuid import UUID

import pytest
import redis
import structlog
from hypothesis import HealthCheck, Phase, note, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from tests.integration.actors import (
    Fate,
    Patience,
    Process,
    Reader,
    Stage,
    Turn,
    Upstream,
    Worker,
    load_scripts,
    make_reaper,
    on_stage,
)
from tests.integration.claims import (
    NATURAL,
    STOPPERS,
    Seen,
    Violation,
    Watch,
    check_done,
    check_log,
    check_receipt,
    check_seen,
    check_text,
    require,
)
from tests.integration.world import World, make_settings, make_world
from tests.services import ValkeyServer
from webapp.config import Settings
from webapp.errors import Unavailable
from webapp.models import Member, db
from webapp.streams.events import START, Position
from webapp.streams.keys import state_key
from webapp.streams.lifecycle import TerminationReason
from webapp.streams.ports import NewMessage

T = TypeVar("T")
BUDGETS: Final = {"deliver": 4, "speak": 6, "terminate": 3, "keep": 6, "reap": 3, "hand_over": 1, "read": 4}
"""How often each may happen, so that most steps of an example are turns."""
FAULTS: Final = ["none", "call", "call", "call", "empty", "empty", "away", "slow", "slow", "slow"]
LONG_AGO: Final = "2001-01-01 00:00:00.000000"
ROUNDS: Final = 150
"""In which everything has to have come to rest, each process making a step in each."""
PATIENCE_ROUNDS: Final = 40
"""After which every time-out is over that somebody waits for."""


@dataclass
class Scene:
    """What all examples share."""

    world: World
    client: redis.Redis
    pool: redis.ConnectionPool
    path: str
    settings: dict[str, Settings]
    user_id: UUID
    errors: list[str] = field(default_factory=list)

    def clear(self) -> None:
        """Forget the last example."""
        self.errors.clear()
        self.client.flushall()
        with sqlite3.connect(self.path) as connection:
            for table in ("stream_sessions", "messages", Member.__tablename__, "conversations"):
                connection.execute(f"DELETE FROM {table}")
        connection.close()


@dataclass(frozen=True)
class Move:
    """Something that may happen."""

    weight: int
    is_possible: Callable[[Machine], object]
    act: Callable[[Machine], None]

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(self.act.__name__)


MOVES: list[Move] = []


def move(
    weight: int, when: Callable[[Machine], object]
) -> Callable[[Callable[[Machine], None]], Callable[[Machine], None]]:
    """Register what may happen: `weight` times as often as what has 1, where `when` holds."""

    def register(act: Callable[[Machine], None]) -> Callable[[Machine], None]:
        MOVES.append(Move(weight, when, act))
        return act

    return register


class Machine(RuleBasedStateMachine):
    """One session, from its message to its `done`, by every process that may have a hand in it."""

    scene: ClassVar[Scene]
    faults: ClassVar[int] = 1

    # -- the beginning -------------------------------------------------------------------------

    def __init__(self) -> None:
        super().__init__()
        scene = self.scene
        scene.clear()
        self.stage = Stage(scene.world, scene.pool)
        self.stage.told = note
        self.watch = Watch(scene.path, scene.client)
        self.workers: dict[str, Worker] = {}
        self.receipts: list[tuple[Process, Any]] = []
        self.budgets = Counter(BUDGETS)
        self.planned: list[str] = []
        self.has_failed = False
        self.readers: list[tuple[Reader, Seen]] = []
        self.witnesses: list[tuple[Reader, Seen]] = []
        self.spawned = 0
        self.session_id: Any = None

    @initialize(
        how_far=st.sampled_from([0, 1, 2, 3, 3, 4, 4]),
        on_worker_lost=st.sampled_from(["continue", "continue", "continue", "keep"]),
        plan=st.data(),
    )
    def begin(self, how_far: int, on_worker_lost: str, plan: st.DataObject) -> None:
        """A message is sent: its row is written. Then it is opened and queued, taken by a worker, answered in part."""
        self._data = plan
        self.planned = [self._pick(FAULTS) for _ in range(self.faults)]
        self.settings = self.scene.settings[on_worker_lost]
        web = Process(self.stage, "web", settings=self.settings)
        web.run("start", web.manager.start, NewMessage(user_id=self.scene.user_id, content="Count", model="a-model"))
        while not (found := self.watch.session_ids()):
            self.stage.take(self.stage.turns[0])
        self.session_id = found[0]
        self.watch.begin(self.session_id)
        self.witnesses.append(self._reader("witness", START, free=True))
        if how_far > 0:
            self._run_all()
        if how_far > 1:
            self._worker("w1").deliver(self.session_id)
            self._run_all()
        for _ in range(2, how_far):
            self.stage.upstreams[0].say()
            self._run_all()

    def _run_all(self) -> None:
        """All that can be done now, in turn."""
        while turns := self._open_turns():
            self._take(turns[0])

    def _reader(self, name: str, cursor: Position, *, free: bool = False) -> tuple[Reader, Seen]:
        reader = Reader(self.stage, name, self.session_id, cursor, free=free)
        seen = Seen(cursor=cursor, may_lose=self.faults > 1)

        def read() -> None:
            for piece in reader.follower.events():
                seen.take(piece)

        reader.greenlet = reader.run("read", read)
        return reader, seen

    def _may(self, what: str) -> bool:
        return self.budgets[what] > 0

    def _spend(self, what: str) -> None:
        self.budgets[what] -= 1

    def _may_fail(self, how: str) -> bool:
        return how in self.planned

    def _fail(self, how: str) -> None:
        self.planned.remove(how)
        self.has_failed = True

    def _worker(self, name: str) -> Worker:
        if name not in self.workers:
            self.workers[name] = Worker(self.stage, name, self.settings)
        return self.workers[name]

    @rule(data=st.data())
    def happen(self, data: st.DataObject) -> None:
        """One move, of those that are possible now.

        There is one rule, because Hypothesis takes all rules alike and leaves some out of each example: few examples
        would get anywhere.
        """
        self._data = data
        if moves := [one for one in MOVES if one.is_possible(self) for _ in range(one.weight)]:
            self._pick(moves).act(self)

    def _pick(self, options: Sequence[T]) -> T:
        return self._draw(st.sampled_from(options))

    def _draw(self, strategy: st.SearchStrategy[T]) -> T:
        return self._data.draw(strategy)

    # -- turns ---------------------------------------------------------------------------------

    def _open_turns(self) -> list[Turn]:
        return [turn for turn in self.stage.turns if not turn.is_idle and self._has_reason(turn)]

    def _has_reason(self, turn: Turn) -> bool:
        """A caller that waits looks up when `done` is there, or when it has waited long enough."""
        if not self._is_wait(turn):
            return True
        return turn.process.is_impatient or not self.watch.is_active

    def _is_wait(self, turn: Turn) -> bool:
        return turn.is_pause and turn.process.name in STOPPERS

    def _take(self, turn: Turn, fate: Fate = Fate.DONE) -> None:
        self.stage.take(turn, fate)
        if turn.changes and turn.kind == "redis":
            self.watch.look_at_redis(turn)
            if self.watch.log_has_changed:
                self._let_witnesses_read()
        elif turn.changes:
            self.watch.look_at_row(turn)
        self._raise_reader_errors()

    def _let_witnesses_read(self) -> None:
        for reader, _ in self.witnesses:
            for turn in [turn for turn in self.stage.turns if turn.process is reader]:
                self.stage.turns.remove(turn)
                turn.taken.set()
        self.stage.settle()

    def _raise_reader_errors(self) -> None:
        for reader, _ in self.witnesses + self.readers:
            error = reader.greenlet.exception
            if error is not None:
                raise error

    def _next_of(self, turn: Turn) -> Turn | None:
        """The turn at which the greenlet of `turn` waits now."""
        mine = [one for one in self._open_turns() if (one.process, one.role) == (turn.process, turn.role)]
        return mine[0] if mine else None

    def _go_on(self, turn: Turn, stop: Callable[[Turn], bool], limit: int = 40) -> None:
        """Take a turn, and the next of the same greenlet, until `stop`."""
        following: Turn | None = turn
        for _ in range(limit):
            if following is None:
                return
            self._take(following)
            following = self._next_of(turn)
            if following is None or stop(following):
                return

    @move(6, lambda self: self._open_turns())
    def step(self) -> None:
        """One turn."""
        self._take(self._pick(self._open_turns()))

    @move(6, lambda self: self._open_turns())
    def advance(self) -> None:
        """One turn, and on to the next that changes something."""
        self._go_on(self._pick(self._open_turns()), lambda turn: turn.changes or turn.is_pause)

    @move(4, lambda self: self._open_turns())
    def run_through(self) -> None:
        """One greenlet, for as long as it finds something to do."""
        self._go_on(self._pick(self._open_turns()), lambda turn: turn.is_pause)

    # -- what happens --------------------------------------------------------------------------

    @move(2, lambda self: self._may("deliver") and self._deliverable())
    def deliver(self) -> None:
        """Celery's message comes to a worker; again, perhaps, and late."""
        self._spend("deliver")
        worker = self._worker(self._pick(self._deliverable()))
        worker.deliver(self.session_id)

    def _deliverable(self) -> list[str]:
        """Workers that may get a message: the third is started when another has gone."""
        if not self.stage.queue.enqueued:
            return []
        names = ["w1", "w2"]
        dead = [name for name, worker in self.workers.items() if worker.dead]
        names += [f"w{n + 3}" for n in range(len(dead))]
        return [name for name in names if name not in dead and self.session_id not in self._table(name)]

    def _table(self, name: str) -> Any:
        return self.workers[name].runtime.table if name in self.workers else ()

    def _open_upstreams(self) -> list[Upstream]:
        return [one for one in self.stage.upstreams if one.is_open]

    @move(4, lambda self: self._may("speak") and self._open_upstreams())
    def speak(self) -> None:
        """A model says something; it may have thought before its first word."""
        thoughts = self._draw(st.integers(0, 1))
        tokens = self._draw(st.integers(1, 3))
        self._spend("speak")
        upstream = self._pick(self._open_upstreams())
        if thoughts and not upstream.content:
            upstream.think()
        for _ in range(tokens):
            upstream.say()

    @move(1, lambda self: self._open_upstreams())
    def end_of_answer(self) -> None:
        """A model comes to its end, or fails."""
        reason = self._draw(st.sampled_from(NATURAL))
        self._pick(self._open_upstreams()).end(reason)

    @move(2, lambda self: self._may("terminate"))
    def terminate(self) -> None:
        """Somebody asks for the end; one who is impatient does not wait for the worker's commit.

        That is also one who has waited long enough before his next turn.
        """
        who = self._draw(st.sampled_from(sorted(STOPPERS)))
        is_impatient = self._draw(st.booleans())
        self._spend("terminate")
        self._terminate(who, is_impatient)

    def _terminate(self, who: str, is_impatient: bool) -> None:
        caller = Process(self.stage, who, settings=self.settings)
        caller.is_impatient = is_impatient

        def ask() -> None:
            try:
                receipt = caller.manager.terminate(self.session_id, STOPPERS[who], who)
            except Unavailable as error:
                self.receipts.append((caller, error))
            else:
                self.receipts.append((caller, receipt))

        caller.run("terminate", ask)

    @move(2, lambda self: self.stage.queue.nudged)
    def nudge(self) -> None:
        """A nudge arrives; it need not."""
        session_id, owner, reason = self.stage.queue.nudged.pop()
        if owner in self.workers and not self.workers[owner].dead:
            self.workers[owner].runtime.stop(session_id, reason)
            self.stage.settle()

    @move(2, lambda self: self._may("keep") and self._keepers())
    def keep(self) -> None:
        """A worker's keeper makes up its mind what to write, and writes it; or has yet to write it."""
        self._spend("keep")
        keeper = self._pick(self._keepers())
        if isinstance(keeper, Worker):
            keeper.beat()
            return
        at_once = self._draw(st.booleans())
        self._take(keeper)
        if at_once and (following := self._next_of(keeper)):
            self._take(following)

    def _keepers(self) -> list[Turn | Worker]:
        """Lease renewals that may begin, and workers whose next heartbeat may."""
        leases = [turn for turn in self.stage.turns if turn.role == "leases" and turn.is_idle]
        beating = [turn.process for turn in self.stage.turns if turn.role == "heartbeats"]
        workers = [one for one in self.workers.values() if not one.dead and one not in beating]
        return [turn for turn in leases if self._runs(turn.process.name)] + [
            one for one in workers if self._runs(one.name)
        ]

    def _runs(self, name: str) -> bool:
        return self.session_id in self._table(name)

    @move(1, lambda self: self._may("reap") and self._reapers() < 2)
    def reap(self) -> None:
        """A pass of the reaper begins; long after the last, or not."""
        time_passes = self._draw(st.booleans())
        self._spend("reap")
        if time_passes:
            self._let_time_pass()
        self._reap()

    def _reapers(self) -> int:
        return sum(process.is_running for process in self.stage.processes if process.name.startswith("reaper"))

    def _reap(self) -> None:
        self.spawned += 1
        reaper = Process(self.stage, f"reaper{self.spawned}", settings=self.settings)
        reaper.run("reap", make_reaper(reaper).reap)

    def _let_time_pass(self) -> None:
        """What waits in the queue is due; an owner that has died has not been heard of for long."""
        self.watch.change("requeue_at = ?", LONG_AGO)
        owner = self.workers.get(self.watch.row["owner"] or "")
        if owner is None or owner.dead or not owner.is_running:
            self._age()

    def _age(self) -> None:
        self.watch.change("heartbeat_at = CASE WHEN owner IS NULL THEN heartbeat_at ELSE ? END", LONG_AGO)
        if self.watch.state and b"lease_us" in self.watch.state:
            self.scene.client.hset(state_key(self.session_id), "lease_us", 1)

    @move(
        1,
        lambda self: (
            self._may("hand_over")
            and self.session_id in [g for w in self.workers.values() if not w.dead for g in w.runtime.table]
        ),
    )
    def hand_over(self) -> None:
        """A worker stops, and gives up what it runs."""
        self._spend("hand_over")
        names = [name for name, one in self.workers.items() if not one.dead and one.runtime.table]
        worker = self.workers[self._pick(names)]
        for generation in worker.runtime.table.values():
            generation.hand_over()
        self.stage.settle()

    # -- readers -------------------------------------------------------------------------------

    @move(1, lambda self: self._may("read") and (not self.readers or self._listening()))
    def read(self) -> None:
        """A slow reader comes; or reads what there is since it read last."""
        self._spend("read")
        if not self.readers:
            self.readers.append(self._reader("reader", START))
            return
        turn = self._listening()[0]
        assert isinstance(turn.process, Reader)
        turn.process.hears_of_the_end = not self.watch.is_active and b"done" not in self.watch.state
        self._go_on(turn, lambda turn: turn.is_pause)

    def _listening(self) -> list[Turn]:
        return [turn for turn in self.stage.turns if turn.label == "hear" and not turn.process.free]

    # -- faults --------------------------------------------------------------------------------

    @move(5, lambda self: self._may_fail("call") and self._calls())
    def fault(self) -> None:
        """A call fails, or its answer is lost, or its process dies before or after it."""
        self._fail("call")
        label = self._pick(sorted({turn.label for turn in self._calls()}))
        turn = self._pick([turn for turn in self._calls() if turn.label == label])
        fate = self._pick([one for one in Fate if one is not Fate.DONE])
        if fate is Fate.TWICE and turn.kind != "redis":
            fate = Fate.LOST
        if turn.kind == "redis" and fate in (Fate.REFUSED, Fate.LOST):
            self.watch.redis_answered = False
        self._take(turn, fate)

    def _calls(self) -> list[Turn]:
        """Calls that wait; where any writes, those that do. None, where all belong to readers."""
        calls = [turn for turn in self.stage.turns if not turn.is_pause and not isinstance(turn.process, Reader)]
        writes = [turn for turn in calls if turn.changes and turn.label != "renew"]
        return writes or (calls if self.budgets["read"] == 0 else [])

    @move(2, lambda self: self._may_fail("empty") and self.watch.state)
    def empty_redis(self) -> None:
        """Redis loses everything."""
        self._fail("empty")
        self.scene.client.flushall()
        self.watch.forget_redis()

    @move(2, lambda self: self._may_fail("away") and not self.stage.redis_is_away)
    def lose_redis(self) -> None:
        """Redis cannot be reached for a while, which may be longer than an ending waits."""
        for_long = self._draw(st.booleans())
        self._fail("away")
        self.stage.redis_is_away = True
        self.watch.redis_was_reliable = False
        for worker in self.workers.values():
            if for_long and not worker.dead:
                worker.lose_patience()

    @move(1, lambda self: self.stage.redis_is_away)
    def find_redis(self) -> None:
        """Redis is back."""
        self._find_redis()

    def _find_redis(self) -> None:
        self.stage.redis_is_away = False
        for worker in self.workers.values():
            worker.is_impatient = False

    @move(5, lambda self: self._may_fail("slow") and self.watch.is_active and self.watch.row["owner"])
    def mistake_for_lost(self) -> None:
        """An owner that is only slow is not heard of for long; the reaper sees it, and another may take over."""
        how_far = self._pick([0, 1, 2, 3, 3, 3, 3])
        self._fail("slow")
        self._age()
        if how_far > 0:
            before = list(self.stage.turns)
            self._reap()
            reaper = next((turn for turn in self.stage.turns if turn not in before), None)
            if reaper is not None:
                self._go_on(reaper, lambda turn: False)
        if how_far > 1 and self._deliverable():
            worker = self._worker(self._pick(self._deliverable()))
            worker.deliver(self.session_id)
            for turn in [turn for turn in self._open_turns() if turn.process is worker and how_far > 2]:
                self._go_on(turn, lambda turn: False)

    # -- the end -------------------------------------------------------------------------------

    def teardown(self) -> None:
        try:
            if self.session_id is not None and sys.exc_info()[0] is None:
                note("-- the rest, in turn --")
                self._find_redis()
                self._come_to_rest()
                self._check()
        finally:
            self.stage.close()
            self.watch.close()

    def _come_to_rest(self) -> None:
        for round_number in range(ROUNDS):
            if self._is_at_rest():
                return
            for turn in list(self.stage.turns):
                if turn in self.stage.turns and not turn.process.free and self._is_worth_it(turn, round_number):
                    if isinstance(turn.process, Reader):
                        turn.process.hears_of_the_end = not self.watch.is_active
                    self._take(turn)
            if round_number % 3 == 0:
                for worker in [one for one in self.workers.values() if not one.dead]:
                    worker.beat()
            if round_number == PATIENCE_ROUNDS:
                for process in self.stage.processes:
                    process.lose_patience()
            self._push(round_number)
        left = [repr(turn) for turn in self.stage.turns if not turn.is_idle]
        raise Violation(f"it comes to rest; there are {left}, {self._open_upstreams()}, {self.watch.row}")

    def _is_worth_it(self, turn: Turn, round_number: int) -> bool:
        if isinstance(turn.process, Reader):
            return self.watch.row["published_at"] is not None or not turn.is_idle
        return not turn.is_idle or round_number % 3 == 0

    def _is_at_rest(self) -> bool:
        row = self.watch.row
        if row["status"] == "ACTIVE" or row["published_at"] is None or self._open_upstreams():
            return False
        return not any(one.is_running for one in self.stage.processes if not (one.free or one.dead))

    def _push(self, round_number: int) -> None:
        """What happens sooner or later."""
        row = self.watch.row
        running = [name for name, one in self.workers.items() if not one.dead and one.runtime.table]
        if row["stop_reason"] is None and b"fence" not in self.watch.state and round_number > 5:
            for upstream in self._open_upstreams():
                upstream.end(TerminationReason.STOP)
        owned_by_none_alive = row["owner"] is None or row["owner"] not in running
        if not self._reapers() and (row["published_at"] is None if row["status"] != "ACTIVE" else owned_by_none_alive):
            self._let_time_pass()
            self._reap()
        if row["status"] == "ACTIVE" and row["owner"] is None and not running and self._deliverable():
            self._worker(self._deliverable()[0]).deliver(self.session_id)

    def _check(self) -> None:
        check_text(self.watch, self.stage.upstreams)
        receipt = self.scene.world.queries.receipt(self.session_id)
        check_receipt(self.watch, receipt)
        for caller, answer in self.receipts:
            # Without a fault, only one who has waited for a worker long enough may be told that it does not answer.
            may_be_refused = self.has_failed or caller.is_impatient
            is_right = may_be_refused if isinstance(answer, Unavailable) else answer == receipt
            require(is_right, f"{caller.name} gets {receipt}, and not {answer!r}")
        check_log(self.scene.world.entries(self.session_id))
        self._check_readers()
        self._check_processes()

    def _check_readers(self) -> None:
        self._let_witnesses_end()
        late = self._reader("late", START, free=True)
        for reader, seen in [*self.witnesses, *self.readers, late]:
            if self.faults == 1:
                check_seen(self.watch, reader.name, seen)
            check_done(self.watch, seen)

    def _let_witnesses_end(self) -> None:
        for reader, seen in self.witnesses:
            if seen.done is None:
                reader.hears_of_the_end = True
        self._let_witnesses_read()
        self._raise_reader_errors()

    def _check_processes(self) -> None:
        for process in self.stage.processes:
            for greenlet in process.greenlets:
                error = greenlet.exception
                expected = isinstance(error, Unavailable | redis.RedisError) and self.has_failed
                require(error is None or expected, f"{process.name} fails: {error!r}")
        require(self.faults > 1 or not self.scene.errors, f"logged: {self.scene.errors}")


class TwoFaults(Machine):
    """Two at once may cost the text since the last checkpoint, and nothing else."""

    faults = 2


# -- the tests ---------------------------------------------------------------------------------

EXAMPLES = int(os.environ.get("SLUICEGATE_FUZZ_EXAMPLES", "100"))
SECONDS = int(os.environ.get("SLUICEGATE_FUZZ_SECONDS", "7200"))
SEED = int(os.environ.get("SLUICEGATE_FUZZ_SEED", "7"))
STEPS: Final = 40
BATCH: Final = 250
"""Examples between two looks at the clock, each batch with the next seed."""


@pytest.fixture(scope="module")
def scene(valkey: ValkeyServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """One SQLite file and one Valkey for all examples."""
    directory = tmp_path_factory.mktemp("machine")
    path = directory / "machine.db"
    slow = {"heartbeat_seconds": 3600, "lease_seconds": 3600}  # time passes when the machine says so
    base = make_settings(f"sqlite:///{path}", valkey.url, directory, checkpoint_seconds=1e-6, **slow)
    variants = {
        on_lost: base.model_copy(update={"terminate_wait_seconds": Patience(3), "on_worker_lost": on_lost})
        for on_lost in ("continue", "keep")
    }
    world = make_world(base)
    db.metadata.create_all(world.database.engine)
    with redis.Redis.from_url(valkey.url) as client:
        load_scripts(client)
        made = Scene(world, client, redis.ConnectionPool.from_url(valkey.url), str(path), variants, world.user())
        with on_stage(), _errors_in(made.errors):
            yield made
    world.close()


@contextmanager
def _errors_in(errors: list[str]) -> Iterator[None]:
    """Nothing is logged; what would be as an error is kept."""

    def keep(_: Any, level: str, event: dict[str, Any]) -> Any:
        if level in ("error", "exception", "critical"):
            errors.append(str({name: value for name, value in event.items() if name != "exc_info"}))
        raise structlog.DropEvent

    before = structlog.get_config()
    structlog.configure(processors=[keep])
    yield
    structlog.configure(**before)


def explore(machine: type[Machine], scene: Scene) -> None:
    """Run so many examples (a quarter with two faults), or for so long, a batch after another."""
    until = time.monotonic() + SECONDS
    examples = EXAMPLES // machine.faults**2
    for number, first in enumerate(range(0, examples, BATCH)):
        if number and time.monotonic() > until:
            return
        how = settings(
            max_examples=min(BATCH, examples - first),
            stateful_step_count=STEPS,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],
        )
        run = seed(SEED + number)(type(machine.__name__, (machine,), {"scene": scene}))
        run_state_machine_as_test(run, settings=how)


@pytest.mark.timeout(SECONDS + 600)
@pytest.mark.parametrize("machine", [Machine, TwoFaults], ids=["one-fault", "two-faults"])
def test_the_claims_hold_in_any_order_of_steps(scene: Scene, machine: type[Machine]) -> None:
    explore(machine, scene)
