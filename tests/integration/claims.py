"""What must hold of one session, whoever did what in which order: looked at after every step, and in the end."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

import redis

from tests.integration.actors import TOKEN, Turn, Upstream, Worker
from webapp.streams.events import DONE, MESSAGE, START, THINKING, LogEntry, Position, decode_events
from webapp.streams.keys import log_key, state_key
from webapp.streams.lifecycle import TerminationReason
from webapp.views import ReceiptView

NATURAL: Final = (TerminationReason.STOP, TerminationReason.LENGTH, TerminationReason.UPSTREAM_ERROR)
STOPPERS: Final = {"ada": TerminationReason.USER, "root": TerminationReason.ADMIN}
EXPECTED: Final = (*NATURAL, *STOPPERS.values(), TerminationReason.WORKER_LOST, TerminationReason.SHUTDOWN)
_ENDING: Final = (
    *("status", "reason", "length", "thinking_length", "sha256"),
    *("ended_at", "fenced_at", "upstream_closed_at"),
)
_LIVE: Final = ("epoch", "owner", "stop_reason", "checkpoint", "checkpoint_length", "published_at")
_ROW: Final = _ENDING + _LIVE
_LOOK: Final = (
    f"SELECT {', '.join('s.' + name for name in _ROW)}, m.content, m.thinking, m.status, m.reason, m.stats"
    " FROM stream_sessions s JOIN messages m ON m.id = s.message_id WHERE s.id = ?"
)


class Violation(AssertionError):
    """A claim does not hold."""


@dataclass
class Seen:
    """What one reader was sent; a reconnect goes on with it."""

    thinking: str = ""
    content: str = ""
    cursor: Position = START
    done: dict[str, Any] | None = None
    may_lose: bool = False
    """Whether what was seen may be more than what is saved."""

    def take(self, piece: bytes) -> None:
        for event in decode_events(piece):
            require(self.done is None, f"{event} after done")
            if event.kind == THINKING:
                require(not self.content, "thinking after content")
                self.thinking += event.data["content"]
            elif event.kind == MESSAGE:
                self.content += event.data["content"]
            elif event.kind == DONE:
                self.done = event.data
            if event.id is not None:
                self.cursor = Position.parse(event.id)
                length = len(self.thinking) + len(self.content)
                require(self.cursor.offset == length or self.may_lose, f"{event} at {length}")

    @property
    def text(self) -> str:
        return self.thinking + self.content


def require(holds: bool, claim: str) -> None:
    if not holds:
        raise Violation(claim)


class Watch:
    """Looks at the row and at Redis after every step, and holds what it finds against what it found before."""

    def __init__(self, path: str, client: redis.Redis) -> None:
        self._database = sqlite3.connect(path, isolation_level=None)
        self._redis = client
        self.row: dict[str, Any] = {}
        self.state: dict[bytes, bytes] = {}
        self.message: tuple[Any, ...] = ()
        self.commits = 0
        self.log_has_changed = False
        self.redis_was_reliable = True
        """Whether Redis never lost anything, nor was away: it alone decides what text counts."""
        self.redis_answered = True
        """Whether it also answered every call: else text is checkpointed that is not in the log."""

    def begin(self, session_id: UUID) -> None:
        """Look from now on."""
        self.session_id = session_id
        self.look_at_redis()
        self.look_at_row()

    def close(self) -> None:
        self._database.close()

    def session_ids(self) -> list[UUID]:
        """The sessions that there are."""
        return [UUID(found) for (found,) in self._database.execute("SELECT id FROM stream_sessions")]

    def change(self, assignment: str, *values: object) -> None:
        """Write into the row, as time would have."""
        where = "status = 'ACTIVE' AND id = ?"
        self._database.execute(f"UPDATE stream_sessions SET {assignment} WHERE {where}", (*values, self.session_id.hex))

    @property
    def is_active(self) -> bool:
        return self.row["status"] == "ACTIVE"

    def look_at_row(self, turn: Turn | None = None) -> None:
        """What the row says now, `turn` having been taken since the last look."""
        old = self.row
        found = self._database.execute(_LOOK, (self.session_id.hex,)).fetchone()
        self.row = dict(zip(_ROW, found, strict=False))
        message = found[len(_ROW) :]
        if old:
            self._compare(old, self.row, message)
        if turn is not None and turn.label == "write commit" and self.commits and old["status"] == "ACTIVE":
            by_owner = not isinstance(turn.process, Worker) or old["owner"] in (None, turn.process.name)
            # One that met a recorded stop when it claimed settles the session as the caller would have.
            require(by_owner or old["stop_reason"], f"no worker ends what is another's: {turn} of {old['owner']}")
        self.message = message

    def _compare(self, old: dict[str, Any], new: dict[str, Any], message: tuple[Any, ...]) -> None:
        require(old["stop_reason"] in (None, new["stop_reason"]), "the first stop request stays on record")
        require(new["epoch"] - old["epoch"] in (0, 1), "an epoch is raised one by one")
        if old["owner"] != new["owner"]:
            require(None in (old["owner"], new["owner"]), "what is owned is not claimed")
        if old["status"] != "ACTIVE":
            frozen = [name for name in _ENDING if old[name] != new[name]]
            require(not frozen, f"a session ends once; changed after it: {frozen}")
            require(message == self.message, f"a message is committed once: {self.message}, then {message}")
            require(new["epoch"] == old["epoch"], "what has ended is not claimed")
        elif new["status"] != "ACTIVE":
            self.commits += 1
            self._look_at_commit(old, new, message[1] + message[0])
        else:
            require(new["checkpoint"].startswith(old["checkpoint"]), "a checkpoint grows")
            require(len(new["checkpoint"]) == new["checkpoint_length"], "a checkpoint's length is its own")
            if self.redis_was_reliable and self.redis_answered and new["checkpoint"]:
                require(new["checkpoint_length"] <= int(self.state[b"end"]), "what is checkpointed is in the log")

    def _look_at_commit(self, old: dict[str, Any], new: dict[str, Any], text: str) -> None:
        require(text.startswith(old["checkpoint"]), "what was checkpointed is committed")
        if new["reason"] in [reason.value for reason in STOPPERS.values()]:
            require(new["reason"] == old["stop_reason"], "who is on record as the stopper did stop it")
        if self.redis_was_reliable:
            require(b"fence" in self.state, "the fence comes before the commit")
            require(self.state[b"fence"].decode() == new["reason"], "the first fence's reason is committed")
            cut = len(text) == int(self.state[b"end"])
            require(cut or not self.redis_answered, "the committed text is cut at the fence")

    def look_at_redis(self, turn: Turn | None = None) -> None:
        """What Redis has now, `turn` having been taken since the last look."""
        keys = state_key(self.session_id), log_key(self.session_id)
        pipe = self._redis.pipeline(transaction=False)
        pipe.hgetall(keys[0])
        for key in keys:
            pipe.pttl(key)
        state, *ttls = pipe.execute()
        require(-1 not in ttls, "every key of a session has a TTL")
        old, self.state = self.state, state
        self.log_has_changed = any(old.get(name) != state.get(name) for name in (b"end", b"seq", b"done"))
        require(not (b"done" in state and self.row and self.is_active), "done comes after the commit")
        if not old:
            return
        require(bool(state), "a state stays until it expires")
        require(int(old[b"epoch"]) <= int(state[b"epoch"]), "a state's epoch only rises")
        require(int(old[b"end"]) <= int(state[b"end"]), "a log only grows")
        if b"fence" in old:
            require(old[b"fence"] == state.get(b"fence"), "the first fence stays")
            require(old[b"end"] == state[b"end"], "nothing is appended after the fence")
        if turn is not None and isinstance(turn.process, Worker):
            self._look_at_worker(turn.process.name, old, state)

    def _look_at_worker(self, name: str, old: dict[bytes, bytes], new: dict[bytes, bytes]) -> None:
        is_owner = new[b"owner"].decode() == name
        require(is_owner or old[b"end"] == new[b"end"], "a log has one writer, its owner")
        ends_naturally = new.get(b"fence") != old.get(b"fence") and new[b"fence"].decode() in NATURAL
        require(is_owner or not ends_naturally, "only its owner comes to an answer's end")

    def forget_redis(self) -> None:
        """Redis was emptied."""
        self.state = {}
        self.redis_was_reliable = False


def check_text(watch: Watch, upstreams: list[Upstream]) -> None:
    """One ending; its text is what models said, without a gap or a repetition; all of it where one came to its end."""
    content, thinking = watch.message[:2]
    require(watch.commits == 1, "one ending")
    require(watch.row["reason"] in EXPECTED, f"it ends for one of the reasons that there were: {watch.row['reason']}")
    require(TOKEN.sub("", content) == "", f"the text is whole tokens: {content}")
    numbers = [int(number) for number, _ in TOKEN.findall(content)]
    require(numbers == list(range(1, len(numbers) + 1)), f"no gap, nothing twice: {content}")
    require(TOKEN.sub("", thinking) == "", f"the thinking is whole tokens: {thinking}")
    if watch.row["reason"] in NATURAL:
        whole = [one.content for one in upstreams if one.ended_as == watch.row["reason"]]
        require(content in whole, f"an answer's own end loses nothing: {content} of {whole}")


def check_receipt(watch: Watch, receipt: ReceiptView) -> None:
    """The receipt, and the lengths in the row, are those of the message."""
    row, (content, thinking, *_) = watch.row, watch.message
    require(receipt.partial_response == content and receipt.length == len(content), "a receipt has the text")
    require((receipt.status, receipt.reason) == (row["status"], row["reason"]), "a receipt has the outcome")
    require((row["length"], row["thinking_length"]) == (len(content), len(thinking)), "the row has the lengths")


def check_log(entries: list[LogEntry]) -> None:
    """One `done`, and nothing after it; or no log."""
    dones = [entry for entry in entries if entry.kind == DONE]
    require(len(dones) == 1 or not entries, f"one done in the log, not {len(dones)}")
    require(not entries or entries[-1].kind == DONE, "done is the last")


def check_seen(watch: Watch, name: str, seen: Seen) -> None:
    """A reader who read to the end was sent what is saved, and what `done` says is in the row."""
    content, thinking = watch.message[:2]
    require((thinking + content).startswith(seen.text), f"{name} saw {seen.text!r}, of which {content!r} is saved")
    require(seen.done is not None, f"{name} is told of the end")
    require((seen.thinking, seen.content) == (thinking, content), f"{name} has seen all")


def check_done(watch: Watch, seen: Seen) -> None:
    """What `done` said is what the row says."""
    if seen.done is not None:
        said = {name: seen.done[name] for name in ("status", "reason", "length", "sha256")}
        require(said == {name: watch.row[name] for name in said}, f"done is the row's: {said}")
