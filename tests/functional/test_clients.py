"""What clients rely on: the old one that knows nothing of sessions, resuming, leaving, and the upstream's errors."""

from __future__ import annotations

import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import redis

from tests.functional.nodes import ApiError, Client, Stack
from tests.functional.text import text_beyond
from tests.services import wait_until
from tests.upstream import UpstreamProcess, expected_text


class TestTheOldStyleClient:
    """It posts, and reads to the end."""

    def test_curl(self, stack: Stack, client: Client) -> None:
        command = ["curl", "-sN", "-X", "POST", f"{stack.url()}/api/stream-message"]
        command += ["-H", f"Authorization: Bearer {client.token}", "-H", "Content-Type: application/json"]
        command += ["-d", '{"content": "hello", "model": "pace=100,tokens=12"}']
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        assert done.returncode == 0
        assert done.stdout.count('data: {"content"') == 12
        assert done.stdout.rstrip().split("\n\n")[-1].split("\n")[1] == "event: done"

    def test_the_response_is_the_stream(self, stack: Stack, client: Client) -> None:
        with client.post_stream("hello", model="pace=100,tokens=5") as stream:
            events = list(stream)
            assert (stream.session_id, stream.conversation_id) == (
                events[0].data["sessionId"],
                events[0].data["conversationId"],
            )
        kinds = [event.event for event in events]
        assert kinds[0] == "session"
        assert kinds[-1] == "done"
        assert kinds.count("message") == 5
        assert [event.data["phase"] for event in events if event.event == "phase"][-2:] == ["LOADING", "GENERATING"]
        assert [event.id for event in events if event.data.get("phase") in (None, "QUEUED")][:2] == [None, None]

    def test_leaving_does_not_stop_it(self, stack: Stack, client: Client) -> None:
        """By default a stream goes on without readers; a reload loses nothing."""
        with client.post_stream("hello", model="pace=50,tokens=50") as stream:
            session_id = stream.session_id
            next(event for event in stream if event.event == "message")
        reader = client.follow(session_id)
        assert reader.wait_until_done()["reason"] == "stop"
        assert reader.text == expected_text("pace=50,tokens=50").content


class TestResuming:
    """From any position, before and after the end, and when the log is gone."""

    def test_every_position(self, stack: Stack, client: Client) -> None:
        model = "pace=200,tokens=40,thinking=10,alphabet=mixed"
        session = client.post_message("hello", model=model)
        reader = client.follow(session["sessionId"])
        reader.wait_until_done()
        whole = reader.thinking + reader.text
        assert whole == "".join(expected_text(model))
        assert reader.ids == sorted(reader.ids, key=lambda cursor: [int(part) for part in cursor.split("-")])
        for offset in range(len(whole) + 1):
            assert text_beyond(client, session["sessionId"], f"{offset}-0") == whole[offset:]

    def test_when_the_log_is_gone(self, stack: Stack, client: Client) -> None:
        session = client.post_message("hello", model="pace=200,tokens=40,thinking=10")
        reader = client.follow(session["sessionId"])
        reader.wait_until_done()
        with redis.Redis.from_url(stack.valkey.url) as valkey:
            assert valkey.delete(*valkey.keys(f"sg:{{{session['sessionId']}}}:*")) >= 2
        again = client.follow(session["sessionId"])
        assert again.wait_until_done() == reader.done
        assert (again.thinking, again.text) == (reader.thinking, reader.text)
        assert (
            text_beyond(client, session["sessionId"], reader.ids[20])
            == (reader.thinking + reader.text)[int(reader.ids[20].split("-")[0]) :]
        )

    def test_a_reader_that_has_had_done_gets_204(self, stack: Stack, client: Client) -> None:
        session = client.post_message("hello", model="tokens=3")
        reader = client.follow(session["sessionId"])
        reader.wait_until_done()
        path = f"/api/streams/{session['sessionId']}/events"
        assert client.request("GET", path, headers={"Last-Event-ID": reader.ids[-1]}).status_code == 204
        assert client.request("GET", path, params={"lastEventId": reader.ids[-1]}).status_code == 204

    @pytest.mark.parametrize("cursor", ["garbage", "12", "-1-0", "5-0-0", "99999999-0", "1e3-0", "１-0"])
    def test_a_cursor_that_is_none(self, stack: Stack, client: Client, cursor: str) -> None:
        session = client.post_message("hello", model="tokens=3")
        client.follow(session["sessionId"]).wait_until_done()
        answer = client.request("GET", f"/api/streams/{session['sessionId']}/events", params={"lastEventId": cursor})
        assert (answer.status_code, answer.json()["code"]) == (400, "invalid_cursor")

    def test_a_reader_that_leaves_is_noticed_at_once(self, stack: Stack, client: Client) -> None:
        """Also on a silent stream, where nothing is written that could fail."""
        session = client.post_message("hello", model="pace=100,silence_at=5:20")
        with redis.Redis.from_url(stack.valkey.url) as valkey:
            reader = client.follow(session["sessionId"])
            reader.wait_for_text(10)
            connections = _open_connections(stack)
            reader.leave()
            wait_until(lambda: _open_connections(stack) < connections, 1, "the reader's connection is closed")
            assert valkey.ping()
        client.terminate(session["sessionId"])


def _open_connections(stack: Stack) -> int:
    port = int(stack.url().rpartition(":")[2])
    return sum(
        connection.status in ("ESTABLISHED", "CLOSE_WAIT") and connection.laddr.port == port
        for process in stack.web.family()
        for connection in process.net_connections("tcp")
    )


