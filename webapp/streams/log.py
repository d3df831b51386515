"""The token log: one Redis stream a session, guarded by a small state hash.

Every verb is one Lua script, so it happens whole or not at all, and is safe to repeat, because
redis-py repeats commands by itself when a connection breaks. On a missing state a verb answers
ABSENT and makes nothing up; a state is created after the row was read, by OPEN, or with all its text
by whoever has that: by REBUILD and, after the commit, FINISH. The names
OPEN, APPEND, FENCE, FINISH and REBUILD are those of the model in `docs/model/`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import redis
from redis.exceptions import NoScriptError, ResponseError

from webapp.errors import Unavailable
from webapp.streams.events import (
    DONE_SEQ,
    KIND_CODES,
    MESSAGE,
    START,
    THINKING,
    LogEntry,
    Position,
    phase_data,
)
from webapp.streams.keys import log_key, state_key
from webapp.streams.lifecycle import StreamPhase, TerminationReason

PAGE_ENTRIES: Final = 512
"""Entries that one XRANGE asks for."""


class Verdict(StrEnum):
    """How a verb ended; each refusal has a name of its own."""

    OK = "OK"
    FENCED = "FENCED"
    STALE = "STALE"
    BEHIND = "BEHIND"
    ABSENT = "ABSENT"
    BROKEN = "BROKEN"
    """The keys of this one session are not what they should be; nothing was done."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a verb answered. `end` and `thinking_length` are in code points; `reason` and `fenced_us` the fence's."""

    verdict: Verdict
    end: int = 0
    thinking_length: int = 0
    reason: TerminationReason | None = None
    fenced_us: int = 0

    @property
    def ok(self) -> bool:
        return self.verdict is Verdict.OK

    @property
    def fenced(self) -> bool:
        """Whether a fence stands, this call's own or another's."""
        return self.reason is not None


@dataclass(frozen=True, slots=True)
class LogState:
    """A look at a session's state, for views and for the reaper; decides nothing."""

    epoch: int
    end: int
    thinking_length: int
    phase: StreamPhase
    lease_age_seconds: float | None
    fence: TerminationReason | None
    done: bool


@dataclass(frozen=True, slots=True)
class Mark:
    """A `phase` event for a log."""

    session_id: UUID
    epoch: int
    phase: StreamPhase
    attempt: int


@dataclass(frozen=True, slots=True)
class Append:
    """A piece of text for a log: the code points (start, end], all of one kind."""

    session_id: UUID
    epoch: int
    start: int
    kind: str
    text: str

    @property
    def end(self) -> int:
        return self.start + len(self.text)


@cache
def _script(verb: str) -> tuple[str, str]:
    """The verb's Lua and its SHA1, by which Redis knows it."""
    lua = (Path(__file__).parent / "lua" / f"{verb}.lua").read_text(encoding="utf-8")
    return lua, hashlib.sha1(lua.encode(), usedforsecurity=False).hexdigest()


def _answer(raw: Sequence[Any]) -> Answer:
    verdict = Verdict(raw[0].decode())
    if verdict in (Verdict.ABSENT, Verdict.STALE, Verdict.BROKEN):
        return Answer(verdict)
    end, thinking_length = int(raw[1]), int(raw[2]) if len(raw) > 2 else 0
    if len(raw) > 4:
        return Answer(verdict, end, thinking_length, TerminationReason(raw[3].decode()), int(raw[4]))
    return Answer(verdict, end, thinking_length)


