"""The events of a stream, their positions, and their one encoding.

Text is counted in Unicode code points: thinking first, then content. A text event's position is
`END-0`, where END is the number of code points up to and including it; other events of the log
take `END-1`, `END-2`, …; `done` takes `END-DONE_SEQ`. The same number is the entry's ID in the
Redis stream, the `id` of the server-sent event and the resume cursor.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import orjson

from webapp.errors import InvalidCursor

DONE_SEQ: Final = 4_294_967_295
"""The SEQ of `done`: known from the row alone, and above any other event's."""

_CURSOR: Final = re.compile(r"(\d{1,15})-(\d{1,10})", re.ASCII)


class Position(NamedTuple):
    """Where an event stands; compares as the Redis IDs do."""

    offset: int
    seq: int

    def __str__(self) -> str:
        return f"{self.offset}-{self.seq}"

    @classmethod
    def parse(cls, cursor: str) -> Position:
        """The position that a client sent back to us.

        Raises:
            InvalidCursor: it is not one of ours.
        """
        match = _CURSOR.fullmatch(cursor)
        if match is None or int(match[2]) > DONE_SEQ:
            raise InvalidCursor(
                f"{cursor[:40]!r} is not a position to resume from: send back an `id` as it was received, or none"
            )
        return cls(int(match[1]), int(match[2]))


START: Final = Position(0, 0)


def done_position(length: int) -> Position:
    """Where `done` stands in a stream of `length` code points."""
    return Position(length, DONE_SEQ)


THINKING: Final = "thinking"
MESSAGE: Final = "message"
PHASE: Final = "phase"
DONE: Final = "done"
SESSION: Final = "session"
STREAM: Final = "stream"
"""Where several streams share a connection: the events that follow are of this session."""

_KIND_BYTES: Final = {b"t": THINKING, b"c": MESSAGE, b"p": PHASE, b"d": DONE}
KIND_CODES: Final = {name: code.decode() for code, name in _KIND_BYTES.items()}


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One entry of a token log. `text` is set for text events, `data` for the others."""

    position: Position
    kind: str
    text: str = ""
    data: bytes = b""

    @property
    def start(self) -> int:
        """Code points before this entry; equals the end for an event without text."""
        return self.position.offset - len(self.text)

    @property
    def is_text(self) -> bool:
        return self.kind == THINKING or self.kind == MESSAGE

    @classmethod
    def from_redis(cls, entry_id: bytes, fields: list[bytes] | dict[bytes, bytes]) -> LogEntry:
        """Decode one entry as XRANGE and XREAD give it: one field, its name the kind."""
        (code, value) = fields.items().__iter__().__next__() if isinstance(fields, dict) else fields[:2]
        offset, _, seq = entry_id.partition(b"-")
        position = Position(int(offset), int(seq))
        kind = _KIND_BYTES[code]
        if kind in (THINKING, MESSAGE):
            return cls(position, kind, text=value.decode())
        return cls(position, kind, data=value)

    def after(self, offset: int) -> LogEntry:
        """What of this entry lies beyond `offset`: entries of a rebuilt log may be cut differently."""
        if self.is_text and self.start < offset:
            return LogEntry(self.position, self.kind, text=self.text[offset - self.start :])
        return self

    def encode(self) -> bytes:
        """The entry as a server-sent event."""
        return encode_event(
            self.kind, orjson.dumps({"content": self.text}) if self.is_text else self.data, self.position
        )


def encode_event(kind: str, data: bytes, position: Position | None = None) -> bytes:
    """One server-sent event (WHATWG HTML, section 9.2); `message` is the default and not named."""
    head = b"" if position is None else b"id: %d-%d\n" % position
    name = b"" if kind == MESSAGE else b"event: %s\n" % kind.encode()
    return b"%s%sdata: %s\n\n" % (head, name, data)


def encode_json_event(kind: str, data: dict[str, Any], position: Position | None = None) -> bytes:
    """As `encode_event`, for data that is not JSON yet."""
    return encode_event(kind, orjson.dumps(data), position)


@dataclass(frozen=True, slots=True)
class SentEvent:
    """An event as a reader is sent it; `id` is None where its arrival moves no cursor."""

    kind: str
    data: dict[str, Any]
    id: str | None


def decode_events(piece: bytes) -> Iterator[SentEvent]:
    """What `encode_event` wrote, several events in one piece; comments and `retry` are passed over."""
    for block in piece.split(b"\n\n"):
        fields = dict(line.split(b": ", 1) for line in block.split(b"\n") if line and not line.startswith(b":"))
        if data := fields.get(b"data"):
            identity = fields.get(b"id")
            yield SentEvent(
                fields.get(b"event", MESSAGE.encode()).decode(),
                orjson.loads(data),
                identity.decode() if identity else None,
            )


def phase_data(phase: str, attempt: int, queue_position: int | None = None) -> bytes:
    """The data of a `phase` event."""
    data: dict[str, Any] = {"phase": phase, "attempt": attempt}
    if queue_position is not None:
        data["position"] = queue_position
    return orjson.dumps(data)


RECONNECT: Final = b"retry: 1000\n"
"""Put before the first event: how many milliseconds a browser waits before it comes back."""
COMMENT: Final = b": keep-alive\n\n"
"""What is sent on a silent stream, so that proxies do not close it."""
