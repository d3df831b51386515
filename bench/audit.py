"""What is looked at when a chaos run is over: every invariant, for every stream, from the numbered tokens.

The database's rows are the one side; what readers and callers were sent is the other. `Finding`s are violations.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa

from bench.nemesis import Hit
from bench.seen import Seen, Stream
from tests.functional.ending import ENDINGS
from tests.functional.nodes import Stack
from tests.upstream import Script, expected_text

SEEN_IS_SAVED: Final = "seen = saved"
TOKENS: Final = "the model's tokens, each once"
FENCE: Final = "nothing after the fence"
RECEIPT: Final = "the receipt is the row"
ENDING: Final = "one ending"
REASON: Final = "the ending's reason"
ORDER: Final = "order of events"
LOST: Final = "accepted and not lost"
REACHED: Final = "readers get to `done`"
ANSWERS: Final = "answers are as documented"
RECOVERY: Final = "recovery within the limit"
LEFT: Final = "nothing is left over"
CHECKS: Final = (SEEN_IS_SAVED, TOKENS, FENCE, RECEIPT, ENDING, REASON, ORDER, LOST, REACHED, ANSWERS, RECOVERY, LEFT)

_RECEIPT_ROW: Final = {"status": "status", "reason": "reason", "length": "length", "sha256": "sha256"}
_DONE_ROW: Final = {**_RECEIPT_ROW, "thinkingLength": "thinking_length"}
_TELLING: Final = re.compile(r'"event": "stream\.(?:completed|terminated)"|"level": "error"')


@dataclass(frozen=True)
class Finding:
    """One violation: of which check, in which session, and the whole difference."""

    check: str
    session: str
    what: str
    during: str = ""
    """The faults that struck while the stream ran."""

    def __str__(self) -> str:
        return f"VIOLATION of: {self.check}\n  session {self.session}\n  {self.what}\n  during {self.during}"


class Audit:
    """The rows of a run, and what the checks find in them."""

    def __init__(self, stack: Stack, streams: Sequence[Stream], hits: Sequence[Hit]) -> None:
        self.rows = _rows(stack)
        self.told = told_by(stack.directory / "logs")
        self.streams = streams
        self._hits = hits

    def findings(self) -> Iterator[Finding]:
        """All that is wrong with any stream."""
        for stream in self.streams:
            for check, what in self._of(stream):
                yield Finding(check, f"{stream.plan.name} {stream.session_id}", what, self._during(stream))
        accepted = {stream.session_id for stream in self.streams}
        for session_id in self.rows.keys() - accepted:
            yield Finding(LOST, session_id, "nobody knows of this session: one message became two")

    def _during(self, stream: Stream) -> str:
        end = (stream.ended_at or float("inf")) + 5
        struck = [hit for hit in self._hits if stream.asked_at <= hit.recovered_at and hit.struck_at <= end]
        return ", ".join(f"{hit.plan.number} {hit.plan.kind} ({hit.on})" for hit in struck)

    def _of(self, stream: Stream) -> Iterator[tuple[str, str]]:
        row = self.rows.get(stream.session_id)
        if row is None:
            yield LOST, "it was accepted, and the database does not know it"
            return
        if row.status == "ACTIVE":
            yield LOST, f"it is ACTIVE still, at attempt {row.attempt}, owner {row.owner}, phase {row.phase}"
            return
        yield from wrong_text(stream, row)
        yield from self._wrong_reason(stream, row)
        for number, seen in enumerate(stream.readers):
            for check, what in wrong_seen(seen, row):
                yield check, f"reader {number}: {what}"
        yield from wrong_receipts(stream, row)
        if (said := self.told.endings[stream.session_id]) > 1:
            yield ENDING, f"the logs tell of {said} endings"
        if stream.session_id in self.told.beyond:
            yield FENCE, "its log went on behind what was committed"

    def _wrong_reason(self, stream: Stream, row: Any) -> Iterator[tuple[str, str]]:
        """Nobody ends a stream here but its model, those who stop it, and faults of the model's server."""
        right = {"stop"}
        if stream.stops:
            right.add("user")
        script = Script.parse(stream.plan.model)
        fails = any(at is not None for at in (script.error_at, script.reset_at, script.close_at))
        end = (stream.ended_at or float("inf")) + 1
        struck = [hit for hit in self._hits if hit.plan.kind == "upstream SIGKILL"]
        if fails or any(stream.accepted_at <= hit.back_at and hit.struck_at <= end for hit in struck):
            right.add("upstream_error")
        if row.reason not in right:
            yield REASON, f"{row.status}, {row.reason}: {row.detail}; right would have been {sorted(right)}"


def _rows(stack: Stack) -> dict[str, Any]:
    engine = sa.create_engine(stack.environment["DATABASE_URL"], poolclass=sa.NullPool)
    statement = sa.text(
        "SELECT s.*, m.content, m.thinking, m.status AS message_status, m.reason AS message_reason"
        " FROM stream_sessions s JOIN messages m ON m.id = s.message_id"
    )
    with engine.connect() as connection:
        return {str(row.id): row for row in connection.execute(statement)}


