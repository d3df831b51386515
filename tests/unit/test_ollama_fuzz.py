"""The upstream's parser is told anything: it ends as documented, the same however the bytes were cut.

`make fuzz-parser` is the same with more examples and another seed: SLUICEGATE_FUZZ_EXAMPLES for each test, and
SLUICEGATE_FUZZ_SEED, which repeats a run.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, assume, given, seed, settings
from hypothesis import strategies as st

from tests.services import HOST
from webapp.streams.lifecycle import TerminationReason
from workers.ollama import ChatEnd, ChatRequest, OllamaService, UpstreamError

EXAMPLES: Final = int(os.environ.get("SLUICEGATE_FUZZ_EXAMPLES", "200"))
SEED: Final = int(os.environ.get("SLUICEGATE_FUZZ_SEED", "7"))
LINE_LIMIT_BYTES: Final = 400
ANSWER_LIMIT_CHARACTERS: Final = 30
UNSTORABLE: Final = re.compile("[\0\ud800-\udfff]")


def fuzz(test: Callable[..., None]) -> Callable[..., None]:
    """As often as was asked for; not the same in each run only where another seed is given."""
    made = settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
    )(test)
    return pytest.mark.timeout(120 + EXAMPLES // 5)(seed(SEED)(made))


# What a server may say

texts = st.text(st.characters(exclude_categories=()), max_size=12)  # surrogates, NUL and all planes included
figures = st.one_of(st.integers(), st.integers(-(10**400), 10**400), st.floats(), st.booleans(), st.none(), texts)
values = st.recursive(
    figures, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=6
)
messages = st.fixed_dictionaries({}, optional={"role": texts, "content": texts, "thinking": texts, "odd": values})
objects = st.fixed_dictionaries(
    {"message": messages | values},
    optional={
        "done": st.sampled_from([False, True, 1, "true", None]),
        "done_reason": st.sampled_from(["stop", "length", "load"]) | values,
        "eval_count": figures,
        "total_duration": figures,
        "error": st.none() | values,
        "odd": values,
    },
)
pieces = st.builds(
    lambda key, text: {"message": {key: text}, "done": False}, st.sampled_from(["content", "thinking"]), texts
)
ends = st.sampled_from(
    [b'{"message":{"content":""},"done":true,"done_reason":"stop","eval_count":3}', b'{"done":true}']
)
blanks = st.sampled_from([b"", b" ", b"\r", b"\t \x0b", b"\xef\xbb\xbf"])
scraps = st.sampled_from(
    [b"null", b"[]", b"7", b'"text"', b"{", b"{}", b"nan", b"[" * 5000, b'{"a":' * 5000, b"x" * 500, b"<html>", b"\0"]
)


def spelled(value: Any, escaped: bool, end: bytes) -> bytes:
    """An object as JSON, in one of the ways to write it."""
    try:
        return json.dumps(value, ensure_ascii=escaped).encode() + end
    except UnicodeEncodeError:  # a surrogate, which has no UTF-8
        return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass") + end


objects_as_lines = st.builds(
    spelled, objects | pieces | pieces, st.booleans(), st.sampled_from([b"", b"", b"\r", b" "])
)
lines = st.one_of(objects_as_lines, objects_as_lines, objects_as_lines, ends, blanks, scraps, st.binary(max_size=20))
streams = st.lists(lines, max_size=12).map(b"\n".join) | st.lists(lines, max_size=12).map(
    lambda all_: b"\n".join([*all_, b""])
)


@st.composite
def mutated(draw: st.DrawFn, sources: st.SearchStrategy[bytes]) -> bytes:
    """A stream of which some bytes were changed, taken out, doubled or put elsewhere."""
    data = bytearray(draw(sources))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(data)))
        end = draw(st.integers(start, min(len(data), start + 30)))
        match draw(st.integers(0, 3)):
            case 0:
                del data[start:end]
            case 1:
                data[start:start] = draw(st.binary(max_size=4))
            case 2:
                data[start:end] = data[start:end] * 2
            case 3:
                piece = bytes(data[start:end])
                del data[start:end]
                data[len(data) // 2 : len(data) // 2] = piece
    return bytes(data)


# Answers as a model gives them, too long ones and thinking after the content among them.
answers = st.builds(
    lambda said, end: b"\n".join([*said, end]),
    st.lists(st.builds(spelled, pieces, st.booleans(), st.just(b"")), max_size=8),
    ends,
)
bodies = answers | mutated(streams) | mutated(answers) | st.binary(max_size=200)


@st.composite
def cuts(draw: st.DrawFn, body: bytes) -> list[bytes]:
    """A body in chunks, none of them empty."""
    every = draw(st.integers(0, 3))
    if every:
        return [body[start : start + every] for start in range(0, len(body), every)]
    places = sorted(draw(st.sets(st.integers(0, len(body)), max_size=8)) | {0, len(body)})
    return [body[start:end] for start, end in itertools.pairwise(places)]


# What comes of it

Outcome = tuple[str, str, ChatEnd | str]


class Reading:
    """One reading of a body, and how much of it was taken."""

    def __init__(self, chunks: list[bytes]) -> None:
        self.chunks = chunks
        self.taken = b""
        self.pieces: list[tuple[str, str]] = []

    def _give(self) -> Iterator[bytes]:
        for chunk in self.chunks:
            self.taken += chunk
            yield chunk

    def outcome(self) -> Outcome:
        """Thinking, content, and the end or what a person is told. Any other error than ours is a failure."""
        service = OllamaService(
            "http://unused",
            connect_timeout_seconds=1,
            line_limit_bytes=LINE_LIMIT_BYTES,
            answer_limit_characters=ANSWER_LIMIT_CHARACTERS,
        )
        try:
            end: ChatEnd | str = service.read(self._give(), lambda *both: self.pieces.append(both))
        except UpstreamError as error:
            end = error.detail
        thinking, content = ("".join(parts) for parts in zip(*self.pieces, strict=True)) if self.pieces else ("", "")
        return thinking, content, end


class Refused(Exception):
    """The reference parser's one error; says what kind it is."""


