"""While Redis is gone: nothing new is accepted, what runs goes on, and a stop takes effect through the database."""

from __future__ import annotations

import time

from tests.functional.nodes import Client, Stack
from tests.services import wait_until
from tests.upstream import UpstreamProcess, expected_text


def test_nothing_is_accepted_and_nothing_is_written(stack: Stack, client: Client) -> None:
    client.call("POST", "/api/conversations", {"title": "before"})
    before = client.call("GET", "/api/conversations")
    stack.valkey.kill()
    answer = client.request("POST", "/api/stream-message", json={"content": "hello", "model": "any"})
    assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
    assert int(answer.headers["Retry-After"]) > 0
    assert client.request("GET", "/readyz").status_code == 503
    assert client.call("GET", "/api/conversations") == before


def test_a_stop_takes_effect(stack: Stack, client: Client, upstream: UpstreamProcess) -> None:
    session = client.post_message("go on", model="pace=20,tokens=100000")
    reader = client.follow(session["sessionId"], reconnect=True)
    reader.wait_for_text(20)
    stack.valkey.kill()
    receipt = client.terminate(session["sessionId"])
    assert receipt["reason"] == "user"
    assert upstream.requests()[0].outcome == "disconnected"
    reader.wait_until_done()
    assert reader.text == receipt["partialResponse"] == client.message(session)["content"]


def test_a_stream_that_waits_is_stopped_by_its_row(stack: Stack, client: Client, upstream: UpstreamProcess) -> None:
    """No worker has had it, so nothing was said that Redis alone would know."""
    stack.worker.container.process.kill()
    session = client.post_message("hello", model="tokens=3")
    reader = client.follow(session["sessionId"], reconnect=True)
    wait_until(lambda: reader.events)
    stack.valkey.kill()
    receipt = client.terminate(session["sessionId"])
    assert (receipt["reason"], receipt["partialResponse"], receipt["upstreamClosedAt"]) == ("user", "", None)
    assert reader.wait_until_done()["reason"] == "user"
    stack.valkey.start()
    stack.valkey.await_ready()
    stack.worker.container.process.restart()  # it finds the session in the queue, and has nothing to do
    after = client.post_message("and now?", model="tokens=3")
    assert client.follow(after["sessionId"]).wait_until_done()["reason"] == "stop"
    assert len(upstream.requests()) == 1


def test_what_runs_goes_on(stack: Stack, client: Client) -> None:
    """Redis comes back with what it had: the reader has had a pause, and nothing else."""
    session = client.post_message("go on", model="pace=40,tokens=200")
    reader = client.follow(session["sessionId"], reconnect=True)
    reader.wait_for_text(100)
    stack.valkey.kill()
    length = len(reader.text)
    kept = time.monotonic() + 1
    wait_until(lambda: time.monotonic() > kept, 5, "a second without Redis")
    stack.valkey.start()
    done = reader.wait_until_done()
    assert done["reason"] == "stop"
    assert length < len(reader.text) == done["length"]
    assert reader.text == client.message(session)["content"]


def test_an_emptied_redis(stack: Stack, client: Client, upstream: UpstreamProcess) -> None:
    """The worker has all text, and makes the log anew: one stream goes on to its end, another one is stopped."""
    sessions = [client.post_message("go on", model=f"name={name},pace=40,tokens=200") for name in ("runs", "stops")]
    readers = [client.follow(session["sessionId"], reconnect=True) for session in sessions]
    for reader in readers:
        reader.wait_for_text(100)
    stack.valkey.flush()
    receipt = client.terminate(sessions[1]["sessionId"])
    assert receipt["reason"] == "user"
    assert receipt["length"] >= 100
    readers[1].wait_until_done()
    assert readers[1].text == receipt["partialResponse"] == client.message(sessions[1])["content"]
    done = readers[0].wait_until_done()
    assert done["reason"] == "stop"
    assert readers[0].text == expected_text("name=runs,pace=40,tokens=200").content

    after = client.post_message("and now?", model="tokens=3")
    assert client.follow(after["sessionId"]).wait_until_done()["reason"] == "stop"
