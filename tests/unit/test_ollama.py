"""The upstream's client, against a server that does exactly as told: every way in which an answer can go."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import socket
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest

from tests.services import HOST, ROOT, clean_environment, free_port
from tests.upstream import Upstream, expected_text, running_upstream
from webapp.errors import SluicegateError
from webapp.streams.lifecycle import TerminationReason
from workers.ollama import ChatEnd, ChatRequest, OllamaService, UpstreamError, clean

LINE_LIMIT_BYTES = 65_536
ANSWER_LIMIT_CHARACTERS = 1_000_000
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
    service = OllamaService(
        url,
        connect_timeout_seconds=2,
        line_limit_bytes=LINE_LIMIT_BYTES,
        answer_limit_characters=ANSWER_LIMIT_CHARACTERS,
    )
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
                with contextlib.suppress(OSError):  # its client may have heard enough
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


CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
SIZED = HEAD + b"Content-Length: %d\r\n\r\n"


def chunk(data: bytes) -> bytes:
    """One chunk of a body that is sent so."""
    return b"%x\r\n%b\r\n" % (len(data), data)


class TestFramingThatIsBroken:
    """HTTP's own; what came whole before it counts."""

    @pytest.mark.parametrize(
        "rest",
        [
            pytest.param(b"zz\r\n" + DONE_LINE, id="a size that is no number"),
            pytest.param(b"\r\n" + DONE_LINE, id="an empty size"),
            pytest.param(b"f" * 40 + b"\r\n" + line("b").rstrip(), id="a size beyond all bounds"),
            pytest.param(b"1" * 70_000 + b"\r\n", id="a size that is too long"),
            pytest.param(b"%x\r\n" % 500 + line("b").rstrip(), id="a chunk that is cut off"),
            pytest.param(b"", id="no last chunk"),
            pytest.param(b"0\r\n\r\n", id="a last chunk without done"),
            pytest.param(b"0\r\n", id="a last chunk that is cut off"),
            pytest.param(b"-5\r\nabc", id="a negative size"),
        ],
    )
    def test_chunks(self, heard: Heard, rest: bytes) -> None:
        with answering(CHUNKED + chunk(line("a")) + rest) as url:
            ask_in_vain(url, heard, "m")
        assert heard.content == "a"

    def test_an_extension_of_a_chunk_is_none_of_ours(self, heard: Heard) -> None:
        with answering(CHUNKED + b"%x;name=value\r\n%b\r\n" % (len(DONE_LINE), DONE_LINE)) as url:
            assert ask(url, heard, "m").reason is TerminationReason.STOP

    def test_a_length_that_is_too_long(self, heard: Heard) -> None:
        with answering(SIZED % 10_000 + line("a")) as url:
            assert "broke" in ask_in_vain(url, heard, "m")
        assert heard.content == "a"

    def test_a_length_that_is_too_long_matters_no_more_after_done(self, heard: Heard) -> None:
        with answering(SIZED % 10_000 + line("a") + DONE_LINE) as url:
            ask(url, heard, "m")
        assert heard.content == "a"

    def test_a_length_that_is_too_short(self, heard: Heard) -> None:
        with answering(SIZED % (len(line("a")) + 5) + line("a") + DONE_LINE) as url:
            assert "before the answer's end" in ask_in_vain(url, heard, "m")
        assert heard.content == "a"

    @pytest.mark.parametrize("length", [b"-1", b"many", b"5, 7", b"1" * 5000])
    def test_a_length_that_is_none(self, heard: Heard, length: bytes) -> None:
        """It is refused, or passed over."""
        head = HEAD + b"Content-Length: " + length + b"\r\n\r\n"
        with answering(head + DONE_LINE) as url, contextlib.suppress(UpstreamError):
            ask(url, heard, "m")
        assert heard.chunks == []

    @pytest.mark.parametrize("head", [b"X: 1\r\n" * 200, b"X: " + b"1" * 70_000 + b"\r\n"])
    def test_a_head_that_is_too_long(self, heard: Heard, head: bytes) -> None:
        with answering(HEAD + head + b"\r\n" + DONE_LINE) as url:
            assert "broke" in ask_in_vain(url, heard, "m")

    def test_go_on_before_the_answer_is_passed_over(self, heard: Heard) -> None:
        with answering(b"HTTP/1.1 100 Continue\r\n\r\n" * 3 + HEAD + b"\r\n" + line("a") + DONE_LINE) as url:
            ask(url, heard, "m")
        assert heard.content == "a"