def reference(body: bytes) -> tuple[str, str, Any]:
    """What a body says, by the shortest way to say so: all of it at once, line by line, character by character."""
    thinking = content = ""
    try:
        *whole, last = body.split(b"\n")
        for line in [*whole, *([last] if is_object(last) else [])]:
            if len(line) > LINE_LIMIT_BYTES:
                raise Refused("a line of over")
            if not line.strip():
                continue
            data = reference_object(line)
            if data.get("error") is not None:
                raise Refused("reported")
            message = data.get("message")
            message = message if isinstance(message, dict) else {}
            for kind in ("thinking", "content"):
                text = message.get(kind)
                for character in text if isinstance(text, str) and not (kind == "thinking" and content) else "":
                    if len(thinking + content) == ANSWER_LIMIT_CHARACTERS:
                        raise Refused("an answer of over")
                    storable = "\ufffd" if UNSTORABLE.match(character) else character
                    thinking, content = (
                        (thinking + storable, content) if kind == "thinking" else (thinking, content + storable)
                    )
            if data.get("done") is True:
                return thinking, content, "length" if data.get("done_reason") == "length" else "stop"
        raise Refused("a line of over" if len(last) > LINE_LIMIT_BYTES else "before the answer's end")
    except Refused as refused:
        return thinking, content, refused


def reference_object(line: bytes) -> dict[str, Any]:
    try:
        data = json.loads(line.decode("utf-8", "replace").removeprefix("\ufeff"), strict=False)
    except (ValueError, RecursionError):
        raise Refused("not JSON") from None
    if not isinstance(data, dict):
        raise Refused("not a JSON object")
    return data


def is_object(last: bytes) -> bool:
    try:
        return len(last) <= LINE_LIMIT_BYTES and bool(last.strip()) and bool(reference_object(last) or True)
    except Refused:
        return False


