"""Whoever ends a stream, and by whatever means: it is the same kind of ending, with the same things left behind."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import requests
from celery import Celery
from pytest_celery import CeleryTestSetup

from tests.figures import Figures, Moved
from tests.functional.ending import assert_ended, rows_of
from tests.functional.nodes import NO_PROXIES, Client, Reader, Stack
from tests.services import HOST, wait_until
from tests.upstream import UpstreamProcess

SPEAKS = "pace=50,tokens=100000,thinking=3,alphabet=mixed"
TERMINATE = """
mutation ($input: TerminateStreamInput!) {
  terminateStream(input: $input) {
    ... on TerminationReceipt { sessionId status reason length }
    ... on StreamError { code message }
  }
}
"""


@pytest.fixture(scope="module")
def stack_settings() -> Mapping[str, str]:
    # A command says no more than warnings unless it is told what to log.
    return {
        "SLUICEGATE_LEASE_RENEW_SECONDS": "0.1",
        "SLUICEGATE_ABANDON_GRACE_SECONDS": "1",
        "SLUICEGATE_LOG_LEVEL": "INFO",
    }


@pytest.fixture(scope="module")
def module_stack(module_stack: Stack) -> Stack:
    """With everything else that may end a stream."""
    module_stack.start_recovery()
    module_stack.start_flower()
    return module_stack


@dataclass
class Stream:
    """One that is going on, and has said something to its reader."""

    stack: Stack
    client: Client
    session: dict[str, Any]
    reader: Reader

    @property
    def id(self) -> str:
        return str(self.session["sessionId"])


def by_rest(stream: Stream) -> str:
    assert stream.client.terminate(stream.id)["status"] == "TERMINATED"
    return ""


def by_graphql(stream: Stream) -> str:
    body = {"query": TERMINATE, "variables": {"input": {"sessionId": stream.id}}}
    receipt = stream.client.call("POST", "/graphql", body)["data"]["terminateStream"]
    assert (receipt["sessionId"], receipt["status"], receipt["reason"]) == (stream.id, "TERMINATED", "user")
    return ""


def by_cli(stream: Stream) -> str:
    done = stream.stack.cli_result("streams", "stop", stream.id)
    assert done.returncode == 0
    return done.stderr


def by_flower(stream: Stream) -> str:
    port = stream.stack.others["flower"].environment["SLUICEGATE_FLOWER_PORT"]
    url = f"http://{HOST}:{port}/api/task/revoke/{stream.id}?terminate=true"
    requests.post(url, auth=("owner", "flower"), timeout=10, proxies=NO_PROXIES).raise_for_status()
    return ""


def by_celery(stream: Stream) -> str:
    """`celery control`, over the worker's own command line: marked as revoked it goes on, terminated it does not."""
    run = stream.stack.worker.container.exec_run
    celery = [stream.stack.worker.container.process.command[0], "-A", "workers.celery", "control", "--timeout", "0.5"]
    assert run([*celery, "revoke", stream.id])[0] == 0
    assert stream.client.stream(stream.id)["status"] == "ACTIVE"
    code, said = run([*celery, "terminate", "SIGTERM", stream.id])
    assert code == 0
    return said.decode()


def by_a_new_message(stream: Stream) -> str:
    conversation_id = stream.session["conversationId"]
    new = stream.client.post_message(
        "no, this", conversation_id=conversation_id, model="name=new,load_seconds=60", on_active="terminate"
    )
    stream.reader.wait_until_done()
    stream.client.terminate(new["sessionId"])
    return ""


def by_deletion(stream: Stream) -> str:
    stream.client.call("DELETE", f"/api/conversations/{stream.session['conversationId']}")
    assert stream.client.request("GET", f"/api/streams/{stream.id}").status_code == 404
    return ""


def by_leaving(stream: Stream) -> str:
    """Its only reader goes; one who comes when all is over is told how it ended."""
    stream.reader.leave()
    wait_until(lambda: stream.client.stream(stream.id)["status"] != "ACTIVE", 10, "nobody watches, so it ends")
    seen = stream.reader.text
    stream.reader = stream.client.follow(stream.id)
    stream.reader.wait_until_done()
    assert stream.reader.text.startswith(seen)
    return ""


def by_itself(stream: Stream) -> str:
    stream.reader.wait_until_done()
    return ""


@dataclass(frozen=True)
class Case:
    """A way to end, the reason, and what else has to be so for it."""

    end: Callable[[Stream], str]
    reason: str
    model: str = SPEAKS
    timeouts: Mapping[str, float] | None = None
    on_disconnect: str | None = None
    requested: bool = True
    """Whether it is somebody's stop, which has a time and takes one; else the worker's own ending."""


CASES = {
    "rest": Case(by_rest, "user"),
    "graphql": Case(by_graphql, "user"),
    "cli": Case(by_cli, "admin"),
    "flower": Case(by_flower, "revoked", requested=False),
    "celery": Case(by_celery, "revoked", requested=False),
    "superseded": Case(by_a_new_message, "superseded"),
    "deleted": Case(by_deletion, "conversation_deleted"),
    "abandoned": Case(by_leaving, "abandoned", on_disconnect="terminate"),
    "first token": Case(by_itself, "first_token_timeout", "load_seconds=60", {"firstTokenSeconds": 1}, requested=False),
    "idle": Case(by_itself, "idle_timeout", "pace=50,silence_at=9:60,thinking=3", {"idleSeconds": 1}, requested=False),
    "duration": Case(by_itself, "max_duration", SPEAKS, {"maxDurationSeconds": 1}, requested=False),
    "error": Case(by_itself, "upstream_error", "pace=50,reset_at=9,thinking=3", requested=False),
}


