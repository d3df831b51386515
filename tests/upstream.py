"""A server that speaks Ollama's protocol and does exactly as told: the tests' upstream.

Written over asyncio's streams, for it must decide about single bytes, resets and silences, and must see at once when
a client leaves. What it does with a chat is written in the name of the model that is asked for, as a script:

    pace=50,tokens=200,silence_at=20:20

`Script` lists the words. Any other model name acts as the default script does; `unknown` is not found. Faults and
silences have an INDEX: they come just before the content token of that number (or, at the number of tokens, before
the end), and not in a request whose prefill had come that far already, so that a continued answer can succeed.

Every request is recorded, with the moment at which the server saw its client go. Run it as
`python -m tests.upstream --port 0`, which prints its port, or in a thread by `running_upstream()`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import queue
import re
import socket
import struct
import sys
import threading
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args

from tests.services import HOST, LocalProcess, free_port, wait_until

MODELS = ("sluice-small:latest", "sluice-large:latest")
VERSION = "0.12.6"
# Combining marks, emoji joined by ZWJ, a flag, right-to-left text, an astral letter, a variation selector.
MIXED = ("é", "e\u0301\u0323", "👩‍👩‍👧‍👦", "🇮🇸", "שָׁלוֹם", "مرحبا", "𝔘", "❤\ufe0f", "한글", "漢字", "n\u0303", "\u200b")
# What a token is as a whole, over and over; `#n` stands for its number.
WRITTEN: Mapping[str, Sequence[str]] = {
    "markdown": (
        "## Part t#n\n\n",
        "Some words t#n, ",
        "**bold t#n**, ",
        "*leaning t#n* ",
        "and `code t#n`, ",
        "with a [link t#n](https://example.org/t#n).\n\n",
        "- item t#n\n",
        "- item t#n, and more of it\n",
        "  1. below t#n\n\n",
        "```python\n",
        "def t#n(x: int) -> str:\n",
        "    return f'{x} t#n'  # a comment\n",
        "```\n\n",
        "> quoted t#n\n\n",
        "| name | number |\n|---|---:|\n",
        "| row t#n | #n |\n",
        "| row t#n | #n |\n\n",
    ),
    "hostile": (
        "t#n <script>window.pwned = 1</script> ",
        '<img src="x" onerror="window.pwned = 1"> ',
        "[link t#n](javascript:window.pwned=1) ",
        "[other](data:text/html,<script>window.pwned=1</script>) ",
        "![picture](https://example.org/who-reads-this.png) ",
        "<a href=\"javascript:window.pwned=1\" onclick='window.pwned=1'>a</a>\n\n",
        "<svg/onload=window.pwned=1><iframe srcdoc='<script>parent.pwned=1</script>'></iframe>\n\n",
        "<style>body { display: none }</style><form action='https://example.org'><button>b</button></form>\n\n",
        "`</code><img src=x onerror=window.pwned=1>` ",
        "turned \u202egnp.exe\u202c around, \u2066isolated ",
        "[ref]: javascript:window.pwned=1\n\n[ref] ",
        "<!-- a comment --> &lt;script&gt; &amp; <https://example.org/plain> <javascript:window.pwned=1>\n\n",
        '```"><img src=x onerror=window.pwned=1>\nif (admin\u202e) { /* t#n */ }\n```\n\n',
        "| <b>a</b> | b |\n|---|---|\n| <img src=x onerror=window.pwned=1> | c |\n\n",
        "```js\nlet half = 'open t#n <script>window.pwned = 1</script>';\n",
    ),
}
UNWANTED = re.compile("[\0\ud800-\udfff]")

Fault = Literal["error", "reset", "close", "malformed", "bad_chunk", "endless_line", "flood"]
FAULTS: frozenset[str] = frozenset(get_args(Fault))
REFUSALS = ("json", "html", "empty", "huge", "stalled")
Answer = TypeVar("Answer")


class ScriptError(ValueError):
    """A model's name looks like a script and is none."""


class ExpectedText(NamedTuple):
    """What a script's answer must end up as."""

    thinking: str
    content: str


