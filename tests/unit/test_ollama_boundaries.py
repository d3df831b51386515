"""The upstream's client where single bytes matter: an answer that stalls, ends or breaks behind any byte of it."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import pytest

from tests.services import HOST, ROOT, clean_environment
from webapp.streams.lifecycle import TerminationReason
from workers.ollama import ChatEnd, ChatRequest, OllamaService, UpstreamError

Framing = Literal["chunked", "sized", "until close"]
FRAMINGS: tuple[Framing, ...] = ("chunked", "sized", "until close")
Then = Literal["go on", "close", "reset"]
STALL_SECONDS = 0.02
AT_ONCE = 40

# Characters of one to four bytes, some of which belong together; thinking, then content.
TEXT = (("hm é ", ""), ("", "t0 👩‍👩‍👧‍👦 "), ("", "𝔘\u0301 한"), ("", "!"))
LINES = [json.dumps({"message": {"thinking": a, "content": b}}, ensure_ascii=False).encode() for a, b in TEXT]
LINES += [b'{"message":{"content":""},"done":true,"done_reason":"stop","eval_count":4}']
BODY = b"\n".join(LINES) + b"\n"


@dataclass(frozen=True)
class Answer:
    """An answer on the wire, and how much of its body has come with each byte of it."""

    framing: Framing
    wire: bytes
    body_bytes: tuple[int, ...]
    """Indexed by the number of bytes sent."""

    @classmethod
    def framed(cls, framing: Framing) -> Answer:
        """BODY in one framing; the chunks are of 9 bytes, so that characters and lines are cut."""
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\n"
        head += {
            "chunked": b"Transfer-Encoding: chunked\r\n\r\n",
            "sized": b"Content-Length: %d\r\n\r\n" % len(BODY),
        }.get(framing, b"\r\n")
        if framing != "chunked":
            return cls(framing, head + BODY, (*[0] * len(head), *range(len(BODY) + 1)))
        wire, counts = bytearray(head), [0] * (len(head) + 1)
        for start in range(0, len(BODY), 9):
            piece = BODY[start : start + 9]
            size = b"%x\r\n" % len(piece)
            wire += size + piece + b"\r\n"
            counts += [start] * len(size) + [start + n + 1 for n in range(len(piece))] + [start + len(piece)] * 2
        wire += b"0\r\n\r\n"
        return cls(framing, bytes(wire), (*counts, *[len(BODY)] * 5))

    def heard_after(self, sent_bytes: int) -> tuple[str, str]:
        """The text of the lines that have come whole."""
        body_bytes = self.body_bytes[sent_bytes]
        whole = BODY[:body_bytes].count(b"\n")
        if self.framing == "until close" and BODY[body_bytes : body_bytes + 1] == b"\n":
            whole += 1  # where the close is the end, the last line needs no newline
        return "".join(a for a, _ in TEXT[:whole]), "".join(b for _, b in TEXT[:whole])

    def ends_with(self, sent_bytes: int) -> bool:
        """Whether so much of it and a close are a whole answer."""
        return self.body_bytes[sent_bytes] >= len(BODY) - (self.framing == "until close")


ANSWERS = {framing: Answer.framed(framing) for framing in FRAMINGS}


class StallingServer:
    """Answers each request with the first bytes of an answer, a pause, and then what is said."""

    def __init__(self, answer: Answer, then: Then) -> None:
        self.answer, self.then = answer, then
        self._listener = socket.create_server((HOST, 0), backlog=1024)
        self.url = f"http://{HOST}:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=[connection], daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sent_bytes = self._read_request(connection)
            connection.sendall(self.answer.wire[:sent_bytes])
            time.sleep(STALL_SECONDS)
            if self.then == "go on":
                connection.sendall(self.answer.wire[sent_bytes:])
            elif self.then == "reset":
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    @staticmethod
    def _read_request(connection: socket.socket) -> int:
        """The number of bytes that the request wants, which is the name of its model."""
        with connection.makefile("rb") as stream:
            size_bytes = 0
            while (header := stream.readline()) not in (b"\r\n", b""):
                if header.lower().startswith(b"content-length:"):
                    size_bytes = int(header.partition(b":")[2])
            return int(json.loads(stream.read(size_bytes))["model"])

    def close(self) -> None:
        self._listener.close()


@contextlib.contextmanager
def stalling(framing: Framing, then: Then) -> Iterator[StallingServer]:
    """A server for the time of the block."""
    server = StallingServer(ANSWERS[framing], then)
    try:
        yield server
    finally:
        server.close()


def ask(url: str, sent_bytes: int) -> tuple[tuple[str, str], ChatEnd | str]:
    """What is heard of an answer that is disturbed behind so many bytes, and how it ends."""
    service = OllamaService(
        url, connect_timeout_seconds=5, line_limit_bytes=1_048_576, answer_limit_characters=1_000_000
    )
    heard: list[tuple[str, str]] = []
    try:
        end: ChatEnd | str = service.chat(
            ChatRequest(str(sent_bytes), []), lambda *both: heard.append(both), lambda: None
        )
    except UpstreamError as error:
        end = error.detail
    return ("".join(a for a, _ in heard), "".join(b for _, b in heard)), end


def at_every_byte(server: StallingServer, check: Callable[[int], None]) -> None:
    """Try each boundary of the server's answer, many at a time."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        boundaries = range(len(server.answer.wire) + 1)
        assert len(list(pool.map(check, boundaries))) == len(boundaries) > 350


