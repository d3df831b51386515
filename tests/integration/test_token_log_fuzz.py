"""The token log's verbs are called in any order, with any arguments, and answer as a plain model of a log does.

`make fuzz-log` is the same with more examples and another seed: SLUICEGATE_FUZZ_EXAMPLES sequences of verbs, and
SLUICEGATE_FUZZ_SEED, which repeats a run.

Lua's numbers are doubles. Epochs and positions are compared by them, and so exact up to 2**53; positions stay below
10**15, for a cursor has no more digits, and epochs are a column of 32 bits.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from uuid import UUID

import pytest
import redis
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from redis.exceptions import ResponseError

from tests.services import ValkeyServer
from webapp.models import new_id
from webapp.streams.events import DONE, DONE_SEQ, MESSAGE, PHASE, THINKING, phase_data
from webapp.streams.keys import log_key, state_key
from webapp.streams.lifecycle import StreamPhase, TerminationReason
from webapp.streams.log import Answer, Append, LogState, Mark, TokenLog, Verdict

EXAMPLES: Final = int(os.environ.get("SLUICEGATE_FUZZ_EXAMPLES", "200"))
SEED: Final = int(os.environ.get("SLUICEGATE_FUZZ_SEED", "7"))
LIVE_SECONDS: Final = 600
RETENTION_SECONDS: Final = 60
FAR: Final = 10**15 - 100
"""As far as a position may be, and some appends more."""


class Broken(Exception):
    """The model's word for a verb that finds keys which are not ours: it does nothing."""


@dataclass
class State:
    """What the state hash holds."""

    epoch: int
    end: int = 0
    thinking_length: int = 0
    seq: int = 0
    phase: StreamPhase = StreamPhase.QUEUED
    marked: int | None = None
    fence: TerminationReason | None = None
    fenced_us: int | None = None
    """None: by a FENCE whose time the model does not know yet."""
    done: bool = False
    leased: bool = False


Entry = tuple[tuple[int, int], str, str | bytes]