class TokenLog:
    """The verbs on the logs of one Redis. Every method raises `redis.RedisError` where Redis cannot be reached."""

    def __init__(self, client: redis.Redis, *, live_seconds: int, retention_seconds: int) -> None:
        """`live_seconds`: TTL of a live log; `retention_seconds`: of an ended one."""
        self._redis = client
        self._live_seconds = live_seconds
        self._retention_seconds = retention_seconds

    def ping(self) -> None:
        """Raises `redis.RedisError` where Redis does not answer."""
        self._redis.ping()

    def require_no_eviction(self) -> None:
        """A Redis that evicts may drop a fence.

        Raises:
            Unavailable: its policy is not `noeviction` while its memory is limited.
        """
        memory: Any = self._redis.info("memory")
        if memory.get("maxmemory") and memory.get("maxmemory_policy") != "noeviction":
            raise Unavailable(f"Redis may evict ({memory['maxmemory_policy']}): set maxmemory-policy noeviction")

    def open(self, session_id: UUID, epoch: int, owner: str = "", *, live_seconds: int | None = None) -> Answer:
        """OPEN: create the state, or raise it to `epoch`. OK and FENCED carry the end; STALE: a newer epoch stands.

        `live_seconds`: the TTL until the next OPEN or the end; None: the usual one.
        """
        return self._call("open", _keys(session_id), (epoch, owner, live_seconds or self._live_seconds))

    def rebuild(
        self, session_id: UUID, epoch: int, owner: str, pieces: Sequence[Append], *, live_seconds: int
    ) -> Answer:
        """REBUILD: make a log that Redis has lost, with all its text, as one step, so that no fence finds less.

        OK carries the end; STALE and FENCED as OPEN; BROKEN where the keys are not what they should be.
        """
        try:
            return self._call("rebuild", _keys(session_id), (epoch, owner, live_seconds, *_pieces(pieces)))
        except ResponseError as error:
            return _answer_or_broken(error)

    def append(self, piece: Append) -> Answer:
        """APPEND one piece. OK carries the new end, BEHIND the end from which to resend."""
        return self.apply([piece])[0]

    def mark(self, mark: Mark) -> Answer:
        """Put a `phase` event at the end of the log, once for each phase of an epoch."""
        return self.apply([mark])[0]

    def apply(self, operations: Sequence[Append | Mark]) -> list[Answer]:
        """Do many in one round trip, in order; one refused does not keep the next from being tried."""
        raws = self._pipeline(operations)
        if any(isinstance(raw, NoScriptError) for raw in raws):  # a Redis that was restarted
            for verb in ("append", "mark"):
                self._redis.script_load(_script(verb)[0])
            raws = self._pipeline(operations)  # the verbs may be repeated
        return [_answer_or_broken(raw) for raw in raws]

    def _pipeline(self, operations: Sequence[Append | Mark]) -> list[Any]:
        pipe = self._redis.pipeline(transaction=False)
        for operation in operations:
            verb, args = (
                ("append", _append_args(operation))
                if isinstance(operation, Append)
                else ("mark", _mark_args(operation))
            )
            pipe.evalsha(_script(verb)[1], 2, *_keys(operation.session_id), *args)
        return pipe.execute(raise_on_error=False)

    def fence(
        self, session_id: UUID, reason: TerminationReason, *, epoch: int | None = None, expected_end: int | None = None
    ) -> Answer:
        """FENCE: the first wins. OK: this call's; FENCED: another's stands. Both carry reason, lengths and time."""
        args = (reason.value, "" if epoch is None else epoch, "" if expected_end is None else expected_end)
        return self._call("fence", _keys(session_id)[:1], args)

    def finish(
        self,
        session_id: UUID,
        length: int,
        data: bytes,
        reason: TerminationReason,
        lost: tuple[int, Sequence[Append]] | None = None,
    ) -> Answer:
        """FINISH: put `done` after the text and let the log expire. BEHIND: the log is longer than that text.

        `lost`: the epoch and all text of a log that Redis has lost; without it, that is ABSENT.
        """
        args: list[Any] = [length, DONE_SEQ, data, reason.value, self._retention_seconds]
        if lost is not None:
            args += [lost[0], *_pieces(lost[1])]
        return self._call("finish", _keys(session_id), args)

    def renew(self, held: Sequence[tuple[UUID, int]]) -> list[tuple[UUID, Answer]]:
        """Refresh the leases of (session, epoch) pairs; returns those that were refused, or are fenced."""
        if not held:
            return []
        lua, sha = _script("renew")
        args = [*(state_key(session_id) for session_id, _ in held), *(epoch for _, epoch in held)]
        rows = self._evaluate(lua, sha, len(held), args)
        return [(held[int(row[0]) - 1][0], _answer(row[1:])) for row in rows]

    def read(self, session_id: UUID, after: Position = START, count: int = PAGE_ENTRIES) -> list[LogEntry]:
        """At most `count` entries beyond a position, oldest first; none where the log is gone."""
        first = "-" if after == START else f"({after}"
        rows: Any = self._redis.xrange(log_key(session_id), first, "+", count=count)
        return [LogEntry.from_redis(entry_id, fields) for entry_id, fields in rows]

    def read_all(self, session_id: UUID, after: Position = START) -> Iterator[LogEntry]:
        """All entries beyond a position that are there now, page by page."""
        while page := self.read(session_id, after):
            yield from page
            after = page[-1].position

    def text(self, session_id: UUID) -> tuple[str, int]:
        """The log's whole text, and how much of it is thinking, in code points."""
        return text_of(self.read_all(session_id))

    def state(self, session_id: UUID) -> LogState | None:
        """A look at one state; None where there is none."""
        return self.states([session_id])[0]

    def states(self, session_ids: Sequence[UUID]) -> list[LogState | None]:
        """A look at many states in one round trip."""
        pipe = self._redis.pipeline(transaction=False)
        pipe.time()  # leases are stamped with Redis's clock, so their age is told by it
        for session_id in session_ids:
            pipe.hgetall(state_key(session_id))
        (seconds, microseconds), *raws = pipe.execute()
        return [_state(raw, seconds * 1_000_000 + microseconds) for raw in raws]

    def wait_done(self, session_id: UUID, timeout_seconds: float) -> bool:
        """Block until `done` is in the log; False where it does not come in time."""
        deadline = time.monotonic() + timeout_seconds
        last = self.last_position(session_id)
        while (left := deadline - time.monotonic()) > 0:
            if last is not None and last.seq == DONE_SEQ:
                return True
            block_ms = max(1, min(int(left * 1000), 1000))
            answer: Any = self._redis.xread({log_key(session_id): str(last or START)}, block=block_ms)
            for entry_id, _ in answer[0][1] if answer else ():
                last = _position(entry_id)
        return last is not None and last.seq == DONE_SEQ

    def last_position(self, session_id: UUID) -> Position | None:
        """Where the newest entry stands; None where there is no log."""
        rows: Any = self._redis.xrevrange(log_key(session_id), count=1)
        return _position(rows[0][0]) if rows else None

    def _call(self, verb: str, keys: Sequence[str], args: Iterable[Any]) -> Answer:
        lua, sha = _script(verb)
        return _answer(self._evaluate(lua, sha, len(keys), [*keys, *args]))

    def _evaluate(self, lua: str, sha: str, key_count: int, args: Sequence[Any]) -> Any:
        try:
            return self._redis.evalsha(sha, key_count, *args)
        except NoScriptError:
            return self._redis.eval(lua, key_count, *args)


