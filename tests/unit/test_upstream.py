"""The tests' own upstream does what its scripts say, and sees its clients leave."""

from __future__ import annotations

import http.client
import itertools
import json
import socket
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests

from tests.services import WaitTimeout, wait_until
from tests.upstream import ChatRecord, Script, ScriptError, Upstream, expected_text, running_upstream, saved_form

QUICK_SECONDS = 0.5


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


def chat(server: Upstream, model: str, prefill: str | None = None, **more: Any) -> requests.Response:
    """Ask for a chat; the answer is not read yet."""
    messages = [{"role": "user", "content": "hello"}]
    if prefill is not None:
        messages.append({"role": "assistant", "content": prefill})
    body = {"model": model, "messages": messages, "stream": True, **more}
    return requests.post(f"{server.url}/api/chat", json=body, stream=True, timeout=5)


def lines(response: requests.Response) -> list[dict[str, Any]]:
    """The whole answer, parsed."""
    return [json.loads(line) for line in response.content.split(b"\n") if line]


def texts(response: requests.Response) -> tuple[str, str]:
    """The thinking and the content of a whole answer."""
    messages = [line["message"] for line in lines(response) if "message" in line]
    return "".join(m.get("thinking", "") for m in messages), "".join(m["content"] for m in messages)


def read_into(received: bytearray, response: requests.Response) -> None:
    """Read to the end, keeping what came before a failure."""
    for piece in response.iter_content(None):
        received += piece