@dataclass(frozen=True)
class Step:
    """One thing that the server does: say a piece of text, be silent, or fail."""

    kind: Literal["thinking", "content", "rest", "silence", "half"] | Fault
    text: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Script:
    """How one chat goes. Each field is a word of the language, with its default."""

    name: str = ""  # means nothing; tells requests apart
    tokens: int = 20
    pace: float = 50.0  # tokens a second; 0: as fast as it goes
    thinking: int = 0  # tokens of thinking before the content, unless the request says think: false
    alphabet: Literal["plain", "mixed", "markdown", "hostile"] = "plain"
    load_seconds: float = 0.0  # before even the headers, as while a model loads
    first_token_silence: float = 0.0  # seconds, after the headers
    silence_at: Mapping[int, float] = field(default_factory=dict)  # INDEX:SECONDS, several joined by "+"
    done_reason: str = "stop"
    end_without_done: bool = False  # a proper end of the body, but no `done` line
    http_status: int = 200  # any other: that answer; 3xx points to this very place
    refusal: str = (
        "json"  # what comes with it: {"error": …}, html, empty, huge (without end), stalled (after some of it)
    )
    head_byte_seconds: float = 0.0  # between two bytes of the head
    head_lines: int = 0  # more than a head has
    after_done: bool = False  # `done` is followed by a token and by another `done`
    closes_late: bool = False  # after `done` nothing comes any more, not even the body's end, until the client leaves
    error_at: int | None = None  # a line {"error": …}, then the end
    reset_at: int | None = None  # TCP RST
    close_at: int | None = None  # FIN in the middle of the body
    malformed_at: int | None = None  # a line that is not JSON; then it goes on
    half_at: int | None = None  # the token's line comes in two parts, cut in a character; the other words come between
    bad_chunk_at: int | None = None  # a chunk whose size is no number; then the end
    endless_line_at: int | None = None  # a line that goes on for as long as the client stays
    flood_at: int | None = None  # lines that say nothing, without a pause, for as long as the client stays
    late_thinking_at: int | None = None  # a piece of thinking between the content
    nul_at: int | None = None  # the token holds U+0000
    surrogate_at: int | None = None  # the token holds a lone surrogate
    invalid_at: int | None = None  # the token holds a byte that is not UTF-8
    width: int = 0  # characters that a content token has at least
    long_line_at: tuple[int, int] | None = None  # INDEX:BYTES, the length of that token
    split_bytes: int = 0  # every line is sent in chunks of so many bytes; 0: whole

    @classmethod
    def parse(cls, model: str) -> Script:
        """Read a model's name.

        Raises:
            ScriptError: a word is unknown or its value is not acceptable.
        """
        if "=" not in model:
            return cls(name=model)
        words = {word.partition("=")[0]: word.partition("=")[2] or "1" for word in model.split(",")}
        if wrong := set(words) - {known.name for known in dataclasses.fields(cls)}:
            raise ScriptError(f"no such word in a script: {', '.join(sorted(wrong))}")
        try:
            return cls(**{word: _READERS.get(word, int)(value) for word, value in words.items()})
        except ValueError as error:
            raise ScriptError(f"{model!r}: {error}") from error

    def token(self, index: int) -> str:
        """The content token of this number, as the model says it."""
        if written := WRITTEN.get(self.alphabet):
            return written[index % len(written)].replace("#n", str(index))
        text = f"t{index}"
        if self.alphabet == "mixed":
            text += MIXED[index % len(MIXED)]
        if index == self.nul_at:
            text += "\0"
        if index == self.surrogate_at:
            text += "\ud800"
        if index == self.invalid_at:
            text += "\udcc3("  # the first byte of a character, and no second
        if self.long_line_at and index == self.long_line_at[0]:
            text = text.ljust(self.long_line_at[1] - 1, "x")
        return text.ljust(self.width - 1, "x") + " "

    def thinking_token(self, index: int) -> str:
        """The thinking token of this number."""
        return f"h{index}{MIXED[index % len(MIXED)] if self.alphabet == 'mixed' else ''} "

    def resume_after(self, prefill: str) -> tuple[int, str]:
        """The number of the next whole token after `prefill`, and what its last token still lacks.

        A prefill that this script did not write goes on after the last number in it.
        """
        position = 0
        for index in range(self.tokens):
            if position == len(prefill):
                return index, ""
            token = saved_form(self.token(index))
            given = prefill[position : position + len(token)]
            if not token.startswith(given):
                break
            position += len(given)
            if len(given) < len(token):
                return index + 1, token[len(given) :]
        if position == len(prefill):
            return self.tokens, ""
        numbers = re.findall(r"t(\d+)", prefill)
        return (int(numbers[-1]) + 1 if numbers else 0), ""

    def steps(self, *, prefill: str | None = None, think: bool = True) -> Iterator[Step]:
        """Everything to be done after the headers, in order."""
        start, rest = self.resume_after(prefill) if prefill else (0, "")
        if think and not prefill:
            for index in range(self.thinking):
                yield Step("thinking", self.thinking_token(index))
        if rest:
            yield Step("rest", rest)
        for index in range(start, self.tokens + 1):
            if not prefill or index > start:
                yield from self._events_before(index)
            if index < self.tokens:
                yield Step("content", self.token(index))

    def _events_before(self, index: int) -> Iterator[Step]:
        if index == self.half_at:
            yield Step("half", self.token(index))
        if seconds := self.silence_at.get(index):
            yield Step("silence", seconds=seconds)
        if index == self.late_thinking_at:
            yield Step("thinking", f"late{index} ")
        if index == self.malformed_at:
            yield Step("malformed", '{"model":"broken","message":{"content":')
        if index == self.error_at:
            yield Step("error", f"scripted error at {index}")
        for kind in ("bad_chunk", "endless_line", "flood"):
            if index == getattr(self, f"{kind}_at"):
                yield Step(kind)
        if index == self.reset_at:
            yield Step("reset")
        if index == self.close_at:
            yield Step("close")