@pytest.mark.parametrize("framing", FRAMINGS)
class TestAPauseAtEveryByte:
    def test_and_it_goes_on(self, framing: Framing) -> None:
        """As if there had been none."""
        with stalling(framing, "go on") as server:

            def check(sent_bytes: int) -> None:
                heard, end = ask(server.url, sent_bytes)
                assert heard == ("hm é ", "t0 👩‍👩‍👧‍👦 𝔘\u0301 한!"), sent_bytes
                assert end == ChatEnd(TerminationReason.STOP, {"done_reason": "stop", "eval_count": 4}), sent_bytes

            at_every_byte(server, check)

    def test_and_it_is_closed(self, framing: Framing) -> None:
        """Whole lines count, and what is half there does not, nor does it become a text that nobody said."""
        with stalling(framing, "close") as server:

            def check(sent_bytes: int) -> None:
                heard, end = ask(server.url, sent_bytes)
                assert heard == server.answer.heard_after(sent_bytes), sent_bytes
                if server.answer.ends_with(sent_bytes):
                    assert isinstance(end, ChatEnd), (sent_bytes, end)
                else:
                    assert_cut_off(end)

            at_every_byte(server, check)

    def test_and_it_is_reset(self, framing: Framing) -> None:
        """As above, but a reset may overtake what was sent before it."""
        with stalling(framing, "reset") as server:

            def check(sent_bytes: int) -> None:
                heard, end = ask(server.url, sent_bytes)
                expected = server.answer.heard_after(sent_bytes)
                assert "".join(expected).startswith("".join(heard)), sent_bytes
                if isinstance(end, str):
                    assert_cut_off(end)
                else:
                    assert heard == expected, sent_bytes
                    assert server.answer.body_bytes[sent_bytes] == len(BODY), sent_bytes

            at_every_byte(server, check)


def assert_cut_off(end: ChatEnd | str) -> None:
    """It is said that the connection is to blame."""
    assert isinstance(end, str)
    assert "broke" in end or "closed the connection before the answer's end" in end, end


def test_a_stop_at_every_byte_frees_the_socket_at_once() -> None:
    """In a process that gevent has patched, as a worker's is: hundreds of silent answers, all killed together."""
    wires = [answer.wire.decode("latin-1") for answer in ANSWERS.values()]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_AT_EVERY_BYTE],
        input=json.dumps(wires),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=clean_environment(),
        timeout=60,
    )
    assert killed.returncode == 0, killed.stderr[-2000:]
    said = json.loads(killed.stdout)
    assert said["stalled"] == said["closed"] > 1000
    assert said["slowest_seconds"] < 5.0  # all of a thousand, on a busy machine


KILLED_AT_EVERY_BYTE = """
from gevent import monkey; monkey.patch_all()
import json, sys, time
import gevent
from gevent.server import StreamServer
from tests.services import wait_until
from workers.ollama import ChatRequest, OllamaService

wires = [text.encode("latin-1") for text in json.load(sys.stdin)]
stalled, closed = [], []

def serve(connection, address):
    said = b""
    while b"}" not in said.partition(b"\\r\\n\\r\\n")[2]:
        said += connection.recv(65536)
    which, sent_bytes = json.loads(said.partition(b"\\r\\n\\r\\n")[2])["model"].split(":")
    connection.sendall(wires[int(which)][: int(sent_bytes)])
    stalled.append(sent_bytes)
    try:
        connection.recv(1)
    except ConnectionResetError:
        pass
    closed.append(time.monotonic())

server = StreamServer(("127.0.0.1", 0), serve, backlog=2048)
server.start()
service = OllamaService(
    f"http://127.0.0.1:{server.server_port}",
    connect_timeout_seconds=20,
    line_limit_bytes=65536,
    answer_limit_characters=1000,
)
readers = []
for which, wire in enumerate(wires):
    for sent_bytes in range(wire.find(b'"done"')):
        request = ChatRequest(f"{which}:{sent_bytes}", [])
        readers.append(gevent.spawn(service.chat, request, lambda *_: None, lambda: None))
wait_until(lambda: len(stalled) == len(readers), 30)
gevent.sleep(0.2)
assert not closed and not any(reader.ready() for reader in readers)
began_at = time.monotonic()
gevent.killall(readers)
assert all(isinstance(reader.value, gevent.GreenletExit) for reader in readers)
wait_until(lambda: len(closed) == len(readers), 10)
print(json.dumps({"stalled": len(stalled), "closed": len(closed), "slowest_seconds": max(closed) - began_at}))
"""
