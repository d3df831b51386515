"""The model's server misbehaves, in every way at once: each stream ends as it should, and troubles no other."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import psutil
import pytest

from tests.functional.ending import assert_ended
from tests.functional.nodes import Client, Reader, Stack
from tests.services import HOST, free_port, wait_until
from tests.upstream import UpstreamProcess, expected_text

IDLE: Mapping[str, float] = {"idleSeconds": 1.5}
UNHEARD: Mapping[str, float] = {"firstTokenSeconds": 1.5}
LINE_LIMIT_BYTES = 1_048_576
ANSWER_LIMIT_CHARACTERS = 50_000
MEMORY_BYTES = 60_000_000
"""What all the faults together may cost a worker. Several never end."""


@dataclass(frozen=True)
class Case:
    """What an upstream does, and what a person is told of it."""

    model: str
    reason: str = "upstream_error"
    detail: str | None = None
    timeouts: Mapping[str, float] = field(default_factory=dict)
    left: bool = False
    """Whether it was we who left: the upstream would have gone on."""


CASES = {
    # It refuses
    "a model that is not there": Case("unknown", detail="answered 404: model 'unknown' not found"),
    "no permission": Case("http_status=401", detail="answered 401: scripted status 401"),
    "too often": Case("http_status=429", detail="answered 429: scripted status 429"),
    "a fault of its own": Case("http_status=500", detail="answered 500: scripted status 500"),
    "busy": Case("http_status=503", detail="answered 503: scripted status 503"),
    "a refusal in HTML": Case("http_status=502,refusal=html", detail="answered 502: <h1>scripted status 502</h1>"),
    "a refusal without a word": Case("http_status=500,refusal=empty", detail="answered 500: Scripted"),
    "a refusal without end": Case("http_status=500,refusal=huge", detail="answered 500: scripted", left=True),
    "a refusal that stalls": Case("http_status=503,refusal=stalled", detail="answered 503: scripted", left=True),
    "a redirect to itself": Case("http_status=307", detail="answered 307: it points to /api/chat"),
    "another redirect": Case("http_status=302,refusal=huge", detail="answered 302: it points to /api/chat", left=True),
    # It breaks off
    "a reset at once": Case("reset_at=0", detail="connection to the model's server broke"),
    "a reset in the middle": Case("reset_at=5", detail="connection to the model's server broke"),
    "a close in the middle": Case("close_at=5", detail="connection to the model's server broke"),
    "a reset in a character": Case("half_at=5,reset_at=5,alphabet=mixed", detail="broke"),
    "a close in a character": Case("half_at=5,close_at=5,alphabet=mixed", detail="broke"),
    "an end without done": Case("end_without_done", detail="closed the connection before the answer's end"),
    "a chunk of no size": Case("bad_chunk_at=5", detail="broke"),
    # It makes no sense
    "an error at first": Case("error_at=0", detail="reported: scripted error at 0"),
    "an error in the middle": Case("error_at=5", detail="reported: scripted error at 5"),
    "an error after it all": Case("error_at=20", detail="reported: scripted error at 20"),
    "no JSON": Case("malformed_at=5", detail="a line that is not JSON", left=True),
    "a head that is too long": Case("head_lines=200", detail="more than 100 headers", left=True),
    # It never ends
    "a line without end": Case("endless_line_at=5", detail=f"a line of over {LINE_LIMIT_BYTES} bytes", left=True),
    "an answer without end": Case(
        "tokens=100000000,pace=0", detail=f"an answer of over {ANSWER_LIMIT_CHARACTERS} characters", left=True
    ),
    "lines that say nothing": Case("flood_at=5", "idle_timeout", timeouts=IDLE, left=True),
    "nothing but such lines": Case("flood_at=0", "first_token_timeout", timeouts=UNHEARD, left=True),
    # It falls silent
    "no head": Case("load_seconds=60", "first_token_timeout", timeouts=UNHEARD, left=True),
    "a slow head": Case("head_byte_seconds=0.2", "first_token_timeout", timeouts=UNHEARD, left=True),
    "no token": Case("first_token_silence=60", "first_token_timeout", timeouts=UNHEARD, left=True),
    "no more tokens": Case("silence_at=5:60", "idle_timeout", timeouts=IDLE, left=True),
    "a silence in a character": Case(
        "half_at=5,silence_at=5:60,alphabet=mixed", "idle_timeout", timeouts=IDLE, left=True
    ),
    "a silence in the first character": Case(
        "half_at=0,silence_at=0:60,alphabet=mixed", "first_token_timeout", timeouts=UNHEARD, left=True
    ),
    "no done": Case("silence_at=20:60", "idle_timeout", timeouts=IDLE, left=True),
    # It is odd, and understood
    "a pause in a character": Case("half_at=5,silence_at=5:0.5,alphabet=mixed", "stop"),
    "byte by byte": Case("split_bytes=1,alphabet=mixed,thinking=3", "stop"),
    "what is not UTF-8": Case("invalid_at=5,split_bytes=1,alphabet=mixed", "stop"),
    "what cannot be stored": Case("nul_at=3,surrogate_at=5", "stop"),
    "a head byte by byte": Case("head_byte_seconds=0.005", "stop"),
    "more after done": Case("after_done", "stop"),
    "a late close": Case("closes_late", "stop", left=True),
}
NEIGHBOUR = "name=neighbour,pace=20,tokens=60,alphabet=mixed"
NEIGHBOUR_PAUSE_SECONDS = 2.0


@pytest.fixture(scope="module")
def stack_settings() -> Mapping[str, str]:
    return {
        "SLUICEGATE_ANSWER_LIMIT_CHARACTERS": str(ANSWER_LIMIT_CHARACTERS),
        "SLUICEGATE_LEASE_RENEW_SECONDS": "0.1",
    }


def begin(client: Client, name: str, case: Case) -> tuple[dict[str, Any], Reader]:
    """A stream whose upstream acts so, and its reader."""
    model = f"name={name.replace(' ', '-')},{case.model}" if case.model != "unknown" else case.model
    session = client.post_message("go on", model=model, timeouts=case.timeouts)
    return session, client.follow(session["sessionId"])


def test_each_of_them(stack: Stack, client: Client, upstream: UpstreamProcess) -> None:
    """All at once, in one worker, beside a stream to which nothing happens."""
    worker = psutil.Process(stack.worker.container.process.pid)
    steady = client.post_message("go on", model=NEIGHBOUR)
    neighbour = client.follow(steady["sessionId"])
    neighbour.wait_for_text(5)
    before_bytes = worker.memory_info().rss
    with ThreadPoolExecutor(8) as pool:
        begun = dict(zip(CASES, pool.map(lambda item: begin(client, *item), CASES.items()), strict=True))
    for name, case in CASES.items():
        session, reader = begun[name]
        reader.wait_until_done()
        check(stack, client, upstream, name, case, session, reader)
    assert neighbour.wait_until_done()["reason"] == "stop"
    assert neighbour.text == expected_text(NEIGHBOUR).content
    arrivals = [event.received_at for event in neighbour.of("message")]
    assert max(b - a for a, b in zip(arrivals, arrivals[1:], strict=False)) < NEIGHBOUR_PAUSE_SECONDS  # noqa: RUF007
    assert worker.memory_info().rss - before_bytes < MEMORY_BYTES
    wait_until(lambda: upstream.connection_count() == 0, 5, "no connection to the upstream is left")


def check(
    stack: Stack,
    client: Client,
    upstream: UpstreamProcess,
    name: str,
    case: Case,
    session: dict[str, Any],
    reader: Reader,
) -> None:
    """It ended for its reason, with what had come, and a person is told why."""
    row = assert_ended(stack, upstream, session, [reader], case.reason)
    message = client.message(session)
    assert (row.detail is None) == (case.detail is None), name
    assert (case.detail or "") in (row.detail or ""), name
    assert message["detail"] == client.stream(session["sessionId"])["detail"] == row.detail
    if name == "an answer without end":
        assert len(reader.text) == ANSWER_LIMIT_CHARACTERS
        assert expected_text("tokens=20000").content.startswith(reader.text)
    elif "http_status" in case.model or case.model == "unknown":
        assert (reader.text, reader.thinking) == ("", "")
    else:
        thinking, content = expected_text(row.model)
        whole = case.reason == "stop" or any(word in case.model for word in ("_at=20", "end_without", "error_at"))
        cut = content if whole else before_the_fault(row.model)
        assert (reader.thinking, reader.text) == (thinking, cut), name
    assert row.upstream_closed_at is not None
    assert row.ended_at is not None
    assert row.upstream_closed_at <= row.ended_at
    (record,) = upstream.requests(row.model)  # no redirect was followed, and nothing was tried again
    assert record.outcome in (("disconnected",) if case.left else ("completed", "fault")), name
    if "endless_line" in case.model:
        assert record.bytes_sent < 20_000_000  # what lies in the sockets' buffers


def before_the_fault(model: str) -> str:
    """The tokens before the one at which the script does something; none where it is never heard."""
    words = dict(word.partition("=")[::2] for word in model.split(","))
    indices = [int(value.partition(":")[0]) for word, value in words.items() if word.endswith("_at")]
    heard = "load_seconds" not in model and "head_" not in model and "first_token" not in model
    alphabet = words.get("alphabet", "plain")
    return expected_text(f"tokens={min(indices)},alphabet={alphabet}").content if heard and indices else ""


def test_nobody_is_there(stack: Stack, client: Client, upstream: UpstreamProcess) -> None:
    upstream.process.kill()
    session = client.post_message("go on", model="tokens=3")
    reader = client.follow(session["sessionId"])
    assert reader.wait_until_done()["reason"] == "upstream_error"
    told = client.stream(session["sessionId"])["detail"]
    assert told == f"The model's server at {upstream.url} refused the connection: is it running?"
    upstream.start()
    again = client.retry_stream(session["sessionId"])
    assert client.follow(again["sessionId"]).wait_until_done()["reason"] == "stop"


STOPPED = {
    "no head": "load_seconds=60",
    "a slow head": "head_byte_seconds=0.2",
    "half a line": "half_at=0,silence_at=0:60,alphabet=mixed",
    "half a line in the middle": "half_at=5,silence_at=5:60,alphabet=mixed",
    "lines that say nothing": "flood_at=5",
    "a refusal that stalls": "http_status=503,refusal=stalled",
    "no done": "silence_at=20:60",
}


def test_a_stop_in_each_of_them(stack: Stack, client: Client, upstream: UpstreamProcess) -> None:
    """The connection is closed at once, whatever the upstream is at."""
    begun = {name: begin(client, name, Case(model)) for name, model in STOPPED.items()}
    upstream.wait_until(lambda records: len(records) == len(STOPPED))
    for name, (session, reader) in begun.items():
        stopped_at = time.time()
        receipt = client.terminate(session["sessionId"])
        row = assert_ended(stack, upstream, session, [reader], receipt["reason"])
        if receipt["reason"] != "user":  # the refusal's status may have been enough of an answer meanwhile
            assert name == "a refusal that stalls"
            continue
        assert receipt["upstreamClosedAt"] is not None
        assert receipt["partialResponse"] == reader.text
        (record,) = upstream.requests(row.model)
        assert record.disconnected_at is not None
        assert record.disconnected_at - stopped_at < 1.5, name
    wait_until(lambda: upstream.connection_count() == 0, 5, "no connection to the upstream is left")


# The catalogue


class Catalogue:
    """A server that answers each request with the next of its answers, and the last one again and again."""

    def __init__(self) -> None:
        self.port = free_port()
        self.answers: list[tuple[bytes, str]] = []
        """What is sent, and what is done then."""
        self.requests = 0
        self._listener = socket.create_server((HOST, self.port), backlog=64)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.requests += 1
                threading.Thread(target=self._serve, args=[connection], daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        wire, then = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        with connection, contextlib.suppress(OSError):
            connection.recv(65_536)
            connection.sendall(wire)
            if then == "reset":
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            elif then == "stall":
                connection.recv(1)
            while then in ("drip", "flood"):
                connection.sendall(b" " if then == "drip" else b" " * 65_536)
                if then == "drip":
                    time.sleep(0.5)

    def close(self) -> None:
        self._listener.close()


@pytest.fixture(scope="module")
def catalogue() -> Iterator[Catalogue]:
    catalogue = Catalogue()
    yield catalogue
    catalogue.close()


@pytest.fixture(scope="module")
def module_stack(module_stack: Stack, catalogue: Catalogue) -> Stack:
    """With a web process more, which takes the catalogue for the model's server."""
    module_stack.start_web(settings={"OLLAMA_BASE_URL": f"http://{HOST}:{catalogue.port}"})
    module_stack.keep()
    return module_stack


