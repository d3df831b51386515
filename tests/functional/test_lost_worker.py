"""A worker is lost, or only asleep: another goes on in each of its streams, in time, and what the sleeper writes when
it wakes counts for nothing."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import psutil
import pytest
import redis

from tests.functional.ending import assert_ended, rows_of
from tests.functional.nodes import Client, Reader, Stack, WorkerNode
from tests.functional.text import assert_one_text
from tests.services import wait_until
from tests.upstream import UpstreamProcess, expected_text

LEASE_SECONDS = 3.0
ALLOWED_SECONDS = 2.0
"""Beyond the lease, until the text goes on."""
STREAMS = 20
KEEPS = 2
MODEL = "pace=14,tokens=130,alphabet=mixed"
THINKS = "pace=14,thinking=110,tokens=10,alphabet=mixed"


pytestmark = pytest.mark.usefixtures("recovery")


@pytest.fixture(scope="module")
def stack_settings() -> Mapping[str, str]:
    return {
        "SLUICEGATE_LEASE_SECONDS": str(LEASE_SECONDS),
        "SLUICEGATE_HEARTBEAT_SECONDS": "1",
        "SLUICEGATE_ON_WORKER_LOST_KEEP_MODELS": "another:*, name=kept*",
    }


@pytest.fixture
def another(stack: Stack) -> WorkerNode:
    """A second worker, which sleeps, and takes nothing, before it is woken: it is there when the first one goes."""
    worker = stack.start_worker()
    worker.pause()
    ports = {one.laddr.port for one in psutil.Process(worker.container.process.pid).net_connections()}
    with redis.Redis.from_url(stack.valkey.url, protocol=2, decode_responses=True) as broker:

        def waits() -> bool:
            """Whether it would be given a message: it asked for one, and the answer has not timed out yet."""
            clients: Any = broker.client_list()
            mine = [one for one in clients if int(one["addr"].rpartition(":")[2]) in ports]
            assert mine
            return any("b" in one["flags"] for one in mine)

        wait_until(lambda: not waits(), 5, "the second worker asks for nothing")
    return worker


def name_of(worker: WorkerNode) -> str:
    """As a row names its owner."""
    return f"{worker.container.worker_name()}@{worker.container.id}"


def begin(client: Client, models: list[str]) -> tuple[list[dict[str, Any]], list[Reader]]:
    """Streams under way, each with a reader."""
    sessions = [client.post_message("go on", model=model) for model in models]
    readers = [client.follow(session["sessionId"]) for session in sessions]
    for reader in readers:
        wait_until(lambda reader=reader: len(reader.thinking + reader.text) >= 20, 30)
    return sessions, readers


def went_on_at(reader: Reader) -> float | None:
    """When the first text came behind the event that tells of a second attempt."""
    again = next((one for one in reader.of("phase") if one.data["attempt"] == 2), None)
    behind = reader.events[reader.events.index(again) :] if again else []
    return next((one.received_at for one in behind if one.event in ("message", "thinking")), None)


def assert_whole(stack: Stack, client: Client, session: dict[str, Any], reader: Reader, model: str) -> None:
    """The numbered tokens, nothing missing, nothing twice; and everybody has the same."""
    assert reader.wait_until_done(60)["reason"] == "stop"
    assert (reader.thinking, reader.text) == tuple(expected_text(model))
    phases = [(one.data["phase"], one.data["attempt"]) for one in reader.of("phase")]
    assert [one for one in phases if one[1] == 2] == [("LOADING", 2), ("GENERATING", 2)]
    assert client.stream(session["sessionId"])["attempt"] == 2
    assert_one_text(stack, client, session, client.terminate(session["sessionId"]), [reader])


def test_twenty_streams_of_a_killed_worker(
    stack: Stack, client: Client, upstream: UpstreamProcess, another: WorkerNode
) -> None:
    """All go on within the lease and two seconds, but those of models that are set not to: their partial is kept."""
    models = [f"name=n{number},{MODEL}" for number in range(STREAMS)]
    kept = [f"name=kept{number},{MODEL}" for number in range(KEEPS)]
    sessions, readers = begin(client, models + kept)
    another.unpause()
    killed_at = time.monotonic()
    stack.worker.container.kill("SIGKILL")
    moments = [wait_until(lambda reader=reader: went_on_at(reader), 30) for reader in readers[:STREAMS]]
    pauses = sorted(moment - killed_at for moment in moments)
    print(f"went on after {pauses[0]:.2f} s to {pauses[-1]:.2f} s, with a lease of {LEASE_SECONDS:g} s")
    assert pauses[-1] < LEASE_SECONDS + ALLOWED_SECONDS
    for session, reader in zip(sessions[STREAMS:], readers[STREAMS:], strict=True):
        row = assert_ended(stack, upstream, session, [reader], "worker_lost")
        assert (row.attempt, row.status) == (1, "ERROR")
        assert expected_text(MODEL).content.startswith(reader.text)
        assert len(reader.text) >= 20
    for session, reader, model in zip(sessions[:STREAMS], readers[:STREAMS], models, strict=True):
        assert_whole(stack, client, session, reader, model)
        assert rows_of(stack, session["sessionId"])[0].losses == 1
    asked = {model: [one.prefill for one in upstream.requests(model)] for model in models + kept}
    assert all(len(prefills) == 2 and prefills[0] is None and prefills[1] for prefills in map(asked.get, models))
    assert all(asked[model] == [None] for model in kept)


def test_a_worker_that_sleeps_over_its_lease(
    stack: Stack, client: Client, upstream: UpstreamProcess, another: WorkerNode
) -> None:
    """Asleep while it wrote the answer, or still thought: awake, it writes nothing, lets go of its upstream, and serves
    what comes next."""
    models = [f"name=s{number},{MODEL}" for number in range(3)] + [f"name=t{number},{THINKS}" for number in range(2)]
    sessions, readers = begin(client, models)
    another.unpause()
    sleeper = stack.worker
    sleeper.pause()
    for reader in readers:
        wait_until(lambda reader=reader: went_on_at(reader), 30)
    beats = {session["sessionId"]: rows_of(stack, session["sessionId"])[0] for session in sessions}
    assert {(row.owner, row.epoch) for row in beats.values()} == {(name_of(another), 2)}
    sleeper.unpause()
    assert_let_go(upstream, models)
    for session, reader, model in zip(sessions, readers, models, strict=True):
        assert_whole(stack, client, session, reader, model)
        row = rows_of(stack, session["sessionId"])[0]
        assert (row.owner, row.epoch, row.losses) == (name_of(another), 2, 1)
    assert_serves(client, another, sleeper)


def assert_let_go(upstream: UpstreamProcess, models: list[str]) -> None:
    """Of the two requests for each model, the sleeper's is closed while the other still runs."""

    def first_closed() -> bool:
        requests = [upstream.requests(model) for model in models]
        assert all(len(two) == 2 for two in requests)
        return all(two[0].outcome == "disconnected" for two in requests)

    wait_until(first_closed, 5, "the sleeper's upstream connections are closed")


def assert_serves(client: Client, gone: WorkerNode, sleeper: WorkerNode) -> None:
    """With the other gone, it takes what comes."""
    gone.container.process.stop()
    session = client.post_message("and now?", model="tokens=5")
    assert client.follow(session["sessionId"]).wait_until_done()["reason"] == "stop"
    assert sleeper.container.process.running
    said = sleeper.container.process.log_since_start()
    assert "Traceback" not in said
    assert '"event": "stream.lost_to_another"' in said


def test_an_only_worker_that_sleeps_over_its_lease(stack: Stack, client: Client, upstream: UpstreamProcess) -> None:
    """Nobody else is there: what was its own is taken from it and queued, and it goes on with that when it wakes."""
    model = f"name=alone,{MODEL}"
    (session,), (reader,) = begin(client, [model])
    stack.worker.pause()
    wait_until(lambda: rows_of(stack, session["sessionId"])[0].owner is None, 10, "its session is given up")
    stack.worker.unpause()
    assert reader.wait_until_done(40)["reason"] == "stop"
    assert reader.text == expected_text(model).content
    assert_ended(stack, upstream, session, [reader], "stop")
