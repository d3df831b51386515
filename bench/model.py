"""A model's server for measuring: Ollama's protocol at a set pace, in which each token says when it was sent.

    python -m bench.model --port 0

The tests' own server decides about single bytes, which costs time for each token; this one only speaks. A model's name
is its script: `name=s1,pace=50,tokens=1000,silent_at=20`. `pace` is tokens a second, 0 is as fast as they are taken;
before the token `silent_at` it says nothing for `silence` seconds. A token is `~`, the microseconds of
`time.monotonic()` at which it was written, and a space: whoever reads it knows how old it is. When a client goes is
noted at once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from dataclasses import asdict, dataclass
from typing import Any, Final

from tests.services import HOST

BLOCK_TOKENS: Final = 64
"""That a model without a pace says at a time."""
TOKEN_CHARACTERS: Final = 15
"""Of one: `~`, thirteen digits, a space."""

_HEAD: Final = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"
_LINE: Final = b'{"model":"bench","created_at":"2026-01-01T00:00:00.000000Z","message":{"role":"assistant","content":"'
_TOKEN: Final = _LINE + b'~%013d "},"done":false}\n'
_DONE: Final = _LINE + b'"},"done":true,"done_reason":"stop","total_duration":1,"prompt_eval_count":1,"eval_count":1}\n'


@dataclass
class Chat:
    """What is known of one; times are those of `time.monotonic()`, in seconds."""

    name: str
    opened_at: float
    closed_at: float | None = None
    """When its client went, before the end."""
    tokens: int = 0


@dataclass(frozen=True)
class Script:
    """How a chat goes."""

    name: str = ""
    pace: float = 50.0
    tokens: int = 1000
    silent_at: int = -1
    silence: float = 15.0
    """Seconds."""

    @classmethod
    def parse(cls, model: str) -> Script:
        """Read a model's name.

        Raises:
            ValueError: a word has no number. TypeError: a word is unknown.
        """
        words = dict(word.split("=", 1) for word in model.split(",") if "=" in word)
        types = {"name": str, "pace": float, "silence": float}
        return cls(**{key: types.get(key, int)(value) for key, value in words.items()})  # type: ignore[arg-type]


class Speaker(asyncio.Protocol):
    """One connection."""

    def __init__(self, chats: dict[str, Chat]) -> None:
        self._chats = chats
        self._received = b""
        self._chat: Chat | None = None
        self._timer: asyncio.TimerHandle | asyncio.Handle | None = None
        self._may_write = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, separator, body = self._received.partition(b"\r\n\r\n")
        if not separator:
            return
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        size_bytes = int(headers.get("content-length", 0))
        if len(body) < size_bytes:
            return
        self._received = body[size_bytes:]
        method, path, _ = first.split(" ", 2)
        if (method, path) == ("POST", "/api/chat"):
            self._begin(Script.parse(json.loads(body[:size_bytes])["model"]))
        elif path.startswith("/_record/"):
            chat = self._chats.get(path.removeprefix("/_record/"))
            self._answer(asdict(chat) if chat else None)
        else:
            self._answer({"version": "0.12.6", "models": []})

    def _answer(self, value: Any) -> None:
        body = json.dumps(value).encode()
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        self._transport.write(head.encode() + body)

    def _begin(self, script: Script) -> None:
        self._script = script
        self._loop = asyncio.get_running_loop()
        self._began_at = self._loop.time()
        self._chat = self._chats[script.name] = Chat(script.name, time.monotonic())
        self._transport.write(_HEAD)
        self._go_on()

    def _go_on(self) -> None:
        """Say what is due, and come back for the rest."""
        chat, script = self._chat, self._script
        assert chat
        if chat.tokens == script.silent_at:
            self._began_at += script.silence
            self._script = Script(script.name, script.pace, script.tokens)
            self._timer = self._loop.call_later(script.silence, self._go_on)
            return
        # By the clock, and not by adding up waits, so that a busy machine does not slow it down.
        in_time = 1 + int((self._loop.time() - self._began_at) * script.pace)
        due = min(in_time if script.pace else chat.tokens + BLOCK_TOKENS, script.tokens)
        if script.silent_at >= 0:
            due = min(due, script.silent_at)
        if due > chat.tokens:
            line = _TOKEN % (time.monotonic() * 1e6)
            self._transport.write(b"%x\r\n%b\r\n" % (len(line), line) * (due - chat.tokens))
            chat.tokens = due
        if chat.tokens >= script.tokens:
            self._transport.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(_DONE), _DONE))
            self._chat = None
        elif script.pace:
            self._timer = self._loop.call_at(self._began_at + chat.tokens / script.pace, self._go_on)
        elif self._may_write:
            self._timer = self._loop.call_soon(self._go_on)

    def pause_writing(self) -> None:
        self._may_write = False

    def resume_writing(self) -> None:
        self._may_write = True
        if self._chat and not self._script.pace:
            self._timer = self._loop.call_soon(self._go_on)

    def eof_received(self) -> bool:
        return False  # whoever sends no more has gone

    def connection_lost(self, error: Exception | None) -> None:
        if self._timer:
            self._timer.cancel()
        if self._chat:
            self._chat.closed_at = time.monotonic()
            self._chat = None


async def serve(port: int) -> None:
    """Serve until cancelled; prints the port."""
    chats: dict[str, Chat] = {}
    server = await asyncio.get_running_loop().create_server(lambda: Speaker(chats), HOST, port, backlog=2048)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--port", type=int, default=0)
    asyncio.run(serve(parser.parse_args().port))