@dataclass
class Model:
    """A token log as its documentation has it. Each verb answers `Answer`, or raises `Broken`."""

    state: State | None = None
    entries: list[Entry] = field(default_factory=list)
    damaged: set[str] = field(default_factory=set)

    def _look(self) -> State | None:
        if "state" in self.damaged:
            raise Broken
        return self.state

    def _add(self, position: tuple[int, int], kind: str, value: str | bytes) -> None:
        if "log" in self.damaged or position <= (self.entries[-1][0] if self.entries else (0, 0)):
            raise Broken
        self.entries.append((position, kind, value))

    def _refusal(self, state: State | None, epoch: int) -> Answer | None:
        """Why a worker of this epoch may not go on, if it may not."""
        if state is None or state.epoch < epoch:
            return Answer(Verdict.ABSENT)
        if state.epoch > epoch:
            return Answer(Verdict.STALE)
        return self._fenced(state)

    @staticmethod
    def _fenced(state: State) -> Answer | None:
        if state.fence is None:
            return None
        return Answer(Verdict.FENCED, state.end, state.thinking_length, state.fence, state.fenced_us or 0)

    def open(self, epoch: int) -> Answer:
        state = self._look()
        if state is None:
            self.state, self.entries = State(epoch), []
            self.damaged.discard("log")
            return Answer(Verdict.OK)
        if state.epoch > epoch:
            return Answer(Verdict.STALE)
        state.epoch = epoch
        return self._fenced(state) or Answer(Verdict.OK, state.end, state.thinking_length)

    def rebuild(self, epoch: int, pieces: Sequence[Append]) -> Answer:
        state = self._look()
        if state is not None and state.epoch > epoch:
            return Answer(Verdict.STALE)
        if state is None or state.epoch < epoch:
            self.damaged.discard("log")
            state = self.state = State(epoch)
            self._write(pieces)
        return self._fenced(state) or Answer(Verdict.OK, state.end, state.thinking_length)

    def _write(self, pieces: Sequence[Append]) -> None:
        assert self.state is not None
        self.entries = []
        for piece in pieces:
            self._add((piece.end, 0), piece.kind, piece.text)
            self.state.end = piece.end
            if piece.kind == THINKING:
                self.state.thinking_length = piece.end

    def append(self, piece: Append) -> Answer:
        state = self._look()
        if (refusal := self._refusal(state, piece.epoch)) is not None:
            return refusal
        assert state is not None
        if piece.start != state.end:
            return Answer(Verdict.BEHIND, state.end, state.thinking_length)
        self._add((piece.end, 0), piece.kind, piece.text)
        state.end, state.seq = piece.end, 0
        if piece.kind == THINKING:
            state.thinking_length = piece.end
        return Answer(Verdict.OK, piece.end)

    def mark(self, mark: Mark) -> Answer:
        state = self._look()
        if (refusal := self._refusal(state, mark.epoch)) is not None:
            return refusal
        assert state is not None
        if (state.phase, state.marked) != (mark.phase, mark.epoch):
            self._add((state.end, state.seq + 1), PHASE, phase_data(mark.phase.value, mark.attempt))
            state.seq, state.phase, state.marked = state.seq + 1, mark.phase, mark.epoch
        return Answer(Verdict.OK, state.end)

    def fence(self, reason: TerminationReason, epoch: int | None, expected_end: int | None) -> Answer:
        state = self._look()
        if state is None or (epoch is not None and state.epoch < epoch):
            return Answer(Verdict.ABSENT)
        if epoch is not None and state.epoch > epoch:
            return Answer(Verdict.STALE)
        if (fenced := self._fenced(state)) is not None:
            return fenced
        if expected_end not in (None, state.end):
            return Answer(Verdict.BEHIND, state.end, state.thinking_length)
        state.fence = reason
        return Answer(Verdict.OK, state.end, state.thinking_length, reason)

    def finish(
        self, length: int, data: bytes, reason: TerminationReason, lost: tuple[int, Sequence[Append]] | None
    ) -> Answer:
        state = self._look()
        if state is None:
            if lost is None:
                return Answer(Verdict.ABSENT)
            self.damaged.discard("log")
            state = self.state = State(lost[0])
            self._write(lost[1])
            state.end = length
        elif state.end > length:
            return Answer(Verdict.BEHIND, state.end)
        if not state.done:
            self._add((length, DONE_SEQ), DONE, data)
            state.done = True
        if state.fence is None:
            state.fence, state.fenced_us = reason, 0
        return Answer(Verdict.OK, length)

    def renew(self, epoch: int) -> Answer | None:
        state = self._look()
        refusal = self._refusal(state, epoch)
        if state is not None and state.epoch == epoch:
            state.leased = True
        return refusal