OK = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"
CATALOGUE_SECONDS = 6.0
"""Twice what the question may take."""
DOWN, STRANGE = "does not answer", "no list of models"
SLOW_CATALOGUES = [
    (b"", "stall"),
    (b"HTTP/1.1 200 OK\r\nContent-", "stall"),
    (OK + b'{"models":[', "stall"),
    (b"HTTP/1.1 200 OK\r\nX-Slow: ", "drip"),
    (OK, "drip"),
]
# What the server sends, what it does then, and what a person is told.
BAD_CATALOGUES = {
    "a body without end": (OK, "flood", "over 4194304 bytes"),
    "a close": (b"", "close", DOWN),
    "a reset": (b"HTTP/1.1 200 OK\r\n", "reset", DOWN),
    "no HTTP": (b"SSH-2.0-OpenSSH\r\n\r\n", "close", DOWN),
    "less than was promised": (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{}", "close", DOWN),
    "an error": (b"HTTP/1.1 500 No\r\n\r\n" + b'{"error":"out of memory"}', "close", "answered 500"),
    "busy": (b"HTTP/1.1 503 Busy\r\n\r\n", "stall", "answered 503"),
    "a redirect": (b"HTTP/1.1 302 Found\r\nLocation: /api/tags\r\n\r\n", "flood", "answered 302"),
    "HTML": (OK + b"<html>", "close", STRANGE),
    "nothing": (OK, "close", STRANGE),
    "null": (OK + b"null", "close", STRANGE),
    "another object": (OK + b'{"error":"x"}', "close", STRANGE),
    "no list": (OK + b'{"models":7}', "close", STRANGE),
    "nesting": (OK + b'{"models":' + b"[" * 100_000, "close", STRANGE),
    "a surrogate": (OK + rb'{"models":[{"name":"\ud800"}]}', "close", STRANGE),
}
GOOD = [
    {"name": "good:latest", "size": 7, "details": {"family": "llama"}, "odd": {"a": 1}},
    {"name": "odd", "size": 10**30, "details": "none"},
    {"name": "older", "size": True, "details": {"family": 7}},
    {"name": "nul\0"},
    {"name": "x" * 201},
    {"name": 7},
    {"size": 1},
    "text",
    None,
]


def ask_in_vain(client: Client) -> str:
    """What is told, and soon, of a catalogue that cannot be had."""
    began_at = time.monotonic()
    answer = client.request("GET", "/api/models")
    assert time.monotonic() - began_at < CATALOGUE_SECONDS
    assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
    assert answer.headers["Retry-After"]
    return str(answer.json()["detail"])


def test_a_catalogue_that_is_none(module_stack: Stack, catalogue: Catalogue) -> None:
    """It is said what is wrong with it, and nothing of it is kept; what can be read of an odd one is used."""
    client = module_stack.client(web=module_stack.webs[1])
    catalogue.answers = list(SLOW_CATALOGUES)
    with ThreadPoolExecutor(len(SLOW_CATALOGUES)) as pool:
        assert all(DOWN in told for told in pool.map(ask_in_vain, [client] * len(SLOW_CATALOGUES)))
    for name, (wire, then, told) in BAD_CATALOGUES.items():
        catalogue.answers, requests = [(wire, then)], catalogue.requests
        assert told in ask_in_vain(client), name
        assert catalogue.requests == requests + 1, name  # a redirect is not followed
    refused = client.request("POST", "/api/stream-message", json={"content": "which model?"})
    assert (refused.status_code, refused.json()["code"]) == (503, "unavailable")
    catalogue.answers = [(OK + json.dumps({"models": GOOD}).encode(), "close")]
    assert client.call("GET", "/api/models")["items"] == [
        {"name": "good:latest", "sizeBytes": 7, "family": "llama"},
        {"name": "odd", "sizeBytes": None, "family": None},
        {"name": "older", "sizeBytes": None, "family": None},
    ]
