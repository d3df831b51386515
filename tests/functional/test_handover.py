"""A worker that stops, or is lost, does not end its streams: another goes on in the same message."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import redis

from tests.functional.ending import assert_ended
from tests.functional.nodes import Client, Stack
from tests.functional.text import assert_one_text
from tests.services import LocalProcess, wait_until
from tests.upstream import UpstreamProcess, expected_text
from webapp.streams.keys import REAPER_KEY

MODEL = "pace=40,tokens=360,alphabet=mixed"
ENDLESS = "pace=40,tokens=10000,alphabet=mixed"
STREAMS = 3
KEEP = {"SLUICEGATE_ON_WORKER_LOST": "keep", "SLUICEGATE_LEASE_RENEW_SECONDS": "0.1"}
KEEP_THESE = {"SLUICEGATE_ON_WORKER_LOST_KEEP_MODELS": "name=n*", "SLUICEGATE_LEASE_RENEW_SECONDS": "0.1"}


@pytest.fixture(scope="module")
def stack_settings() -> Mapping[str, str]:
    return {"SLUICEGATE_LEASE_SECONDS": "2", "SLUICEGATE_DRAIN_SECONDS": "0", "SLUICEGATE_HEARTBEAT_SECONDS": "0.5"}


def begin(client: Client, model: str = MODEL) -> tuple[list[dict[str, Any]], list[Any]]:
    """Streams under way, each with a reader."""
    sessions = [client.post_message("go on", model=f"name=n{number},{model}") for number in range(STREAMS)]
    readers = [client.follow(session["sessionId"]) for session in sessions]
    for reader in readers:
        reader.wait_for_text(100)
    return sessions, readers


def assert_went_on(stack: Stack, client: Client, sessions: list[dict[str, Any]], readers: list[Any]) -> None:
    """The text is that of an uninterrupted answer, and a second attempt wrote its rest."""
    for session, reader in zip(sessions, readers, strict=True):
        assert reader.wait_until_done(40)["reason"] == "stop"
        assert reader.text == expected_text(MODEL).content
        assert {event.data["attempt"] for event in reader.of("phase")} == {1, 2}
        assert client.stream(session["sessionId"])["attempt"] == 2
        assert_one_text(stack, client, session, client.terminate(session["sessionId"]), [reader])


@pytest.mark.parametrize("starting", [Stack.start_web, Stack.start_reaper], ids=["web", "worker"])
def test_a_process_that_starts_sees_to_what_is_over(
    stack: Stack, client: Client, starting: Callable[[Stack], LocalProcess]
) -> None:
    """Without beat, and without anybody who runs it: what is due ends when the next process starts.

    Before the tests that start a reaper and beat.
    """
    with redis.Redis.from_url(stack.valkey.url) as valkey:
        wait_until(lambda: not valkey.exists(REAPER_KEY), 20, "what is begun by those that run is over")
    stack.worker.container.process.kill()
    session = client.post_message("go on", timeouts={"queueSeconds": 0.5})
    since = time.monotonic()
    wait_until(lambda: time.monotonic() > since + 1, 5)
    assert client.stream(session["sessionId"])["status"] == "ACTIVE"
    process = starting(stack)
    wait_until(lambda: "reaper.pass" in process.log_since_start(), 15)  # to its end: a kill would leave its lock
    assert client.stream(session["sessionId"])["reason"] == "queue_timeout"


def test_a_worker_that_is_asked_to_stop(stack: Stack, client: Client, upstream: UpstreamProcess) -> None:
    """SIGTERM: what has not ended within the grace is given up to another worker."""
    sessions, readers = begin(client)
    stack.start_worker()
    assert stack.worker.container.process.stop() == 0
    assert_went_on(stack, client, sessions, readers)


def test_a_worker_that_is_told_to_leave_at_once(stack: Stack, client: Client, upstream: UpstreamProcess) -> None:
    """SIGQUIT kills its tasks, which nobody means as the end of their streams.

    What it has no time to give up is taken for lost, and found by the reaper.
    """
    stack.start_recovery()
    sessions, readers = begin(client)
    stack.start_worker()
    stack.worker.container.kill("SIGQUIT")
    assert_went_on(stack, client, sessions, readers)
    stack.worker.container.process.wait()


def test_a_stop_while_nobody_runs_it(stack: Stack, client: Client) -> None:
    """Between a killed worker and the next a stop takes effect, and keeps what was seen."""
    sessions, readers = begin(client)
    stack.worker.container.kill("SIGKILL")
    for session, reader in zip(sessions, readers, strict=True):
        receipt = client.terminate(session["sessionId"])
        assert (receipt["reason"], receipt["upstreamClosedAt"]) == ("user", None)
        assert_one_text(stack, client, session, receipt, [reader])


def test_where_going_on_elsewhere_is_off(stack: Stack, client: Client, upstream: UpstreamProcess) -> None:
    """A worker that stops ends its streams as `shutdown`, and keeps what there is: asked to, or told to leave at once;
    because it is off for all models, or for these.

    Another worker is there, and is not given them.
    """
    stack.worker.container.process.kill()
    leaving = [stack.start_worker(settings=KEEP, wait=False)]
    for signal in ("SIGTERM", "SIGQUIT"):
        leaving[-1].ready()
        sessions, readers = begin(client, ENDLESS)
        leaving.append(stack.start_worker(settings=KEEP_THESE, wait=signal == "SIGTERM"))
        leaving[-2].container.kill(signal)
        for session, reader in zip(sessions, readers, strict=True):
            row = assert_ended(stack, upstream, session, [reader], "shutdown")
            assert (row.status, row.attempt) == ("TERMINATED", 1)
            assert row.upstream_closed_at is not None
            assert expected_text(ENDLESS).content.startswith(reader.text)
            receipt = client.terminate(session["sessionId"])
            assert (receipt["reason"], receipt["partialResponse"]) == ("shutdown", reader.text)
        leaving[-2].container.process.wait()
    asked = [one for one in upstream.requests() if ENDLESS in one.model]
    assert [one.outcome for one in asked] == ["disconnected"] * 2 * STREAMS