def bare_client(server: Upstream, model: str) -> socket.socket:
    """A client that asks for a chat and reads nothing."""
    body = json.dumps({"model": model, "messages": []}).encode()
    address = urlsplit(server.url)
    client = socket.create_connection((address.hostname, address.port or 0), timeout=5)
    client.sendall(b"POST /api/chat HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    return client


def ended(records: list[ChatRecord]) -> ChatRecord | None:
    """The first request, once it has ended."""
    return records[0] if records and records[0].outcome else None


def test_the_default_script_says_numbered_tokens_and_statistics(own: Upstream) -> None:
    *tokens, done = lines(chat(own, "any-model", options={"num_ctx": 64}, keep_alive="5m", think=False))
    assert [line["message"]["content"] for line in tokens] == [f"t{index} " for index in range(20)]
    assert done["done"]
    assert done["done_reason"] == "stop"
    assert done["eval_count"] == 20
    assert done["total_duration"] > 0
    (record,) = own.requests()
    assert (record.outcome, record.tokens_sent, record.keep_alive) == ("completed", 20, "5m")
    assert record.options == {"num_ctx": 64}
    assert record.think is False
    assert record.bytes_sent > 0
    assert record.disconnected_at is None
    assert own.open_count() == 0


def test_it_keeps_the_pace(own: Upstream) -> None:
    started = time.monotonic()
    assert chat(own, "tokens=41,pace=100").content
    assert 0.4 <= time.monotonic() - started < 0.4 + QUICK_SECONDS


def test_without_a_pace_it_is_fast(own: Upstream) -> None:
    started = time.monotonic()
    assert texts(chat(own, "tokens=2000,pace=0")) == expected_text("tokens=2000")
    assert time.monotonic() - started < 2


def test_silences_come_where_they_were_asked_for(own: Upstream) -> None:
    started = time.monotonic()
    assert chat(own, "tokens=3,pace=0,load_seconds=0.1,first_token_silence=0.1,silence_at=1:0.1+3:0.1").content
    assert 0.4 <= time.monotonic() - started < 0.4 + QUICK_SECONDS
    (record,) = own.requests()
    assert record.headers_sent_at is not None
    assert record.first_token_at is not None
    assert record.headers_sent_at - record.received_at >= 0.1
    assert record.first_token_at - record.headers_sent_at >= 0.1


@pytest.mark.parametrize(
    "model",
    [
        pytest.param("load_seconds=60", id="loading"),
        pytest.param("first_token_silence=60", id="before the first token"),
        pytest.param("silence_at=5:60,pace=0", id="between tokens"),
        pytest.param("silence_at=20:60,pace=0", id="before the end"),
        pytest.param("tokens=100000,pace=200", id="streaming"),
        pytest.param("tokens=1000000,pace=0", id="blocked by a client that does not read"),
    ],
)
def test_a_disconnect_is_seen_at_once(own: Upstream, model: str) -> None:
    with bare_client(own, model):
        own.wait_until(lambda records: records and own.open_count() == 1)
        left_at = time.monotonic()
    record = own.wait_until(ended)
    assert record is not None
    assert record.outcome == "disconnected"
    assert record.disconnected_at is not None
    assert record.disconnected_at_monotonic is not None
    assert 0 <= record.disconnected_at_monotonic - left_at < QUICK_SECONDS
    assert ("load" in model) == (record.headers_sent_at is None)
    wait_until(lambda: own.open_count() == own.connection_count() == 0, 2)


@pytest.mark.parametrize("alphabet", ["plain", "mixed"])
def test_an_answer_is_gone_on_with_wherever_it_was_cut(alphabet: str) -> None:
    script = Script.parse(f"tokens=30,alphabet={alphabet},nul_at=3,surrogate_at=4,long_line_at=5:40")
    whole = saved_form("".join(step.text for step in script.steps()))
    for cut in range(1, len(whole) + 1):
        rest = "".join(step.text for step in script.steps(prefill=whole[:cut]))
        assert whole[:cut] + saved_form(rest) == whole


def test_a_prefill_is_gone_on_with_over_the_wire(own: Upstream) -> None:
    model = "tokens=12,pace=0,thinking=3,error_at=5"
    thinking, content = texts(chat(own, model))
    assert (thinking, content) == expected_text(model) == ("h0 h1 h2 ", "t0 t1 t2 t3 t4 ")
    thinking, rest = texts(chat(own, model, prefill=content + "t"))
    assert (thinking, rest) == ("", "5 t6 t7 t8 t9 t10 t11 ")
    first, second = own.requests()
    assert (first.outcome, second.outcome) == ("fault", "completed")
    assert first.prefill is None
    assert second.prefill == content + "t"


def test_a_foreign_prefill_goes_on_after_its_last_number() -> None:
    assert Script(tokens=9).resume_after("Something else, up to t6, here") == (7, "")
    assert Script(tokens=9).resume_after("Something else") == (0, "")


def test_lines_are_cut_inside_of_characters(own: Upstream) -> None:
    model = "tokens=12,pace=0,alphabet=mixed,thinking=2,split_bytes=1"
    chunks = list(chat(own, model).raw.stream(decode_content=False))
    assert all(len(chunk) == 1 for chunk in chunks)
    assert texts(chat(own, model)) == expected_text(model)


def test_what_no_database_takes_is_sent_as_asked(own: Upstream) -> None:
    model = "tokens=4,pace=0,nul_at=1,surrogate_at=2,long_line_at=3:100000"
    _, content = texts(chat(own, model))
    assert content.startswith("t0 t1\0 t2\ud800 t3xxx")
    assert len(content) == 100_000 + 11
    assert saved_form(content) == expected_text(model).content
    assert expected_text(model).content.startswith("t0 t1\ufffd t2\ufffd t3xxx")


@pytest.mark.parametrize(
    ("model", "status"), [("unknown", 404), ("http_status=500", 500), ("http_status=503", 503), ("no_such_word=1", 400)]
)
def test_refusals(own: Upstream, model: str, status: int) -> None:
    answer = chat(own, model)
    assert answer.status_code == status
    assert "error" in answer.json()


@pytest.mark.parametrize("fault", ["reset_at=5", "close_at=5"])
def test_a_broken_connection(own: Upstream, fault: str) -> None:
    received = bytearray()
    with pytest.raises(requests.exceptions.ChunkedEncodingError):
        read_into(received, chat(own, f"pace=200,{fault}"))
    assert received.count(b"\n") == 5
    record = own.wait_until(ended)
    assert record is not None
    assert (record.outcome, record.tokens_sent) == ("fault", 5)


def test_a_line_in_two_halves(own: Upstream) -> None:
    """With a silence in a character, or cut off there."""
    model = "tokens=9,pace=0,alphabet=mixed,half_at=5,silence_at=5:0.1"
    assert texts(chat(own, model)) == expected_text(model) == expected_text("tokens=9,alphabet=mixed")
    received = bytearray()
    with pytest.raises(requests.exceptions.ChunkedEncodingError):
        read_into(received, chat(own, "tokens=9,pace=200,alphabet=mixed,half_at=5,close_at=5"))
    assert received.count(b"\n") == 5
    with pytest.raises(UnicodeDecodeError):
        received.decode()


def test_a_byte_that_is_not_utf8(own: Upstream) -> None:
    model = "tokens=3,pace=0,invalid_at=1"
    assert b"t1\xc3( " in chat(own, model).content
    assert expected_text(model).content == "t0 t1\ufffd( t2 "


@pytest.mark.parametrize("fault", ["endless_line_at=2", "flood_at=2", "http_status=500,refusal=huge"])
def test_what_goes_on_for_as_long_as_the_client_stays(own: Upstream, fault: str) -> None:
    with chat(own, f"pace=0,{fault}") as answer:
        assert sum(map(len, itertools.islice(answer.iter_content(65_536), 200))) > 5_000_000
    record = own.wait_until(ended)
    assert record is not None
    assert record.outcome == "disconnected"


def test_a_chunk_whose_size_is_no_number(own: Upstream) -> None:
    with pytest.raises(requests.exceptions.ChunkedEncodingError):
        read_into(bytearray(), chat(own, "pace=200,bad_chunk_at=2"))


def test_heads(own: Upstream) -> None:
    assert len(chat(own, "pace=0,head_lines=50").headers) == 3  # all of one name
    began_at = time.monotonic()
    assert chat(own, "pace=0,head_byte_seconds=0.002").status_code == 200
    assert time.monotonic() - began_at > 0.1


def test_what_comes_after_done(own: Upstream) -> None:
    *_, done, late, again = lines(chat(own, "pace=0,tokens=2,after_done"))
    assert (done["done"], late["done"], again["done"]) == (True, False, True)
    with chat(own, "pace=0,tokens=2,closes_late") as answer:
        assert b'"done":true' in answer.raw.read1(65_536) + answer.raw.read1(65_536) + answer.raw.read1(65_536)
        assert own.open_count() == 1
    wait_until(lambda: own.open_count() == 0, 2)


@pytest.mark.parametrize(("refusal", "body"), [("html", "<h1>scripted status 502</h1>"), ("empty", "")])
def test_refusals_of_other_forms(own: Upstream, refusal: str, body: str) -> None:
    answer = chat(own, f"http_status=502,refusal={refusal}")
    assert (answer.status_code, answer.text) == (502, body)


def test_a_redirect_points_to_itself(own: Upstream) -> None:
    with pytest.raises(requests.TooManyRedirects):
        chat(own, "http_status=307")
    assert len(own.requests()) == 31


def test_an_error_line_and_a_line_that_is_not_json(own: Upstream) -> None:
    assert lines(chat(own, "pace=0,error_at=2"))[2:] == [{"error": "scripted error at 2"}]
    with pytest.raises(json.JSONDecodeError):
        lines(chat(own, "pace=0,malformed_at=2"))


def test_ways_to_end(own: Upstream) -> None:
    assert not lines(chat(own, "tokens=2,pace=0,end_without_done"))[-1]["done"]
    assert lines(chat(own, "tokens=2,pace=0,done_reason=length"))[-1]["done_reason"] == "length"
    limited = lines(chat(own, "tokens=9,pace=0", options={"num_predict": 4}))
    assert limited[-1]["done_reason"] == "length"
    assert len(limited) == 5


def test_late_thinking_is_sent_and_not_expected(own: Upstream) -> None:
    model = "tokens=4,pace=0,thinking=1,late_thinking_at=2"
    assert texts(chat(own, model))[0] == "h0 late2 "
    assert expected_text(model).thinking == "h0 "


def test_a_connection_serves_several_requests(own: Upstream) -> None:
    client = http.client.HTTPConnection(urlsplit(own.url).netloc, timeout=5)
    body = json.dumps({"model": "pace=0", "messages": []})
    for _ in range(2):
        client.request("POST", "/api/chat", body)
        assert client.getresponse().read().endswith(b"}\n")
    assert own.connection_count() == 1
    assert own.open_count() == 0
    client.request("GET", "/api/tags")
    assert json.load(client.getresponse())["models"][0]["name"]
    client.request("GET", "/api/version")
    assert json.load(client.getresponse())["version"]
    client.close()
    wait_until(lambda: own.connection_count() == 0, 2)


@pytest.mark.parametrize("model", ["tokens=many", "alphabet=greek", "refusal=rude", "silence_at=3", "tokenz=3"])
def test_a_script_that_is_none(model: str) -> None:
    with pytest.raises(ScriptError):
        Script.parse(model)


def test_waiting_says_what_for() -> None:
    with pytest.raises(WaitTimeout, match=r"not within 0.01 s: rain \(last answer: 0\)"):
        wait_until(lambda: 0, 0.01, "rain")