ERRORS = {
    "http_status=500": "500",
    "unknown": "not found",
    "tokens=20,error_at=8": "reported",
    "tokens=20,reset_at=8": "broke",
    "tokens=20,close_at=8": "connection",
    "tokens=20,malformed_at=8": "not JSON",
    "tokens=20,end_without_done": "before the answer's end",
}


class TestTheUpstreamsErrors:
    """Each ends the stream as `upstream_error`, with a readable detail, and keeps the partial."""

    @pytest.mark.parametrize("model", ERRORS)
    def test_error(self, stack: Stack, client: Client, upstream: UpstreamProcess, model: str) -> None:
        session = client.post_message("hello", model=model)
        reader = client.follow(session["sessionId"])
        done = reader.wait_until_done()
        assert (done["status"], done["reason"]) == ("ERROR", "upstream_error")
        message = client.message(session)
        assert ERRORS[model] in message["detail"]
        assert message["content"] == reader.text
        if "_at=8" in model:
            assert reader.text.split() == [f"t{number}" for number in range(8)]
        assert upstream.open_count() == 0

    def test_nobody_listens(self, stack: Stack, client: Client, upstream: UpstreamProcess) -> None:
        upstream.process.kill()
        session = client.post_message("hello", model="any")
        assert client.follow(session["sessionId"]).wait_until_done()["reason"] == "upstream_error"
        assert "refused" in client.message(session)["detail"]

    def test_what_is_passed_on_and_saved(self, stack: Stack, client: Client, upstream: UpstreamProcess) -> None:
        options = {"temperature": 0.5, "num_predict": 6}
        first = client.post_message("one", model="tokens=20,thinking=3", options=options, think=True)
        client.follow(first["sessionId"]).wait_until_done()
        second = client.post_message("two", model="tokens=2", conversation_id=first["conversationId"])
        client.follow(second["sessionId"]).wait_until_done()

        asked = upstream.requests()
        assert (asked[0].options, asked[0].think) == (options, True)
        said = [(one["role"], one["content"]) for one in asked[1].messages]
        answer = client.message(first)
        assert said == [("user", "one"), ("assistant", answer["content"]), ("user", "two")]
        assert (answer["status"], answer["reason"]) == ("COMPLETED", "length")
        assert answer["stats"]["eval_count"] > 0
        assert len(answer["thinking"].split()) == 3

    def test_text_that_cannot_be_stored(self, stack: Stack, client: Client) -> None:
        """NUL and lone surrogates become U+FFFD before they are counted, so that all four texts agree."""
        model = "tokens=6,nul_at=2,surrogate_at=4"
        session = client.post_message("hello", model=model)
        reader = client.follow(session["sessionId"])
        done = reader.wait_until_done()
        assert reader.text.count("\ufffd") == 2
        assert client.message(session)["content"] == reader.text == expected_text(model).content
        assert done["length"] == len(reader.text)


def test_one_active_stream_a_conversation(stack: Stack, client: Client) -> None:
    """Of twenty who send at once to one conversation one is answered; the others get 409 and leave nothing behind."""
    conversation = client.call("POST", "/api/conversations", {"title": "busy"})
    outcomes: list[Any] = []

    def send() -> None:
        try:
            outcomes.append(client.post_message("me", conversation_id=conversation["id"], model="pace=20,tokens=1000"))
        except ApiError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=send) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused = [one for one in outcomes if isinstance(one, ApiError)]
    assert len(refused) == 19
    assert {(one.status, one.code) for one in refused} == {(409, "conversation_busy")}
    assert len(client.messages(conversation["id"])) == 2
    assert len(client.call("GET", f"/api/conversations/{conversation['id']}")["activeStreams"]) == 1
    client.call("DELETE", f"/api/conversations/{conversation['id']}")
    accepted = next(one for one in outcomes if not isinstance(one, ApiError))
    answer = client.request("GET", f"/api/streams/{accepted['sessionId']}")
    assert answer.status_code == 404


def test_a_hundred_and_fifty_at_once(stack: Stack, client: Client) -> None:
    """More than a pool has connections: all are accepted, all are answered."""
    with ThreadPoolExecutor(150) as pool:
        sessions = list(pool.map(lambda n: client.post_message("me", model=f"name=n{n},tokens=5"), range(150)))
        endings = list(pool.map(lambda one: client.follow(one["sessionId"]).wait_until_done(60), sessions))
    assert {ending["reason"] for ending in endings} == {"stop"}


class TestAnIdempotencyKey:
    """A client that got no answer may ask again."""

    def test_a_repeated_request(self, stack: Stack, client: Client) -> None:
        first = client.post_message("once", model="pace=50,tokens=100", idempotency_key="k1")
        again = client.post_message("once", model="pace=50,tokens=100", idempotency_key="k1")
        assert again["sessionId"] == first["sessionId"]
        assert len(client.messages(first["conversationId"])) == 2
        client.terminate(first["sessionId"])
        after = client.post_message("once", model="pace=50,tokens=100", idempotency_key="k1")
        assert (after["sessionId"], after["status"]) == (first["sessionId"], "TERMINATED")
        with pytest.raises(ApiError) as refused:
            client.post_message("twice", model="pace=50,tokens=100", idempotency_key="k1")
        assert (refused.value.status, refused.value.code) == (422, "invalid")

    def test_twins(self, stack: Stack, client: Client) -> None:
        """The same request twenty times at once begins one session; another user's key is another key."""
        with ThreadPoolExecutor(20) as pool:
            answers = list(
                pool.map(lambda _: client.post_message("me", model="tokens=3", idempotency_key="k2"), range(20))
            )
        assert len({answer["sessionId"] for answer in answers}) == 1
        other = stack.client(stack.user("somebody"))
        assert other.post_message("me", model="tokens=3", idempotency_key="k2")["sessionId"] != answers[0]["sessionId"]