class TestCompression:
    """It is not asked for. A server, or what stands before it, may do it all the same."""

    BODY = line("a é 👋") * 50 + DONE_LINE

    @pytest.mark.parametrize("pieces", [1, 30])
    def test_it_is_undone(self, heard: Heard, pieces: int) -> None:
        body = gzip.compress(self.BODY)
        size = -(-len(body) // pieces)
        cut = [body[start : start + size] for start in range(0, len(body), size)]
        with answering(HEAD + b"Content-Encoding: gzip\r\n\r\n", *cut) as url:
            ask(url, heard, "m")
        assert heard.content == "a é 👋" * 50

    @pytest.mark.parametrize(
        "body",
        [
            pytest.param(BODY, id="plain"),
            pytest.param(gzip.compress(BODY, mtime=0)[:40], id="cut off"),
            pytest.param(b"\0" * 100, id="zeros"),
            pytest.param(b"", id="empty"),
        ],
    )
    def test_what_cannot_be_undone_is_refused(self, heard: Heard, body: bytes) -> None:
        with answering(HEAD + b"Content-Encoding: gzip\r\n\r\n" + body) as url:
            ask_in_vain(url, heard, "m")

    def test_a_line_is_too_long_as_it_is_read(self, heard: Heard) -> None:
        """Twenty thousand bytes that become twenty million are undone no further than the limit."""
        tracemalloc.start()
        with answering(HEAD + b"Content-Encoding: gzip\r\n\r\n" + gzip.compress(b"x" * 20_000_000)) as url:
            tracemalloc.reset_peak()
            assert "line of over" in ask_in_vain(url, heard, "m")
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak_bytes < 4_000_000


class TestWhatIsHeld:
    """Of an answer that has no end, or is too much at once."""

    def test_a_hundred_megabytes_in_a_line(self, heard: Heard) -> None:
        """They are not read: the sender is cut off soon behind the limit."""
        sent_bytes = [0]
        with endless(b"x" * 65_536, sent_bytes, limit_bytes=100_000_000) as url:
            assert str(LINE_LIMIT_BYTES) in ask_in_vain(url, heard, "m")
        assert LINE_LIMIT_BYTES < sent_bytes[0] < 20_000_000  # what lies in the sockets' buffers

    def test_a_line_that_comes_byte_by_byte_costs_by_its_length(self, heard: Heard) -> None:
        """Not by its square: that would be half a terabyte to copy here."""
        service = OllamaService(
            "http://unused", connect_timeout_seconds=1, line_limit_bytes=1_000_000, answer_limit_characters=1_000_000
        )
        began_at = time.process_time()
        with pytest.raises(UpstreamError, match="a line of over 1000000 bytes"):
            service.read(itertools.repeat(b"x"), heard.on_text)
        assert time.process_time() - began_at < 10

    def test_what_a_chunk_held_before_a_line_that_is_too_long_counts(self, heard: Heard) -> None:
        with answering(HEAD + b"\r\n" + line("a") + line("x" * LINE_LIMIT_BYTES) + DONE_LINE) as url:
            assert "a line of over" in ask_in_vain(url, heard, "m")
        assert heard.content == "a"

    @pytest.mark.parametrize("thinking", ["", "hm "])
    def test_an_answer_has_a_limit(self, heard: Heard, thinking: str) -> None:
        """Also one of many short lines; it is kept up to the limit."""
        sent_bytes = [0]
        piece = line(message={"thinking": thinking, "content": "abc " * 100})
        with endless(piece * 100, sent_bytes) as url:
            assert f"an answer of over {ANSWER_LIMIT_CHARACTERS} characters" in ask_in_vain(url, heard, "m")
        assert len(heard.thinking + heard.content) == ANSWER_LIMIT_CHARACTERS
        assert heard.thinking == thinking

    def test_an_answer_at_the_limit_is_within_it(self, heard: Heard) -> None:
        text = "x" * (ANSWER_LIMIT_CHARACTERS // 20)
        with answering(HEAD + b"\r\n" + line(text) * 20 + DONE_LINE) as url:
            ask(url, heard, "m")
        assert heard.content == text * 20

    @pytest.mark.parametrize("flood", [b"{}\n" * 20_000, chunk(b"{}\n") * 5000])
    def test_one_that_never_pauses_leaves_the_others_their_turns(self, flood: bytes) -> None:
        """In a process that gevent has patched: a socket that always has more is never waited for."""
        head = CHUNKED if flood[:1].isalnum() else HEAD + b"\r\n"
        with endless(flood, [0], head=head) as url:
            done = subprocess.run(
                [sys.executable, "-c", BESIDE_A_FLOOD, url],
                capture_output=True,
                text=True,
                cwd=ROOT,
                env=clean_environment(),
                timeout=20,
            )
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) >= 3  # without turns given there would be none at all


BESIDE_A_FLOOD = """
from gevent import monkey; monkey.patch_all()
import sys, time
import gevent
from workers.ollama import ChatRequest, OllamaService

service = OllamaService(sys.argv[1], connect_timeout_seconds=2, line_limit_bytes=65536, answer_limit_characters=100)
reader = gevent.spawn(service.chat, ChatRequest("m", []), lambda *_: None, lambda: None)
turns, end_at = 0, time.monotonic() + 1
while time.monotonic() < end_at:
    gevent.sleep(0.01)
    turns += 1
assert not reader.ready()
reader.kill()
print(turns)
"""


@contextlib.contextmanager
def endless(
    piece: bytes, sent_bytes: list[int], *, limit_bytes: int = 2**40, head: bytes = HEAD + b"\r\n"
) -> Iterator[str]:
    """A server that sends a piece over and over, until its client leaves; it counts in `sent_bytes`."""
    with socket.create_server((HOST, 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                read_request(connection)
                connection.sendall(head)
                while sent_bytes[0] < limit_bytes:
                    sent_bytes[0] += connection.send(piece)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://{HOST}:{listener.getsockname()[1]}"
        thread.join(5)
        assert not thread.is_alive(), "its client has not left"


class TestWhatIsOddInALine:
    @pytest.mark.parametrize(
        "odd",
        [
            pytest.param(b"\xef\xbb\xbf" + line("a"), id="a byte order mark"),
            pytest.param(line("a").rstrip() + b"\r\n", id="CRLF"),
            pytest.param(b"\n \n\r\n\t\n" + line("a") + b"\n\n", id="blank lines"),
            pytest.param(b'{"message":{"content":"no"},"message":{"content":"a"}}\n', id="a key twice"),
            pytest.param(line("a", error=None), id="an error that is null"),
            pytest.param(line("a", eval_count=10**18, odd=[[[{}]]]), id="keys that nobody knows"),
        ],
    )
    def test_it_is_read(self, heard: Heard, odd: bytes) -> None:
        with answering(HEAD + b"\r\n" + odd + DONE_LINE) as url:
            ask(url, heard, "m")
        assert heard.content == "a"

    @pytest.mark.parametrize(
        "bomb",
        [b"[" * 60_000, b'{"message":' + b"[" * 60_000, b'{"a":' * 10_000, b"[" * 30_000 + b"]" * 30_000],
    )
    def test_nesting_without_end_is_refused(self, heard: Heard, bomb: bytes) -> None:
        with answering(HEAD + b"\r\n" + line("a") + bomb + b"\n" + DONE_LINE) as url:
            assert "not JSON" in ask_in_vain(url, heard, "m")
        assert heard.content == "a"

    @pytest.mark.parametrize("depth", [100, 900, 1010])
    def test_an_error_may_be_nested_as_well(self, heard: Heard, depth: int) -> None:
        with answering(HEAD + b'\r\n{"error":' + b"[" * depth + b"]" * depth + b"}\n") as url:
            assert "[[[" in ask_in_vain(url, heard, "m")

    @pytest.mark.parametrize(
        ("error", "told"),
        [
            ("out of memory", "reported: out of memory"),
            ({"message": "no such model", "code": 404}, "reported: no such model"),
            ("", '"error"'),
            (False, "false"),
            ({"code": 7}, '"code"'),
            ("x" * 50_000, "xxx"),
            ("two\nlines\0", "two lines\ufffd"),
        ],
    )
    def test_an_error_is_told_in_its_words(self, heard: Heard, error: Any, told: str) -> None:
        with answering(HEAD + b"\r\n" + line("a") + json.dumps({"error": error}).encode() + b"\n" + DONE_LINE) as url:
            assert told in ask_in_vain(url, heard, "m")
        assert heard.content == "a"

    @pytest.mark.parametrize(
        "figure",
        [b"1e400", b"1" * 400, b"-1" + b"0" * 400, b"NaN", b"-Infinity", b"9223372036854775808", b"true", b"[]"],
    )
    def test_a_figure_that_nothing_can_hold_is_left_out(self, heard: Heard, figure: bytes) -> None:
        """The surrogate is one more thing that the quick parser refuses and the lenient one reads."""
        done = rb'{"message":{"content":"\ud800"},"done":true,"prompt_eval_count":3,"eval_count":' + figure + b"}\n"
        with answering(HEAD + b"\r\n" + done) as url:
            assert ask(url, heard, "m").stats == {"prompt_eval_count": 3}
        assert heard.content == "\ufffd"

    def test_half_a_line_is_none(self, heard: Heard) -> None:
        with answering(CHUNKED + chunk(line("a")) + chunk(b'{"message":{"content":"b') + b"0\r\n\r\n") as url:
            assert "before the answer's end" in ask_in_vain(url, heard, "m")
        assert heard.content == "a"

    def test_a_character_that_is_cut_by_a_chunk_and_is_none(self, heard: Heard) -> None:
        """The sign of what cannot be read is the same wherever the bytes were cut."""
        whole = b'{"message":{"content":"a\xf0\x9f\x92b\xe2\x82"}}\n'
        texts = set()
        for cut in range(len(whole)):
            each = Heard()
            with answering(CHUNKED + chunk(whole[:cut] or b"\n"), chunk(whole[cut:]) + chunk(DONE_LINE)) as url:
                ask(url, each, "m")
            texts.add(each.content)
        assert texts == {"a\ufffdb\ufffd"}


class TestTheEnd:
    @pytest.mark.parametrize(
        "after",
        [DONE_LINE, line("b"), b"nonsense\n", b'{"error":"late"}\n', b"x" * 2 * LINE_LIMIT_BYTES],
        ids=["done again", "text", "nonsense", "an error", "much"],
    )
    def test_nothing_counts_after_done(self, heard: Heard, after: bytes) -> None:
        with answering(HEAD + b"\r\n" + line("a") + DONE_LINE + after) as url:
            assert ask(url, heard, "m").reason is TerminationReason.STOP
        assert heard.content == "a"

    def test_it_is_at_done_and_not_at_the_close(self, heard: Heard) -> None:
        """The server keeps the connection, and sees that its client does not."""
        left = threading.Event()
        with socket.create_server((HOST, 0)) as listener:

            def serve() -> None:
                connection, _ = listener.accept()
                with connection:
                    read_request(connection)
                    connection.sendall(CHUNKED + chunk(line("a") + DONE_LINE))
                    connection.settimeout(5)
                    if connection.recv(1) == b"":
                        left.set()

            thread = threading.Thread(target=serve)
            thread.start()
            ask(f"http://{HOST}:{listener.getsockname()[1]}", heard, "m")
            assert left.wait(2)
            thread.join(5)
        assert heard.content == "a"


class TestRefusals:
    @pytest.mark.parametrize("status", [101, 103, 201, 204, 206, 304, 400, 401, 404, 429, 500, 503, 599])
    @pytest.mark.parametrize("body", [b'{"error":"server busy, please try again"}', b"<h1>busy</h1>", b""])
    def test_its_status_is_told_and_the_words_that_come_with_it(self, heard: Heard, status: int, body: bytes) -> None:
        head = b"HTTP/1.1 %d Said So\r\nContent-Length: %d\r\n\r\n" % (status, len(body))
        with answering(head + body) as url:
            told = ask_in_vain(url, heard, "m")
        assert f"answered {status}: " in told
        if status >= 400:
            assert told.endswith(
                ": " + {b"{": "server busy, please try again", b"<": "<h1>busy</h1>"}.get(body[:1], "Said So")
            )

    @pytest.mark.parametrize("end", ["cut off", "reset", "stalls", "never ends"])
    def test_its_status_is_told_also_where_its_words_do_not_come_whole(self, heard: Heard, end: str) -> None:
        head = b"HTTP/1.1 503 Busy\r\nContent-Length: 10000000000\r\n\r\nserver busy "
        with socket.create_server((HOST, 0)) as listener:

            def serve() -> None:
                connection, _ = listener.accept()
                with connection, contextlib.suppress(OSError):
                    read_request(connection)
                    connection.sendall(head)
                    if end == "reset":
                        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    elif end == "stalls":
                        connection.recv(1)
                    while end == "never ends":
                        connection.sendall(b"x" * 65_536)

            thread = threading.Thread(target=serve)
            thread.start()
            began_at = time.monotonic()
            assert "answered 503: server busy" in ask_in_vain(f"http://{HOST}:{listener.getsockname()[1]}", heard, "m")
            assert time.monotonic() - began_at < 5
            thread.join(5)
            assert not thread.is_alive()

    @pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
    def test_a_redirect_is_not_followed(self, own: Upstream, heard: Heard, status: int) -> None:
        """A conversation is sent where it was told to be sent, and nowhere else; nor is a redirect's body read."""
        elsewhere = f"{own.url}/api/chat"
        head = f"HTTP/1.1 {status} Moved\r\nLocation: {elsewhere}\r\nContent-Length: 10000000000\r\n\r\n"
        with answering(head.encode()) as url:
            assert f"answered {status}: it points to {elsewhere}" in ask_in_vain(url, heard, "m")
        assert own.requests() == []


class TestThatItIsNotReached:
    def test_a_name_that_nobody_has(self, heard: Heard) -> None:
        assert "name cannot be resolved" in ask_in_vain("http://nobody.invalid:11434", heard, "m")

    def test_a_password_is_not_told(self, heard: Heard) -> None:
        told = ask_in_vain(f"http://user:secret@{HOST}:{free_port()}", heard, "m")
        assert "is it running?" in told
        assert "secret" not in told

    def test_a_server_without_tls(self, heard: Heard) -> None:
        with socket.create_server((HOST, 0)) as listener:

            def serve() -> None:
                connection, _ = listener.accept()
                with connection:
                    connection.recv(65_536)
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

            thread = threading.Thread(target=serve)
            thread.start()
            assert "securely" in ask_in_vain(f"https://{HOST}:{listener.getsockname()[1]}", heard, "m")
            thread.join(5)

    def test_a_server_that_says_nothing_to_tls(self, heard: Heard) -> None:
        """The hand-shake is a part of connecting, and has its time."""
        with socket.create_server((HOST, 0)) as listener:
            assert "in time" in ask_in_vain(f"https://{HOST}:{listener.getsockname()[1]}", heard, "m")


class TestTheConnection:
    @pytest.mark.parametrize("model", ["tokens=3,pace=0", "tokens=3,pace=0,error_at=1", "http_status=500"])
    def test_none_is_left_open(self, own: Upstream, heard: Heard, model: str) -> None:
        with contextlib.suppress(UpstreamError):
            ask(own.url, heard, model)
        own.wait_until(lambda _: own.connection_count() == 0, 2, "the connection is closed")

    def test_an_error_of_the_receiver_closes_it(self, own: Upstream) -> None:
        def fail(*_: object) -> None:
            raise ValueError("no more")

        service = OllamaService(
            own.url,
            connect_timeout_seconds=2,
            line_limit_bytes=LINE_LIMIT_BYTES,
            answer_limit_characters=ANSWER_LIMIT_CHARACTERS,
        )
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
service = OllamaService(url, connect_timeout_seconds=2, line_limit_bytes=65536, answer_limit_characters=1_000_000)
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