@pytest.mark.parametrize("name", CASES)
def test_each_way(stack: Stack, client: Client, upstream: UpstreamProcess, name: str) -> None:
    case = CASES[name]
    before = Figures.scrape(stack.url())
    model = f"name={name.replace(' ', '-')},{case.model}"
    session = client.post_message("go on", model=model, on_disconnect=case.on_disconnect, timeouts=case.timeouts)
    stream = Stream(stack, client, session, client.follow(session["sessionId"]))
    if "load" not in case.model:
        stream.reader.wait_for_text(10)
    printed = case.end(stream)
    row = assert_ended(stack, upstream, session, [stream.reader], case.reason, more_logs=[printed])
    assert (row.phase, row.attempt) == ("LOADING" if "load" in case.model else "GENERATING", 1)
    assert (row.stop_requested_at is not None) is case.requested
    assert_freed_first(upstream, row, case)
    assert_counted(Moved(before, Figures.scrape(stack.url())), row, case, streams=2 if name == "superseded" else 1)


def assert_freed_first(upstream: UpstreamProcess, row: Any, case: Case) -> None:
    """The upstream was closed, and seen to be, at the latest when the ending was committed."""
    (record,) = upstream.requests(row.model)
    assert record.outcome == ("fault" if case.reason == "upstream_error" else "disconnected")
    assert row.upstream_closed_at is not None
    assert row.upstream_closed_at <= row.ended_at
    if record.disconnected_at is not None:
        assert record.disconnected_at <= row.ended_at.timestamp() + 0.2


def assert_counted(moved: Moved, row: Any, case: Case, *, streams: int) -> None:
    """Every process's figures together have moved by this one ending."""
    labels = {"status": row.status, "reason": row.reason, "phase": row.phase}
    assert moved.by("sluicegate_streams_ended_total", **labels) == 1
    assert moved.by("sluicegate_streams_ended_total") == streams
    assert moved.by("sluicegate_streams_started_total") == streams
    assert moved.by("sluicegate_partial_length_characters_count") == streams
    assert moved.by("sluicegate_partial_length_characters_sum") == row.length
    stops = streams if case.requested else 0
    for step in ("stop_request_to_fence", "stop_request_to_commit"):
        assert moved.by(f"sluicegate_{step}_seconds_count") == stops
    assert moved.after.sum("sluicegate_active_streams") == 0


def test_celery_terminates_at_any_moment(
    stack: Stack, client: Client, upstream: UpstreamProcess, celery_setup: CeleryTestSetup
) -> None:
    """Terminations sent at random: before the worker has the task, in each phase, and when all is over."""
    seed = random.SystemRandom().randrange(10**6)
    print(f"the delays' seed is {seed}")
    delays = [0.0, *sorted(random.Random(seed).uniform(0, 0.6) for _ in range(11))]
    app: Celery = celery_setup.app
    begun = []
    for number, delay_seconds in enumerate(delays):
        session = client.post_message("go on", model=f"name=n{number},load_seconds=0.1,pace=60,tokens=20,thinking=4")
        reader = client.follow(session["sessionId"])
        time.sleep(delay_seconds)
        app.control.revoke(session["sessionId"], terminate=True)
        begun.append((session, reader))
    reasons = []
    for session, reader in begun:
        reason = str(reader.wait_until_done()["reason"])
        assert reason in ("revoked", "stop")
        assert_ended(stack, upstream, session, [reader], reason)
        assert client.terminate(session["sessionId"])["alreadyEnded"] is True
        reasons.append(reason)
    assert "revoked" in reasons
    after = client.post_message("and now?", model="tokens=3")
    assert client.follow(after["sessionId"]).wait_until_done()["reason"] == "stop"


def test_celery_terminates_while_the_worker_drains(
    stack: Stack, client: Client, upstream: UpstreamProcess, celery_setup: CeleryTestSetup
) -> None:
    """Its worker is leaving, and lets it go on for a grace; whoever terminates it means it all the same."""
    session = client.post_message("go on", model=SPEAKS)
    reader = client.follow(session["sessionId"])
    reader.wait_for_text(10)
    stack.worker.container.kill("SIGTERM")
    stack.worker.wait_for_log("worker.draining")
    app: Celery = celery_setup.app
    app.control.revoke(session["sessionId"], terminate=True)
    reader.wait_until_done()
    row = assert_ended(stack, upstream, session, [reader], "revoked")
    assert (row.attempt, row.phase) == (1, "GENERATING")
    assert row.upstream_closed_at is not None


def test_while_it_is_queued(module_stack: Stack, upstream: UpstreamProcess) -> None:
    """No worker has it: whoever ends it then leaves the same behind."""
    stack = module_stack
    stack.worker.container.process.kill()
    client = stack.client()
    for name, reason in (
        ("rest", "user"),
        ("cli", "admin"),
        ("deleted", "conversation_deleted"),
        ("", "queue_timeout"),
    ):
        before = Figures.scrape(stack.url())
        timeouts = {"queueSeconds": 1.0} if reason == "queue_timeout" else None
        session = client.post_message("go on", model=SPEAKS, timeouts=timeouts)
        stream = Stream(stack, client, session, client.follow(session["sessionId"]))
        wait_until(lambda reader=stream.reader: reader.of("phase"), 5, "it is read")
        printed = CASES[name].end(stream) if name else by_itself(stream)
        row = assert_ended(stack, upstream, session, [stream.reader], reason, more_logs=[printed])
        assert (row.phase, row.attempt, row.length, row.upstream_closed_at) == ("QUEUED", 0, 0, None)
        moved = Moved(before, Figures.scrape(stack.url()))
        assert moved.by("sluicegate_streams_ended_total", status="TERMINATED", reason=reason, phase="QUEUED") == 1
        assert rows_of(stack, session["sessionId"])[1].content == ""
    assert upstream.requests() == []
