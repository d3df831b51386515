"""The upstream's client, against a server that does exactly as told: every way in which an answer can go."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.services import HOST, ROOT, clean_environment, free_port
from tests.upstream import Upstream, expected_text, running_upstream
from webapp.errors import SluicegateError
from webapp.streams.lifecycle import TerminationReason
from workers.ollama import ChatEnd, ChatRequest, OllamaService, UpstreamError, clean

LINE_LIMIT_BYTES = 65_536
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\n"


class Heard:
    """What a chat has handed on."""

    def __init__(self) -> None:
        self.opened = 0
        self.chunks: list[tuple[str, str]] = []

    def on_text(self, thinking: str, content: str) -> None:
        assert self.opened, "text before the connection"
        self.chunks.append((thinking, content))

    def on_open(self) -> None:
        self.opened += 1

    @property
    def thinking(self) -> str:
        return "".join(thinking for thinking, _ in self.chunks)

    @property
    def content(self) -> str:
        return "".join(content for _, content in self.chunks)


@pytest.fixture(scope="module")
def server() -> Iterator[Upstream]:
    """One server in a thread for the whole module."""
    with running_upstream() as upstream:
        yield upstream


@pytest.fixture
def own(server: Upstream) -> Upstream:
    """The server with an empty record."""
    server.reset()
    return server


@pytest.fixture
def heard() -> Heard:
    return Heard()


def ask(url: str, heard: Heard, model: str, **more: Any) -> ChatEnd:
    """One chat, read to its end."""
    service = OllamaService(url, connect_timeout_seconds=2, line_limit_bytes=LINE_LIMIT_BYTES)
    messages = more.pop("messages", [{"role": "user", "content": "hello"}])
    return service.chat(ChatRequest(model, messages, **more), heard.on_text, heard.on_open)


def ask_in_vain(url: str, heard: Heard, model: str) -> str:
    """A chat that fails; returns what a person is told."""
    with pytest.raises(UpstreamError) as caught:
        ask(url, heard, model)
    detail = caught.value.detail
    assert 0 < len(detail) < 500
    assert "\n" not in detail
    return detail


def read_request(connection: socket.socket) -> None:
    """All of it: a socket that is closed with something unread resets the connection."""
    with connection.makefile("rb") as stream:
        size_bytes = 0
        while (header := stream.readline()) not in (b"\r\n", b""):
            if header.lower().startswith(b"content-length:"):
                size_bytes = int(header.partition(b":")[2])
        stream.read(size_bytes)


@contextlib.contextmanager
def answering(*pieces: bytes) -> Iterator[str]:
    """A server that answers one request with just these bytes, each in a packet of its own; its URL."""
    with socket.create_server((HOST, 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                read_request(connection)
                for piece in pieces:
                    connection.sendall(piece)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://{HOST}:{listener.getsockname()[1]}"
        thread.join(5)


def line(content: str = "", **more: Any) -> bytes:
    """One line of the protocol; what has no UTF-8 is escaped."""
    return json.dumps({"message": {"role": "assistant", "content": content}, "done": False} | more).encode() + b"\n"


DONE_LINE = line(done=True, done_reason="stop")


class TestAnswers:
    def test_an_answer_is_read_to_its_end(self, own: Upstream, heard: Heard) -> None:
        end = ask(own.url, heard, "tokens=30,pace=0")
        assert end.reason is TerminationReason.STOP
        assert (heard.thinking, heard.content) == expected_text("tokens=30")
        assert heard.opened == 1
        assert own.requests()[0].outcome == "completed"

    def test_thinking_comes_apart_from_the_content(self, own: Upstream, heard: Heard) -> None:
        model = "tokens=5,pace=0,thinking=4,late_thinking_at=2"
        ask(own.url, heard, model)
        assert heard.content == expected_text(model).content
        assert heard.thinking == expected_text(model).thinking

    def test_late_thinking_does_not_count_however_the_lines_arrive(self, heard: Heard) -> None:
        """In one chunk as in several."""
        late = b'{"message": {"thinking": "late"}}\n'
        early = b'{"message": {"thinking": "early"}}\n'
        with answering(HEAD + b"\r\n" + early + line("a") + late + line("b") + DONE_LINE) as url:
            ask(url, heard, "m")
        assert (heard.thinking, heard.content) == ("early", "ab")

    @pytest.mark.parametrize("size_bytes", [1, 3, 7, 1000])
    def test_characters_may_arrive_in_parts(self, own: Upstream, heard: Heard, size_bytes: int) -> None:
        model = f"tokens=24,pace=0,alphabet=mixed,thinking=3,split_bytes={size_bytes}"
        ask(own.url, heard, model)
        assert (heard.thinking, heard.content) == expected_text(model)

    def test_many_lines_of_one_chunk_are_handed_on_at_once(self, heard: Heard) -> None:
        with answering(HEAD + b"\r\n" + line("a") + line("b") + line("c") + DONE_LINE) as url:
            ask(url, heard, "m")
        assert heard.chunks == [("", "abc")]

    def test_text_in_the_last_line_counts(self, heard: Heard) -> None:
        with answering(HEAD + b"\r\n" + line("a"), line("b", done=True)) as url:
            assert ask(url, heard, "m").reason is TerminationReason.STOP
        assert heard.content == "ab"

    def test_a_last_line_needs_no_newline_and_blank_ones_are_nothing(self, heard: Heard) -> None:
        with answering(HEAD + b"\r\n\r\n\n" + line("a") + b"  \n" + DONE_LINE.rstrip()) as url:
            ask(url, heard, "m")
        assert heard.content == "a"

    def test_a_length_that_ended_it_is_said(self, own: Upstream, heard: Heard) -> None:
        assert ask(own.url, heard, "tokens=3,pace=0,done_reason=length").reason is TerminationReason.LENGTH
        end = ask(own.url, Heard(), "tokens=9,pace=0", options={"num_predict": 4})
        assert (end.reason, end.stats["done_reason"]) == (TerminationReason.LENGTH, "length")

    def test_another_word_for_the_end_is_a_stop(self, own: Upstream, heard: Heard) -> None:
        assert ask(own.url, heard, "tokens=1,pace=0,done_reason=unload").reason is TerminationReason.STOP

    def test_the_upstreams_own_figures_are_kept(self, own: Upstream, heard: Heard) -> None:
        stats = ask(own.url, heard, "tokens=7,pace=0").stats
        assert stats["eval_count"] == 7
        assert stats["done_reason"] == "stop"
        durations = {"total_duration", "load_duration", "prompt_eval_duration", "eval_duration"}
        assert set(stats) == {*durations, "prompt_eval_count", "eval_count", "done_reason"}

    def test_the_question_arrives_as_it_was_put(self, own: Upstream, heard: Heard) -> None:
        messages = [{"role": "user", "content": "hi 👋"}, {"role": "assistant", "content": "t0 t1"}]
        more = {"options": {"num_ctx": 64}, "think": False, "keep_alive": "5m"}
        ask(own.url, heard, "tokens=4,pace=0", messages=messages, **more)
        (record,) = own.requests()
        assert record.messages == messages
        assert (record.options, record.think, record.keep_alive) == ({"num_ctx": 64}, False, "5m")
        assert heard.content == " t2 t3 "

    def test_what_was_not_asked_for_is_not_sent(self) -> None:
        assert ChatRequest("m", []).body() == {"model": "m", "messages": [], "stream": True}


class TestWhatCannotBeStored:
    def test_nul_and_lone_surrogates_become_one_sign_each(self, own: Upstream, heard: Heard) -> None:
        model = "tokens=6,pace=0,nul_at=1,surrogate_at=3"
        ask(own.url, heard, model)
        assert heard.content == expected_text(model).content == "t0 t1\ufffd t2 t3\ufffd t4 t5 "

    def test_a_pair_that_two_lines_share_is_two_lone_ones(self, heard: Heard) -> None:
        with answering(HEAD + b"\r\n" + line("\ud83d") + line("\ude00") + DONE_LINE) as url:
            ask(url, heard, "m")
        assert heard.content == "\ufffd\ufffd"

    def test_a_pair_in_one_line_is_a_character(self, heard: Heard) -> None:
        with answering(HEAD + b"\r\n" + rb'{"message":{"content":"\ud83d\ude00"}}' + b"\n" + DONE_LINE) as url:
            ask(url, heard, "m")
        assert heard.content == "😀"

    def test_bytes_that_are_no_text_are_read_all_the_same(self, heard: Heard) -> None:
        with answering(HEAD + b"\r\n" + b'{"message":{"content":"a\xff\x00b"}}\n' + DONE_LINE) as url:
            ask(url, heard, "m")
        assert heard.content == "a\ufffd\ufffdb"

    def test_nothing_else_is_touched(self) -> None:
        text = "e\u0301 👩‍👩‍👧‍👦 שָׁ \ufffe \U0010ffff \x01\x7f\u200b"
        assert clean(text) == text


class TestFaults:
    """After each, what was read before has been handed on."""

    @pytest.mark.parametrize(
        ("fault", "told"),
        [
            ("error_at=5", "scripted error at 5"),
            ("reset_at=5", "broke"),
            ("close_at=5", "broke"),
            ("malformed_at=5", "not JSON"),
        ],
    )
    def test_a_fault_in_the_middle(self, own: Upstream, heard: Heard, fault: str, told: str) -> None:
        model = f"tokens=9,pace=300,{fault}"
        assert told in ask_in_vain(own.url, heard, model)
        assert heard.content == expected_text(model).content == "t0 t1 t2 t3 t4 "

    def test_a_fault_in_the_chunk_of_the_text_before_it(self, heard: Heard) -> None:
        with answering(HEAD + b"\r\n" + line("a") + b'{"error":"out of memory"}\n') as url:
            assert "out of memory" in ask_in_vain(url, heard, "m")
        assert heard.content == "a"

    def test_an_end_without_done_is_not_an_end(self, own: Upstream, heard: Heard) -> None:
        assert "before the answer's end" in ask_in_vain(own.url, heard, "tokens=3,pace=0,end_without_done=1")
        assert heard.content == "t0 t1 t2 "

    def test_a_line_that_is_too_long_is_refused(self, own: Upstream, heard: Heard) -> None:
        model = f"tokens=3,pace=300,long_line_at=2:{3 * LINE_LIMIT_BYTES}"
        assert str(LINE_LIMIT_BYTES) in ask_in_vain(own.url, heard, model)
        assert heard.content == "t0 t1 "

    def test_a_line_that_never_ends_is_refused_before_it_is_all_read(self, heard: Heard) -> None:
        with answering(HEAD + b"\r\n", b"x" * (LINE_LIMIT_BYTES + 100_000)) as url:
            assert str(LINE_LIMIT_BYTES) in ask_in_vain(url, heard, "m")

    @pytest.mark.parametrize("line_", [b"[1]\n", b'"text"\n', b"null\n", b"7\n", b"<html>\n", b"\xff\xfe\n"])
    def test_a_line_that_is_no_object_is_refused(self, heard: Heard, line_: bytes) -> None:
        with answering(HEAD + b"\r\n" + line_ + DONE_LINE) as url:
            assert "not" in ask_in_vain(url, heard, "m")

    @pytest.mark.parametrize(
        "line_",
        [
            b"{}\n",
            b'{"message":null}\n',
            b'{"message":"text"}\n',
            b'{"message":{"content":null,"thinking":7}}\n',
            b'{"message":{"content":["a"]},"done":"yes"}\n',
        ],
    )
    def test_an_object_that_says_nothing_is_passed_over(self, heard: Heard, line_: bytes) -> None:
        with answering(HEAD + b"\r\n" + line_ + line("a") + DONE_LINE) as url:
            ask(url, heard, "m")
        assert heard.content == "a"

    @pytest.mark.parametrize(
        ("model", "told"),
        [("unknown", "404: model 'unknown' not found"), ("http_status=500", "500: scripted status 500")],
    )
    def test_a_refusal_says_what_the_upstream_said(self, own: Upstream, heard: Heard, model: str, told: str) -> None:
        assert told in ask_in_vain(own.url, heard, model)
        assert heard.chunks == []

    @pytest.mark.parametrize("body", [b"", b"<html>\n<h1>Bad Gateway</h1>", b"[1]", b"\xff", b"x" * 100_000])
    def test_a_refusal_may_be_of_any_form(self, heard: Heard, body: bytes) -> None:
        head = b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: %d\r\n\r\n" % len(body)
        with answering(head + body) as url:
            assert "502" in ask_in_vain(url, heard, "m")

    def test_nobody_there_is_said_so(self, heard: Heard) -> None:
        url = f"http://{HOST}:{free_port()}"
        told = ask_in_vain(url, heard, "m")
        assert url in told
        assert "is it running?" in told
        assert heard.opened == 1

    @pytest.mark.parametrize("said", [b"", b"HTTP/1.1 200 OK\r\n", b"SSH-2.0-OpenSSH_9.6\r\n\r\n"])
    def test_a_server_that_does_not_speak_http(self, heard: Heard, said: bytes) -> None:
        with answering(said) as url:
            ask_in_vain(url, heard, "m")
        assert heard.chunks == []

    def test_the_error_has_the_stable_code(self) -> None:
        assert issubclass(UpstreamError, SluicegateError)
        assert (UpstreamError.code, UpstreamError("x").detail) == ("upstream_error", "x")


class TestTheConnection:
    @pytest.mark.parametrize("model", ["tokens=3,pace=0", "tokens=3,pace=0,error_at=1", "http_status=500"])
    def test_none_is_left_open(self, own: Upstream, heard: Heard, model: str) -> None:
        with contextlib.suppress(UpstreamError):
            ask(own.url, heard, model)
        own.wait_until(lambda _: own.connection_count() == 0, 2, "the connection is closed")

    def test_an_error_of_the_receiver_closes_it(self, own: Upstream) -> None:
        def fail(*_: object) -> None:
            raise ValueError("no more")

        service = OllamaService(own.url, connect_timeout_seconds=2, line_limit_bytes=LINE_LIMIT_BYTES)
        with pytest.raises(ValueError, match="no more"):
            service.chat(ChatRequest("tokens=100000", []), fail, lambda: None)
        own.wait_until(lambda records: records[0].outcome == "disconnected", 2)

    def test_a_killed_greenlet_closes_it_in_every_phase(self, own: Upstream) -> None:
        """What a stop does, in a process that gevent has patched, as a worker's is."""
        phases = ["load_seconds=60", "first_token_silence=60", "silence_at=3:60,pace=0", "tokens=100000,pace=200"]
        killed = subprocess.run(
            [sys.executable, "-c", KILLED_IN_EVERY_PHASE, own.url, *phases],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=clean_environment(),
            timeout=30,
        )
        assert killed.returncode == 0, killed.stderr
        kill_times = dict(json.loads(killed.stdout))
        own.wait_until(lambda records: all(record.outcome for record in records))
        for record in own.requests():
            assert record.outcome == "disconnected"
            assert record.disconnected_at is not None
            assert 0 <= record.disconnected_at - kill_times[record.model] < 0.5, record.model


KILLED_IN_EVERY_PHASE = """
from gevent import monkey; monkey.patch_all()
import json, sys, time
import gevent
from tests.services import wait_until
from tests.upstream import Upstream
from workers.ollama import ChatRequest, OllamaService

url, *models = sys.argv[1:]
upstream = Upstream(url)
service = OllamaService(url, connect_timeout_seconds=2, line_limit_bytes=65536)
times = []
for model in models:
    reader = gevent.spawn(service.chat, ChatRequest(model, []), lambda *_: None, lambda: None)
    said = 3 if "silence_at" in model or "pace=200" in model else 0
    sent = "load" in model
    wait_until(lambda: (r := upstream.requests(model)) and r[0].tokens_sent >= said and (sent or r[0].headers_sent_at))
    times.append((model, time.time()))
    reader.kill()
    assert isinstance(reader.value, gevent.GreenletExit), reader.value
print(json.dumps(times))
"""