class Pair:
    """The real log and its model, which are told the same and must answer the same."""

    def __init__(self, client: redis.Redis) -> None:
        self.redis = client
        self.verbs = TokenLog(client, live_seconds=LIVE_SECONDS, retention_seconds=RETENTION_SECONDS)
        self.id: UUID = new_id()
        self.model = Model()

    def run(self, operation: tuple[Any, ...]) -> None:
        """One operation of `operations`, on both."""
        getattr(self, "_" + operation[0])(*operation[1:])

    def _agree(
        self, real: Callable[[], Answer | None], modelled: Callable[[], Answer | None], *, may_raise: bool = False
    ) -> None:
        try:
            expected = modelled()
        except Broken:
            expected = Answer(Verdict.BROKEN)
        try:
            answer = real()
        except ResponseError:
            assert may_raise, "a verb that is called for many sessions at once must not fail because of one"
            answer = Answer(Verdict.BROKEN)
        if answer is not None and expected is not None and answer.verdict is expected.verdict is Verdict.OK:
            self._learn_time(answer)
            expected = Answer(Verdict.OK, expected.end, expected.thinking_length, expected.reason, answer.fenced_us)
        assert answer == expected

    def _learn_time(self, answer: Answer) -> None:
        state = self.model.state
        if answer.reason is not None and state is not None and state.fenced_us is None:
            assert answer.fenced_us > 1_600_000_000_000_000
            state.fenced_us = answer.fenced_us

    def _open(self, epoch: int | str) -> None:
        epoch = self._epoch(epoch)
        self._agree(
            lambda: self.verbs.open(self.id, epoch, "worker@one"), lambda: self.model.open(epoch), may_raise=True
        )

    def _rebuild(self, epoch: int | str, start: int, texts: list[tuple[str, str]]) -> None:
        epoch = self._epoch(epoch)
        pieces = self._pieces(epoch, start, texts)
        self._agree(
            lambda: self.verbs.rebuild(self.id, epoch, "worker@one", pieces, live_seconds=LIVE_SECONDS),
            lambda: self.model.rebuild(epoch, pieces),
        )

    def _pieces(self, epoch: int, start: int, texts: list[tuple[str, str]]) -> list[Append]:
        pieces = []
        for kind, text in texts:
            pieces.append(Append(self.id, epoch, start, kind, text))
            start = pieces[-1].end
        return pieces

    def _append(self, epoch: int | str, off: int, kind: str, text: str) -> None:
        piece = Append(self.id, self._epoch(epoch), self._end() + off, kind, text)
        self._agree(lambda: self.verbs.append(piece), lambda: self.model.append(piece))

    def _mark(self, epoch: int | str, phase: StreamPhase, attempt: int) -> None:
        mark = Mark(self.id, self._epoch(epoch), phase, attempt)
        self._agree(lambda: self.verbs.mark(mark), lambda: self.model.mark(mark))

    def _fence(self, reason: TerminationReason, epoch: int | None, off: int | None) -> None:
        end = None if off is None else self._end() + off
        epoch = None if epoch is None else self._epoch(epoch)
        self._agree(
            lambda: self.verbs.fence(self.id, reason, epoch=epoch, expected_end=end),
            lambda: self.model.fence(reason, epoch, end),
            may_raise=True,
        )

    def _finish(self, off: int, data: bytes, reason: TerminationReason, lost: tuple[int, Any] | None) -> None:
        length, made = max(0, self._end() + off), None
        if lost is not None:
            epoch = self._epoch(lost[0])
            made = epoch, self._pieces(epoch, 0, lost[1])
            length = made[1][-1].end if made[1] and self.model.state is None else length
        self._agree(
            lambda: self.verbs.finish(self.id, length, data, reason, made),
            lambda: self.model.finish(length, data, reason, made),
            may_raise=True,
        )

    def _renew(self, epoch: int | str) -> None:
        """Beside two others, one of which is not there: theirs is not its own trouble."""
        epoch, other, absent = self._epoch(epoch), new_id(), new_id()
        self.verbs.open(other, 3)

        def real() -> Answer | None:
            refused = dict(self.verbs.renew([(other, 3), (self.id, epoch), (absent, 1)]))
            assert refused.pop(absent) == Answer(Verdict.ABSENT)
            assert other not in refused
            return refused.get(self.id)

        self._agree(real, lambda: self.model.renew(epoch))

    def _lose(self) -> None:
        """Redis is emptied."""
        self.redis.delete(state_key(self.id), log_key(self.id))
        self.model = Model()

    def _damage(self, which: str, value: str) -> None:
        """Somebody else writes what is ours."""
        key = {"state": state_key, "log": log_key}[which](self.id)
        self.redis.delete(key)
        self.redis.set(key, value, ex=LIVE_SECONDS)
        self.model.damaged.add(which)

    def _epoch(self, epoch: int | str) -> int:
        """As it is, or that of the state, or the next."""
        own = self.model.state.epoch if self.model.state else 1
        return epoch if isinstance(epoch, int) else own + (epoch == "next")

    def _end(self) -> int:
        return self.model.state.end if self.model.state else 0

    def check(self) -> None:
        """State and log are those of the model, and will go by themselves."""
        if "log" not in self.model.damaged:
            self._check_entries()
        if "state" not in self.model.damaged:
            assert self._real_state() == self._modelled_state()
        limit_seconds = RETENTION_SECONDS if self.model.state and self.model.state.done else LIVE_SECONDS
        for key in (state_key(self.id), log_key(self.id)):
            ttl_seconds = self.redis.ttl(key)
            assert ttl_seconds == -2 or 0 < ttl_seconds <= (LIVE_SECONDS if self.model.damaged else limit_seconds)

    def _check_entries(self) -> None:
        entries = list(self.verbs.read_all(self.id))
        assert [
            (tuple(entry.position), entry.kind, entry.text if entry.is_text else entry.data) for entry in entries
        ] == self.model.entries
        texts = [entry for entry in entries if entry.is_text]
        for before, after in zip(texts, texts[1:], strict=False):  # noqa: RUF007
            assert after.start == before.position.offset

    def _real_state(self) -> tuple[LogState, bool] | None:
        state = self.verbs.state(self.id)
        if state is None:
            return None
        age_seconds = state.lease_age_seconds
        assert age_seconds is None or -1 < age_seconds < 60
        values = (state.epoch, state.end, state.thinking_length, state.phase, None, state.fence, state.done)
        return LogState(*values), age_seconds is not None

    def _modelled_state(self) -> tuple[LogState, bool] | None:
        if (state := self.model.state) is None:
            return None
        values = (state.epoch, state.end, state.thinking_length, state.phase, None, state.fence, state.done)
        return LogState(*values), state.leased


