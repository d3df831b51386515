"""Redis lost under twenty streams: killed, emptied, or there and silent. Nothing is lost of what was seen or accepted.

SLUICEGATE_TEST_SILENCE_SECONDS is how long a Redis says nothing, and a network drops everything.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import pytest
import requests

from tests.functional.ending import assert_upstream_free
from tests.functional.network import Network
from tests.functional.nodes import ApiError, Client, Reader, Stack
from tests.functional.text import sha256
from tests.services import ValkeyServer, wait_until
from tests.upstream import UpstreamProcess, expected_text
from webapp.streams.events import Position

STREAMS = 20
STOPPED = 3
OUTAGE_SECONDS = 3.0
SILENCE_SECONDS = float(os.environ.get("SLUICEGATE_TEST_SILENCE_SECONDS", "5"))
# What is promised, where Redis is there and says nothing:
REFUSED_SECONDS = 3.0
ANSWERED_SECONDS = 3.0
STOPPED_SECONDS = 10.0
BACK_SECONDS = 5.0

Timed = tuple[Any, float]


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """So many calls at once as there are streams."""
    with ThreadPoolExecutor(STREAMS) as pool:
        yield pool


def restart_with_its_data(valkey: ValkeyServer) -> None:
    valkey.start()
    valkey.await_ready()


def restart_empty(valkey: ValkeyServer) -> None:
    assert valkey.directory is not None
    shutil.rmtree(valkey.directory / "appendonlydir")
    restart_with_its_data(valkey)


def begin(client: Client, pool: ThreadPoolExecutor, model: str) -> tuple[list[dict[str, Any]], list[Reader]]:
    """Streams under way, each with a reader."""
    sessions = list(pool.map(lambda n: client.post_message("go on", model=f"name=n{n},{model}"), range(STREAMS)))
    readers = [client.follow(session["sessionId"], reconnect=True) for session in sessions]
    for reader in readers:
        reader.wait_for_text(20)
    return sessions, readers


def timed(call: Callable[[], Any]) -> Timed:
    """What a call answers, and after how many seconds."""
    since = time.monotonic()
    answer = call()
    return answer, time.monotonic() - since


def hold(seconds: float, since: float) -> None:
    """Let an outage last."""
    wait_until(lambda: time.monotonic() > since + seconds, seconds + 5)


def assert_whole(
    client: Client, model: str, session: dict[str, Any], reader: Reader, receipt: dict[str, Any] | None
) -> None:
    """Seen = saved = what the upstream said; each event came once, in order, and `done` last."""
    done = reader.wait_until_done(60)
    message = client.message(session)
    whole = expected_text(model).content
    assert reader.text == message["content"]
    assert (done["length"], done["sha256"]) == (len(reader.text), sha256(reader.text))
    assert (done["status"], done["reason"]) == (message["status"], message["reason"])
    if receipt is None:
        assert (done["reason"], reader.text) == ("stop", whole)
    else:
        assert (done["reason"], receipt["reason"]) == ("user", "user")
        assert receipt["partialResponse"] == reader.text
        assert whole.startswith(reader.text)
    positions = [Position.parse(identity) for identity in reader.ids]
    assert all(one < next_ for one, next_ in pairwise(positions))
    assert [event.event for event in reader.events].count("done") == 1
    assert reader.events[-1].event == "done"
    assert {event.data["attempt"] for event in reader.of("phase")} == {1}


@pytest.mark.parametrize("restart", [restart_with_its_data, restart_empty])
def test_twenty_streams_end_whole(
    stack: Stack,
    client: Client,
    pool: ThreadPoolExecutor,
    upstream: UpstreamProcess,
    restart: Callable[[ValkeyServer], None],
) -> None:
    """Killed and started again: some streams are stopped meanwhile, the others run to their end."""
    model = "pace=20,tokens=120,alphabet=mixed"
    sessions, readers = begin(client, pool, model)
    stack.valkey.kill()
    since = time.monotonic()
    stopping = [pool.submit(timed, lambda s=one: client.terminate(s["sessionId"])) for one in sessions[:STOPPED]]
    receipts = [one.result() for one in stopping]
    assert max(seconds for _, seconds in receipts) < STOPPED_SECONDS
    for reader in readers[:STOPPED]:
        reader.wait_until_done(5)  # from the database, while Redis is away
    assert_upstream_free(upstream, f"name=n0,{model}")
    hold(OUTAGE_SECONDS, since)
    restart(stack.valkey)
    for number, (session, reader) in enumerate(zip(sessions, readers, strict=True)):
        assert_whole(client, model, session, reader, receipts[number][0] if number < STOPPED else None)
        assert [one.outcome for one in upstream.requests(f"name=n{number},{model}")] == [
            "disconnected" if number < STOPPED else "completed"
        ]
    assert stack.worker.container.process.log_since_start().count('"flusher.redis_lost"') <= 2


def test_what_was_accepted_is_not_forgotten(stack: Stack, client: Client, upstream: UpstreamProcess) -> None:
    """Redis dies in the middle of what is being accepted, and comes back empty: each 202 becomes a whole answer."""
    stack.start_recovery()
    accepted: list[dict[str, Any]] = []
    refused: list[requests.Response] = []
    over = False

    def post() -> None:
        while not over:
            try:
                accepted.append(client.post_message("hello", model="tokens=3"))
            except ApiError as error:
                refused.append(error.response)
                time.sleep(0.05)

    with ThreadPoolExecutor(3) as pool:
        posting = [pool.submit(post) for _ in range(3)]
        try:
            for _ in range(2):
                count = len(accepted)
                wait_until(lambda count=count: len(accepted) > count + 5, 20)
                stack.valkey.kill()
                count = len(refused)
                wait_until(lambda count=count: len(refused) > count + 2, 20)
                restart_empty(stack.valkey)
        finally:
            over = True
        for one in posting:
            one.result()
    assert {(one.status_code, one.headers["Retry-After"]) for one in refused} == {(503, "2")}
    since = time.monotonic()
    for session in accepted:
        wait_until(lambda session=session: client.message(session)["status"] != "ACTIVE", 30)
        message = client.message(session)
        assert (message["reason"], message["content"]) == ("stop", expected_text("tokens=3").content)
    assert time.monotonic() - since < 15  # at once, and not when a message that nobody takes would be queued again


def test_a_redis_that_says_nothing(
    stack: Stack, client: Client, pool: ThreadPoolExecutor, upstream: UpstreamProcess
) -> None:
    """It takes connections and commands, and answers none: whoever asks it is told soon, and all goes on after it."""
    model = f"pace=20,tokens={20 * int(SILENCE_SECONDS + 4)}"
    sessions, readers = begin(client, pool, model)
    stack.valkey.pause()
    since = time.monotonic()
    receipts, late = asked_in_silence(stack, client, pool, sessions)
    hold(SILENCE_SECONDS, since)
    stack.valkey.resume()
    assert_all_goes_on(client, model, sessions, readers, receipts, late)


def test_a_network_that_drops_everything(stack: Stack, pool: ThreadPoolExecutor, upstream: UpstreamProcess) -> None:
    """As above; what was said in the silence is lost, and each connection is reset at its end."""
    model = f"pace=20,tokens={20 * int(SILENCE_SECONDS + 4)}"
    with Network(stack.valkey.port) as network:
        stack.worker.container.process.kill()
        behind = {"REDIS_URL": network.url}
        worker = stack.start_worker(settings=behind, wait=False)
        client = stack.client(web=stack.start_web(settings=behind))
        worker.ready()
        sessions, readers = begin(client, pool, model)
        network.silence()
        since = time.monotonic()
        receipts, late = asked_in_silence(stack, client, pool, sessions)
        hold(SILENCE_SECONDS, since)
        network.speak()
        assert_all_goes_on(client, model, sessions, readers, receipts, late)


def asked_in_silence(
    stack: Stack, client: Client, pool: ThreadPoolExecutor, sessions: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], Reader]:
    """What is asked meanwhile is answered in time. Returns receipts of the first, and a reader of the last."""
    last = sessions[-1]
    body = {"content": "hello", "model": "tokens=3"}

    def get(path: str) -> Future[Timed]:
        return pool.submit(timed, lambda: client.request("GET", path))

    refused = pool.submit(timed, lambda: client.request("POST", "/api/stream-message", json=body))
    stopping = [pool.submit(timed, lambda s=one: client.terminate(s["sessionId"])) for one in sessions[:STOPPED]]
    shown = [
        get(path)
        for path in (
            "/api/streams?status=ACTIVE",
            f"/api/streams/{last['sessionId']}",
            "/api/conversations",
            f"/api/conversations/{last['conversationId']}",
            f"/api/conversations/{last['conversationId']}/messages",
            "/healthz",
        )
    ]
    not_ready, late = get("/readyz"), client.follow(last["sessionId"], reconnect=True)
    wait_until(lambda: late.events, ANSWERED_SECONDS, "who comes in the silence is told which stream it is")
    answer, seconds = refused.result()
    assert (answer.status_code, answer.json()["code"], seconds < REFUSED_SECONDS) == (503, "unavailable", True)
    assert int(answer.headers["Retry-After"]) > 0
    for one in shown:
        answer, seconds = one.result()
        assert (answer.status_code, seconds < ANSWERED_SECONDS) == (200, True), answer.url
    answer, seconds = not_ready.result()
    assert (answer.status_code, seconds < ANSWERED_SECONDS) == (503, True)
    receipts = [one.result() for one in stopping]
    assert max(seconds for _, seconds in receipts) < STOPPED_SECONDS
    return [receipt for receipt, _ in receipts], late


def assert_all_goes_on(
    client: Client,
    model: str,
    sessions: list[dict[str, Any]],
    readers: list[Reader],
    receipts: list[dict[str, Any]],
    late: Reader,
) -> None:
    """Redis answers again: readers go on, new messages are taken and answered, and every stream ends whole."""
    since, lengths = time.monotonic(), [len(reader.text) for reader in readers]
    for reader, length in zip(readers[STOPPED:], lengths[STOPPED:], strict=True):
        wait_until(lambda r=reader, n=length: len(r.text) > n, BACK_SECONDS, "a reader goes on")
    after = wait_until(lambda: client.post_message("and now?", model="tokens=3"), BACK_SECONDS, ignoring=(ApiError,))
    assert client.follow(after["sessionId"]).wait_until_done()["reason"] == "stop"
    assert time.monotonic() - since < 2 * BACK_SECONDS
    for number, (session, reader) in enumerate(zip(sessions, readers, strict=True)):
        assert_whole(client, model, session, reader, receipts[number] if number < STOPPED else None)
    assert_whole(client, model, sessions[-1], late, None)


def test_a_stop_of_what_was_claimed_without_redis(stack: Stack, client: Client, upstream: UpstreamProcess) -> None:
    """The broker is there and the token log is not: what a worker has taken and cannot begin, can be stopped."""
    stack.worker.container.process.kill()
    with Network(stack.valkey.port) as network:
        network.silence()
        session = client.post_message("hello", model="name=unheard,tokens=3")
        stack.start_worker(settings={"REDIS_URL": network.url, "CELERY_BROKER_URL": stack.valkey.url})
        wait_until(lambda: client.stream(session["sessionId"])["attempt"] == 1, 10, "it is claimed")
        stack.valkey.pause()
        receipt, seconds = timed(lambda: client.terminate(session["sessionId"]))
        assert (receipt["reason"], receipt["partialResponse"]) == ("user", "")
        assert seconds < STOPPED_SECONDS
        assert upstream.requests("name=unheard,tokens=3") == []