def assert_agrees(outcome: Outcome, body: bytes) -> None:
    """As the reference has it, and fit to be stored."""
    thinking, content, expected = reference(body)
    assert outcome[:2] == (thinking, content)
    end = outcome[2]
    if isinstance(expected, Refused):
        assert isinstance(end, str)
        assert str(expected) in end
        assert 0 < len(end) < 500
        assert end.isprintable() or "\n" not in end
        assert not UNSTORABLE.search(end)
    else:
        assert isinstance(end, ChatEnd)
        assert end.reason is TerminationReason(expected)
        json.dumps(end.stats, allow_nan=False).encode()
    assert not UNSTORABLE.search(thinking + content)


@fuzz
@given(st.data())
def test_what_a_body_says_is_what_the_reference_says_however_it_is_cut(data: st.DataObject) -> None:
    body = data.draw(bodies)
    whole = Reading([body] if body else []).outcome()
    assert_agrees(whole, body)
    reading = Reading(data.draw(cuts(body)))
    assert reading.outcome() == whole
    # No more is taken than a line may have, and the chunk that was too much.
    longest = max(map(len, reading.chunks), default=0)
    assert len(reading.taken.rpartition(b"\n")[2]) <= LINE_LIMIT_BYTES + longest
    assert all(thinking or content for thinking, content in reading.pieces)


@fuzz
@given(st.data())
def test_what_was_handed_on_stays_as_more_comes(data: st.DataObject) -> None:
    """An answer that breaks off anywhere has said the beginning of what it would have said."""
    body = data.draw(bodies)
    cut = data.draw(st.integers(0, len(body)))
    thinking, content, _ = Reading([body] if body else []).outcome()
    part_thinking, part_content, end = Reading([body[:cut]] if cut else []).outcome()
    last = body[:cut].rpartition(b"\n")[2]
    assume(not is_object(last))  # a line that is whole by chance is taken as one at the end, and was to go on
    assert thinking.startswith(part_thinking)
    assert content.startswith(part_content)
    if isinstance(end, ChatEnd):
        assert (thinking, content) == (part_thinking, part_content)


# The same over a socket, with HTTP's own framing


class Server:
    """Answers each request with the bytes that were set last, and closes."""

    def __init__(self) -> None:
        self.wire = b""
        self._listener = socket.create_server((HOST, 0), backlog=64)
        self.url = f"http://{HOST}:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                with connection, contextlib.suppress(OSError):
                    said = b""
                    while b"}" not in said.partition(b"\r\n\r\n")[2]:
                        said += connection.recv(65_536)
                    connection.sendall(self.wire)

    def close(self) -> None:
        self._listener.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """One for all examples."""
    server = Server()
    yield server
    server.close()


heads = st.sampled_from(
    [
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 60\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n",
        b"HTTP/1.0 200\r\n\r\n",
        b"HTTP/1.1 503 Busy\r\nContent-Length: 9\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: /api/chat\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
        b"",
    ]
)


def framed(head: bytes, body: bytes) -> bytes:
    """With chunks, where the head promises some."""
    if b"chunked" not in head:
        return head + body
    parts = [body[start : start + 40] for start in range(0, len(body), 40)]
    return head + b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


@fuzz
@given(wire=mutated(st.builds(framed, heads, streams)))
def test_whatever_a_server_sends_ends_as_documented(server: Server, wire: bytes) -> None:
    """And soon: it has closed the connection."""
    server.wire = wire
    service = OllamaService(
        server.url,
        connect_timeout_seconds=5,
        line_limit_bytes=LINE_LIMIT_BYTES,
        answer_limit_characters=ANSWER_LIMIT_CHARACTERS,
    )
    said: list[str] = []
    began_at = time.monotonic()
    try:
        end = service.chat(ChatRequest("m", []), lambda *both: said.extend(both), lambda: None)
        told = json.dumps(end.stats, allow_nan=False)
    except UpstreamError as error:
        told = error.detail
    assert time.monotonic() - began_at < 10
    assert 0 < len(told) < 1000
    assert len("".join(said)) <= ANSWER_LIMIT_CHARACTERS
    assert not UNSTORABLE.search("".join([*said, told]))