def _index_and_seconds(text: str) -> dict[int, float]:
    pairs = (item.split(":") for item in text.split("+"))
    return {int(index): float(seconds) for index, seconds in pairs}


def _index_and_bytes(text: str) -> tuple[int, int]:
    index, size_bytes = text.split(":")
    return int(index), int(size_bytes)


def _alphabet(text: str) -> str:
    known = ("plain", "mixed", *WRITTEN)
    if text not in known:
        raise ValueError(f"alphabet is one of {', '.join(known)}")
    return text


def _refusal(text: str) -> str:
    if text not in REFUSALS:
        raise ValueError(f"refusal is one of {', '.join(REFUSALS)}")
    return text


def _flag(text: str) -> bool:
    return text == "1"


_READERS: dict[str, Callable[[str], Any]] = {
    "name": str,
    "done_reason": str,
    "alphabet": _alphabet,
    "pace": float,
    "load_seconds": float,
    "first_token_silence": float,
    "silence_at": _index_and_seconds,
    "long_line_at": _index_and_bytes,
    "refusal": _refusal,
    "head_byte_seconds": float,
    "end_without_done": _flag,
    "after_done": _flag,
    "closes_late": _flag,
}


def saved_form(text: str) -> str:
    """What a database can hold of a text: NUL and lone surrogates become U+FFFD."""
    return UNWANTED.sub("\ufffd", text)


def expected_text(model: str) -> ExpectedText:
    """What one undisturbed reading of a model's answer must be saved as, up to its first fault."""
    thinking, content = [], []
    for step in Script.parse(model).steps():
        if step.kind in FAULTS:
            break
        if step.kind == "content":
            content.append(step.text)
        elif step.kind == "thinking" and not content:
            thinking.append(step.text)
    return ExpectedText(saved_form("".join(thinking)), saved_form("".join(content)))


# The record


@dataclass
class ChatRecord:
    """One request for a chat. Times are wall-clock seconds; those in `_monotonic` are `time.monotonic()`'s."""

    id: int
    model: str
    messages: list[dict[str, Any]]
    options: dict[str, Any] | None = None
    think: bool | str | None = None
    keep_alive: str | int | None = None
    received_at: float = 0.0
    headers_sent_at: float | None = None
    first_token_at: float | None = None
    ended_at: float | None = None
    disconnected_at: float | None = None
    disconnected_at_monotonic: float | None = None
    tokens_sent: int = 0  # whole content tokens
    thinking_tokens_sent: int = 0
    bytes_sent: int = 0
    outcome: Literal["completed", "disconnected", "fault"] | None = None  # None while it runs

    @property
    def prefill(self) -> str | None:
        """The beginning of the answer that the request asked to go on with."""
        last = self.messages[-1] if self.messages else {}
        return str(last.get("content") or "") or None if last.get("role") == "assistant" else None