def _answer_or_broken(raw: Any) -> Answer:
    """One session's broken keys are its own trouble; what concerns Redis as a whole is raised."""
    if type(raw) is ResponseError:  # its subclasses say that Redis is full, read-only, and the like
        return Answer(Verdict.BROKEN)
    if isinstance(raw, Exception):
        raise raw
    return _answer(raw)


def appends_of(session_id: UUID, epoch: int, text: str, thinking_length: int, start: int = 0) -> list[Append]:
    """The text from position `start` on as at most one append of each kind; thinking ends at `thinking_length`."""
    cut = max(0, thinking_length - start)
    pieces = ((THINKING, start, text[:cut]), (MESSAGE, start + len(text[:cut]), text[cut:]))
    return [Append(session_id, epoch, begins, kind, piece) for kind, begins, piece in pieces if piece]


def text_of(entries: Iterable[LogEntry]) -> tuple[str, int]:
    """The text of entries in order, and its thinking's length; entries may overlap in a log that was rebuilt."""
    pieces: list[str] = []
    length = thinking_length = 0
    for entry in entries:
        if entry.is_text and entry.position.offset > length:
            piece = entry.after(length)
            pieces.append(piece.text)
            length = entry.position.offset
            if entry.kind != "message":
                thinking_length = length
    return "".join(pieces), thinking_length


def _keys(session_id: UUID) -> tuple[str, str]:
    return state_key(session_id), log_key(session_id)


def _append_args(piece: Append) -> tuple[Any, ...]:
    return piece.epoch, piece.start, piece.end, KIND_CODES[piece.kind], piece.text


def _pieces(pieces: Sequence[Append]) -> list[Any]:
    return [word for piece in pieces for word in (piece.end, KIND_CODES[piece.kind], piece.text)]


def _mark_args(mark: Mark) -> tuple[Any, ...]:
    return mark.epoch, mark.phase.value, phase_data(mark.phase.value, mark.attempt)


def _position(entry_id: bytes) -> Position:
    offset, _, seq = entry_id.partition(b"-")
    return Position(int(offset), int(seq))


def _state(raw: dict[bytes, bytes], now_us: int) -> LogState | None:
    if not raw:
        return None
    lease = raw.get(b"lease_us")
    fence = raw.get(b"fence")
    return LogState(
        epoch=int(raw[b"epoch"]),
        end=int(raw[b"end"]),
        thinking_length=int(raw[b"tlen"]),
        phase=StreamPhase(raw.get(b"phase", b"QUEUED").decode()),
        lease_age_seconds=(now_us - int(lease)) / 1_000_000 if lease else None,
        fence=TerminationReason(fence.decode()) if fence else None,
        done=b"done" in raw,
    )