@dataclass(frozen=True)
class Told:
    """What the logs of all processes tell."""

    endings: Counter[str]
    """How many lines say of a session that it ended."""
    errors: Counter[str]
    """Our own lines of the level `error`, by their event."""
    beyond: list[str]
    """Sessions whose log went on behind what was committed."""


def told_by(logs: Path) -> Told:
    """Read them all."""
    told = Told(Counter(), Counter(), [])
    for path in logs.glob("*.log"):
        with path.open(errors="replace") as lines:
            for line in filter(_TELLING.search, lines):
                _take(told, line)
    return told


def _take(told: Told, line: str) -> None:
    try:
        said = json.loads(line)
    except ValueError:  # its process was killed while it said so
        return
    if said["event"] in ENDINGS:
        told.endings[said["session_id"]] += 1
    elif said["logger"].startswith(("webapp", "workers")):
        told.errors[said["event"]] += 1
        if said["event"] == "stream.log_beyond_commit":
            told.beyond.append(said["session_id"])


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def wrong_text(stream: Stream, row: Any) -> Iterator[tuple[str, str]]:
    """The saved text is the beginning of what the model says, and a natural end has all of it."""
    if (row.length, row.thinking_length, row.sha256) != (len(row.content), len(row.thinking), _sha256(row.content)):
        yield SEEN_IS_SAVED, f"the row tells of {row.length}+{row.thinking_length}, {row.sha256}; its text is another"
    if (row.message_status, row.message_reason) != (row.status, row.reason):
        yield ENDING, f"the session is {row.status} {row.reason}, its message {row.message_status} {row.message_reason}"
    for name, said in expected_text(stream.plan.model)._asdict().items():
        saved = getattr(row, name)
        if not said.startswith(saved) or (row.reason == "stop" and saved != said):
            yield TOKENS, f"{name} of what ended as `{row.reason}`: {difference(said, saved)}"


def wrong_seen(seen: Seen, row: Any) -> Iterator[tuple[str, str]]:
    """What one reader was sent is the saved text, or its beginning; with `done`, all of it."""
    for wrong in seen.wrongs:
        yield FENCE if "after `done`" in wrong else ORDER, wrong
    sent, saved = seen.thinking + seen.content, row.thinking + row.content
    if len(sent) > len(saved) and sent.startswith(saved):
        yield FENCE, f"{len(sent) - len(saved)} code points beyond the end: {sent[len(saved) :]!r}"
    elif not saved.startswith(sent):
        yield SEEN_IS_SAVED, difference(saved, sent)
    elif not row.content.startswith(seen.content):
        yield SEEN_IS_SAVED, f"thinking and content are cut elsewhere: {difference(row.content, seen.content)}"
    if seen.done is not None:
        if sent != saved or _sha256(seen.content) != row.sha256:
            yield SEEN_IS_SAVED, f"it had `done`, and not all: {difference(saved, sent)}"
        if other := _differing(seen.done, row, _DONE_ROW):
            yield SEEN_IS_SAVED, f"`done` and the row differ: {other}"
    elif seen.plan.leaves_seconds is None:
        yield REACHED, f"no `done` after {seen.connections} connections; last id {seen.last_id}"


def wrong_receipts(stream: Stream, row: Any) -> Iterator[tuple[str, str]]:
    """Every caller was answered, with one receipt, and it tells what the row and the message do."""
    answered = [stop.receipt for stop in stream.stops if stop.receipt is not None]
    if len(answered) < len(stream.stops):
        yield LOST, f"{len(stream.stops) - len(answered)} of {len(stream.stops)} terminate calls were never answered"
    for receipt in answered:
        if other := _differing(receipt, row, _DONE_ROW):
            yield RECEIPT, f"receipt and row differ: {other}"
        if receipt["partialResponse"] != row.content:
            yield RECEIPT, f"receipt and message: {difference(row.content, receipt['partialResponse'])}"
        if receipt != answered[0]:
            other = {name: (receipt[name], answered[0][name]) for name in receipt if receipt[name] != answered[0][name]}
            yield RECEIPT, f"two receipts differ: {other}"


def _differing(told: dict[str, Any], row: Any, names: dict[str, str]) -> dict[str, tuple[Any, Any]]:
    pairs = {name: (told[name], getattr(row, column)) for name, column in names.items()}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def difference(expected: str, found: str) -> str:
    """Every place in which two texts differ, with what stands around it."""
    matcher = difflib.SequenceMatcher(None, expected, found, autojunk=False)
    changes = [
        f"at {a}: {expected[a:b]!r} became {found[c:d]!r} after {expected[max(0, a - 30) : a]!r}"
        for kind, a, b, c, d in matcher.get_opcodes()
        if kind != "equal"
    ]
    return f"{len(expected)} code points and {len(found)}: " + "; ".join(changes)