# What may be asked

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.text("a", max_size=2000)
some_text = texts.filter(bool)
kinds = st.sampled_from([THINKING, MESSAGE])
near_epochs = st.sampled_from(["own", "own", "own", "own", "next", 1, 2, 0])
epochs = near_epochs | st.sampled_from([-5, -1, 9, 10, 2**31 - 1, 2**53 - 20])
offs = st.sampled_from([0, 0, 0, 0, 0, 0, -1, 1, 7, -1000])
reasons = st.sampled_from(TerminationReason)
written = st.lists(st.tuples(kinds, some_text), max_size=4)
phases = st.sampled_from([StreamPhase.LOADING, StreamPhase.GENERATING])
operations = st.one_of(
    st.sampled_from([("open", "next")]),
    st.tuples(st.just("open"), epochs),
    st.tuples(st.just("append"), near_epochs | epochs, offs, kinds, some_text),
    st.tuples(st.just("append"), near_epochs, offs, kinds, some_text),
    st.tuples(st.just("append"), near_epochs, offs | st.integers(-(2**60), 2**60), kinds, texts),
    st.tuples(st.just("mark"), near_epochs, phases, st.integers(0, 9)),
    st.tuples(st.just("fence"), reasons, st.none() | epochs, st.none() | offs),
    st.tuples(
        st.just("finish"),
        offs | st.sampled_from([FAR]),
        st.binary(max_size=30),
        reasons,
        st.none() | st.none() | st.tuples(epochs, written),
    ),
    st.tuples(st.just("renew"), epochs),
    st.tuples(st.just("rebuild"), epochs, st.sampled_from([0, 0, FAR]), written),
    st.sampled_from([("lose",)]),
)
damage = st.tuples(st.just("damage"), st.sampled_from(["state", "log"]), st.text(max_size=5))
sequences = st.builds(
    lambda first, some, harm: [*first, *some, *harm],
    st.just([("open", 1)]) | st.just([]),
    st.lists(operations, max_size=5) | st.lists(operations, min_size=8, max_size=16),
    st.just([]) | st.builds(lambda done, more: [done, *more], damage, st.lists(operations, min_size=3, max_size=6)),
)


@pytest.fixture(scope="module")
def client(valkey: ValkeyServer) -> Iterator[redis.Redis]:
    """As the product makes it: answers are bytes."""
    with redis.Redis.from_url(valkey.url, protocol=2) as client:
        yield client


@pytest.mark.timeout(120 + EXAMPLES // 5)
@seed(SEED)
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(sequence=sequences)
def test_any_verbs_in_any_order_answer_as_the_model_does(client: redis.Redis, sequence: list[tuple[Any, ...]]) -> None:
    client.flushdb()
    pair = Pair(client)
    for operation in sequence:
        pair.run(operation)
    pair.check()
    assert all(client.ttl(key) > 0 for key in client.keys("*"))