@dataclass
class _Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


# The server


class _Aborted(Exception):
    """The script says that the connection ends here."""


class UpstreamServer:
    """The server itself; lives in one event loop."""

    def __init__(self, models: tuple[str, ...] = MODELS) -> None:
        self.models = models
        self._records: list[ChatRecord] = []
        self._open: dict[int, asyncio.StreamWriter] = {}
        self._chat_connections: set[asyncio.StreamWriter] = set()
        self._last_id = 0

    async def listen(self, host: str, port: int) -> asyncio.Server:
        """Begin to serve; `port` 0 takes a free one."""
        return await asyncio.start_server(self._connection, host, port, backlog=1024)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while (request := await _read_request(reader)) and await self._answer(request, reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, asyncio.CancelledError):
            pass  # a client has gone, or the server stops; asyncio would log a cancelled connection as an error
        finally:
            self._chat_connections.discard(writer)
            writer.close()

    async def _answer(self, request: _Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; whether the connection may serve another."""
        match request.method, request.path:
            case "POST", "/api/chat":
                return await self._chat(request, reader, writer)
            case (("GET" | "HEAD"), "/"):
                return _reply(writer, 200, "Ollama is running", request.method)
            case "GET", "/api/version":
                return _reply(writer, 200, {"version": VERSION})
            case "GET", "/api/tags":
                return _reply(writer, 200, {"models": [_tag(name) for name in self.models]})
            case "GET", "/_record":
                return _reply(writer, 200, [dataclasses.asdict(record) for record in self._records])
            case "GET", "/_record/open":
                return _reply(writer, 200, {"open": len(self._open), "connections": len(self._chat_connections)})
            case "POST", "/_reset":
                self._reset()
                return _reply(writer, 200, {})
        return _reply(writer, 404, {"error": "404 page not found"})

    def _reset(self) -> None:
        for writer in list(self._chat_connections):
            writer.transport.abort()
        self._records = []

    async def _chat(self, request: _Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        try:
            record = self._new_record(json.loads(request.body))
            script = Script.parse(record.model)
        except (ValueError, KeyError) as error:
            return _reply(writer, 400, {"error": str(error)})
        self._records.append(record)
        self._open[record.id] = writer
        self._chat_connections.add(writer)
        try:
            return await self._until_disconnect(_Chat(record, script, writer), reader)
        finally:
            del self._open[record.id]

    def _new_record(self, body: dict[str, Any]) -> ChatRecord:
        self._last_id += 1
        return ChatRecord(
            id=self._last_id,
            model=body["model"],
            messages=body.get("messages", []),
            options=body.get("options"),
            think=body.get("think"),
            keep_alive=body.get("keep_alive"),
            received_at=time.time(),
        )

    @staticmethod
    async def _until_disconnect(chat: _Chat, reader: asyncio.StreamReader) -> bool:
        """Run the chat beside a watch over the read side, which ends when the client goes, whatever the chat does."""
        playing = asyncio.create_task(chat.play())
        watching = asyncio.create_task(_end_of_input(reader))
        await asyncio.wait({playing, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not playing.done():
            chat.client_left()
        watching.cancel()
        playing.cancel()
        await asyncio.wait({playing, watching})
        return not playing.cancelled() and playing.exception() is None and playing.result()


async def _end_of_input(reader: asyncio.StreamReader) -> None:
    with contextlib.suppress(ConnectionError):
        while await reader.read(4096):
            pass


class _Chat:
    """One chat on its way out."""

    def __init__(self, record: ChatRecord, script: Script, writer: asyncio.StreamWriter) -> None:
        self.record = record
        self.script = script
        self._writer = writer
        self._next_token_due = 0.0
        self._unpaced_tokens = 0
        self._owed = b""  # the second half of a line

    def client_left(self) -> None:
        """Note the disconnect, now."""
        self.record.disconnected_at, self.record.disconnected_at_monotonic = time.time(), time.monotonic()
        self._end("disconnected")

    async def play(self) -> bool:
        """Do all that the script says; whether the connection is still good."""
        try:
            return await self._play()
        except _Aborted:
            self._end("fault")
            return False
        except ConnectionError:
            self.client_left()
            return False

    async def _play(self) -> bool:
        if self.record.model == "unknown":
            return self._refuse(404, "model 'unknown' not found")
        await asyncio.sleep(self.script.load_seconds)
        if self.script.http_status != 200:
            return await self._refuse_as_scripted()
        await self._send_head()
        self.record.headers_sent_at = time.time()
        await asyncio.sleep(self.script.first_token_silence)
        self._next_token_due = time.monotonic()
        reason = await self._say_everything()
        if not self.script.end_without_done and reason:
            await self._finish(reason)
        self._send(b"0\r\n\r\n")
        await self._writer.drain()
        self._end("completed" if reason else "fault")
        return True

    async def _send_head(self) -> None:
        head = _HEAD[:-2] + b"X-More: 1\r\n" * self.script.head_lines + b"\r\n"
        if not self.script.head_byte_seconds:
            return self._send(head)
        for byte in head:
            self._send(bytes([byte]))
            await asyncio.sleep(self.script.head_byte_seconds)
        return None

    async def _finish(self, reason: str) -> None:
        self._line(self._done(reason))
        if self.script.after_done:
            self._line(self._message(Step("content", "after the end ")))
            self._line(self._done(reason))
        if self.script.closes_late:
            await asyncio.Event().wait()

    async def _say_everything(self) -> str:
        """Take every step; answers the `done_reason`, or nothing where an error line was the end."""
        limit = (self.record.options or {}).get("num_predict") or 0
        said = 0
        prefill, think = self.record.prefill, self.record.think is not False
        for step in self.script.steps(prefill=prefill, think=think):
            if step.kind == "error":
                self._line({"error": step.text})
                return ""
            if step.kind in ("content", "thinking"):
                if 0 < limit <= said:
                    return "length"
                said += 1
            await self._take(step)
        return self.script.done_reason

    async def _take(self, step: Step) -> None:
        match step.kind:
            case "silence":
                await asyncio.sleep(step.seconds)
                self._next_token_due = time.monotonic()
            case "malformed":
                self._chunks(step.text.encode() + b"\n")
            case "half":
                line = _encode(self._message(step)) + b"\n"
                cut = next((index + 1 for index, byte in enumerate(line) if byte > 127), len(line) // 2)
                self._chunks(line[:cut])
                self._owed = line[cut:]
            case "bad_chunk":
                self._send(b"zz\r\n")
                await self._abort(step.kind)
            case "endless_line":
                self._chunks(b'{"message":{"content":"')
                await self._for_ever(b"x" * 65_536)
            case "flood":
                await self._for_ever(b"{}\n" * 20_000)
            case "reset" | "close":
                await self._abort(step.kind)
            case _:
                await self._say(step)

    async def _say(self, step: Step) -> None:
        await self._await_turn()
        if self._owed:
            self._chunks(self._owed)
            self._owed = b""
        else:
            self._line(self._message(step))
        self.record.first_token_at = self.record.first_token_at or time.time()
        if step.kind == "content":
            self.record.tokens_sent += 1
        elif step.kind == "thinking":
            self.record.thinking_tokens_sent += 1
        await self._writer.drain()

    async def _await_turn(self) -> None:
        """Keep the pace by the clock, not by adding up waits, so that it holds on a busy machine."""
        if not self.script.pace:
            self._unpaced_tokens += 1
            if self._unpaced_tokens % 32 == 0:
                await asyncio.sleep(0)  # or nobody else would get a turn while the socket takes everything
            return
        if (wait_seconds := self._next_token_due - time.monotonic()) > 0:
            await asyncio.sleep(wait_seconds)
        self._next_token_due += 1 / self.script.pace

    async def _for_ever(self, data: bytes) -> None:
        chunk = b"%x\r\n%b\r\n" % (len(data), data)
        while True:
            self._send(chunk)
            await self._writer.drain()
            await asyncio.sleep(0)  # a drain that need not wait gives nobody else a turn

    async def _abort(self, kind: str) -> None:
        await self._writer.drain()
        if kind == "reset":
            connection = self._writer.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._writer.transport.abort()
        raise _Aborted(kind)

    def _message(self, step: Step) -> dict[str, Any]:
        text = {"content": "", "thinking": step.text} if step.kind == "thinking" else {"content": step.text}
        return self._envelope() | {"message": {"role": "assistant", **text}, "done": False}

    def _envelope(self) -> dict[str, Any]:
        return {"model": self.record.model, "created_at": _timestamp()}

    def _done(self, reason: str) -> dict[str, Any]:
        total_ns = int((time.time() - self.record.received_at) * 1e9)
        load_ns = int(self.script.load_seconds * 1e9)
        prompt = sum(len(str(message.get("content", ""))) for message in self.record.messages)
        return self._envelope() | {
            "message": {"role": "assistant", "content": ""},
            "done": True,
            "done_reason": reason,
            "total_duration": total_ns,
            "load_duration": load_ns,
            "prompt_eval_count": max(1, prompt // 4),
            "prompt_eval_duration": 1_000_000,
            "eval_count": self.record.tokens_sent + self.record.thinking_tokens_sent,
            "eval_duration": max(1, total_ns - load_ns),
        }

    def _line(self, value: dict[str, Any]) -> None:
        self._chunks(_encode(value) + b"\n")

    def _chunks(self, line: bytes) -> None:
        size_bytes = self.script.split_bytes or len(line)
        for start in range(0, len(line), size_bytes):
            piece = line[start : start + size_bytes]
            self._send(b"%x\r\n%b\r\n" % (len(piece), piece))

    def _send(self, data: bytes) -> None:
        if self._writer.transport.is_closing():
            raise ConnectionResetError
        self._writer.write(data)
        self.record.bytes_sent += len(data)

    def _refuse(self, status: int, error: str) -> bool:
        self._end("fault")
        return _reply(self._writer, status, {"error": error})

    async def _refuse_as_scripted(self) -> bool:
        status, error = self.script.http_status, f"scripted status {self.script.http_status}"
        if self.script.refusal == "json" and not 300 <= status < 400:
            return self._refuse(status, error)
        endless = self.script.refusal in ("huge", "stalled")
        body = {"html": f"<h1>{error}</h1>", "empty": ""}.get(self.script.refusal, error).encode()
        size_bytes = 10**12 if endless else len(body)
        self._send(b"HTTP/1.1 %d Scripted\r\nLocation: /api/chat\r\nContent-Length: %d\r\n\r\n" % (status, size_bytes))
        self._send(body)
        while endless:
            if self.script.refusal == "stalled":
                await asyncio.Event().wait()
            self._send(b"x" * 65_536)
            await self._writer.drain()
            await asyncio.sleep(0)
        self._end("fault")
        return True

    def _end(self, outcome: Literal["completed", "disconnected", "fault"]) -> None:
        if self.record.outcome is None:
            self.record.outcome, self.record.ended_at = outcome, time.time()


_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"


async def _read_request(reader: asyncio.StreamReader) -> _Request | None:
    head = await _read_head(reader)
    if not head:
        return None
    first, *lines = head.decode("latin-1").split("\r\n")
    method, path, _ = first.split(" ", 2)
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length") or 0))
    return _Request(method, path.partition("?")[0], headers, body)


async def _read_head(reader: asyncio.StreamReader) -> bytes:
    try:
        return (await reader.readuntil(b"\r\n\r\n"))[:-4]
    except asyncio.IncompleteReadError:
        return b""


def _reply(writer: asyncio.StreamWriter, status: int, value: Any, method: str = "GET") -> bool:
    body = value.encode() if isinstance(value, str) else json.dumps(value).encode()
    kind = "text/plain" if isinstance(value, str) else "application/json"
    head = f"HTTP/1.1 {status} Scripted\r\nContent-Type: {kind}; charset=utf-8\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + (b"" if method == "HEAD" else body))
    return True


_WITH_UTF8 = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
_WITH_ESCAPES = json.JSONEncoder(separators=(",", ":"))


def _encode(value: dict[str, Any]) -> bytes:
    try:
        return _WITH_UTF8.encode(value).encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # a lone surrogate has no UTF-8; JSON can still escape it
        return _WITH_ESCAPES.encode(value).encode()


def _timestamp() -> str:
    now = time.time()
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1e6):06d}Z"


def _tag(name: str) -> dict[str, Any]:
    details = {"format": "gguf", "family": "sluice", "parameter_size": "1B", "quantization_level": "Q4_0"}
    return {"name": name, "model": name, "modified_at": _timestamp(), "size": 1, "digest": "0" * 64, "details": details}


# The tests' side


class Upstream:
    """A running server, seen from a test."""

    def __init__(self, url: str) -> None:
        self.url = url
        # Not through a proxy, whatever the environment says.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def requests(self, model: str | None = None) -> list[ChatRecord]:
        """The chats so far, the oldest first; of one model, if named."""
        records = [ChatRecord(**item) for item in self._call("GET", "/_record")]
        return [record for record in records if model in (None, record.model)]

    def open_count(self) -> int:
        """Chats that are going on."""
        return int(self._call("GET", "/_record/open")["open"])

    def connection_count(self) -> int:
        """Connections that have carried a chat and are still open, idle ones of a client's pool included."""
        return int(self._call("GET", "/_record/open")["connections"])

    def reset(self) -> None:
        """Cut every chat's connection and forget all records."""
        self._call("POST", "/_reset")

    def wait_until(
        self, predicate: Callable[[list[ChatRecord]], Answer], timeout_seconds: float = 10.0, what: str = ""
    ) -> Answer:
        """Wait until `predicate`, given all the records, answers something true; return that answer."""

        def check() -> Answer:
            return predicate(self.requests())

        return wait_until(check, timeout_seconds, what or "the upstream's record is as expected")

    def _call(self, method: str, path: str) -> Any:
        request = urllib.request.Request(self.url + path, method=method)
        with self._opener.open(request, timeout=10) as response:
            return json.load(response)


class UpstreamProcess(Upstream):
    """The scripted upstream in a process of its own, on a port that it keeps over restarts."""

    def __init__(self, log_path: Path) -> None:
        port = free_port()
        super().__init__(f"http://{HOST}:{port}")
        command = [sys.executable, "-m", "tests.upstream", "--port", str(port)]
        self.process = LocalProcess("upstream", command, log_path=log_path, ready_prompt=f"{port}\n")

    def start(self) -> None:
        """Start it, if it does not run, wake it, if it is frozen, and wait until it listens."""
        self.process.resume()
        self.process.start()
        self.process.await_ready()


@contextlib.contextmanager
def running_upstream(models: tuple[str, ...] = MODELS) -> Iterator[Upstream]:
    """Serve in a thread of this process for the time of the block."""
    started: queue.SimpleQueue[tuple[int, Callable[[], object]]] = queue.SimpleQueue()

    async def serve() -> None:
        loop, stop = asyncio.get_running_loop(), asyncio.Event()
        async with _listening(HOST, 0, models) as port:
            started.put((port, lambda: loop.call_soon_threadsafe(stop.set)))
            await stop.wait()

    thread = threading.Thread(target=asyncio.run, args=(serve(),), daemon=True)
    thread.start()
    port, stop = started.get(timeout=10)
    try:
        yield Upstream(f"http://{HOST}:{port}")
    finally:
        stop()
        thread.join(10)


@contextlib.asynccontextmanager
async def _listening(host: str, port: int, models: tuple[str, ...]) -> AsyncIterator[int]:
    server = await UpstreamServer(models).listen(host, port)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def _serve_for_ever(host: str, port: int, models: tuple[str, ...]) -> None:
    async with _listening(host, port, models) as number:
        print(number, flush=True)
        await asyncio.Event().wait()


def main() -> None:
    """Serve until killed; print the port first."""
    parser = argparse.ArgumentParser(description="a scripted server that speaks Ollama's protocol")
    parser.add_argument("--host", default=HOST)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--models", default=",".join(MODELS), help="names that /api/tags lists, separated by commas")
    arguments = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve_for_ever(arguments.host, arguments.port, tuple(arguments.models.split(","))))


if __name__ == "__main__":
    main()
