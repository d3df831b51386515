"""A stream is over by itself: each time-out, by setting and by request, with a worker and without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from tests.functional.ending import assert_ended, rows_of
from tests.functional.nodes import ApiError, Client, Reader, Stack
from tests.services import wait_until
from tests.upstream import UpstreamProcess

SHORT = {"queueSeconds": 1.5, "firstTokenSeconds": 1.0, "idleSeconds": 1.0, "maxDurationSeconds": 2.0}
SHORT_SETTINGS = {
    "SLUICEGATE_QUEUE_TIMEOUT_SECONDS": "1.5",
    "SLUICEGATE_FIRST_TOKEN_TIMEOUT_SECONDS": "1",
    "SLUICEGATE_IDLE_TIMEOUT_SECONDS": "1",
    "SLUICEGATE_MAX_DURATION_SECONDS": "2",
}
CAP_SECONDS = 50
LATE_SECONDS = 2.0
"""That a time-out may be late where a worker watches, on a machine that does other things as well."""
REAP_SECONDS = 2.0
"""Between two passes of the reaper."""

# Each: the model, the seconds of its time-out, and the tokens that come before.
IN_A_WORKER = {
    "first_token_timeout": ("first_token_silence=20", 1.0, 0),
    "first_token_timeout, loading": ("load_seconds=20", 1.0, 0),
    "idle_timeout": ("pace=100,tokens=50,silence_at=10:20,alphabet=mixed", 1.0, 10),
    "max_duration": ("pace=40,tokens=100000,thinking=5", 2.0, 30),
}


@pytest.fixture(scope="module")
def stack_settings() -> Mapping[str, str]:
    return {
        "SLUICEGATE_REQUEST_TIMEOUT_CAP_SECONDS": str(CAP_SECONDS),
        "SLUICEGATE_LEASE_SECONDS": "2",
        "SLUICEGATE_LEASE_RENEW_SECONDS": "0.1",
        "SLUICEGATE_HEARTBEAT_SECONDS": "0.5",
    }


@pytest.fixture(scope="module")
def module_stack(module_stack: Stack) -> Stack:
    """With a web process more, whose settings are short: they count where a session begins."""
    module_stack.start_web(settings=SHORT_SETTINGS)
    module_stack.keep()
    return module_stack


def send(stack: Stack, how: str, model: str) -> dict[str, Any]:
    """A message whose stream has short time-outs, by `setting` or by `request`."""
    if how == "setting":
        return stack.client(web=stack.webs[1]).post_message("go on", model=f"name=setting,{model}")
    return stack.client().post_message("go on", model=f"name=request,{model}", timeouts=SHORT)


class TestInTheWorker:
    """The worker that runs it looks at the clock, and needs no reaper for it."""

    @pytest.mark.parametrize("case", IN_A_WORKER)
    def test_each(self, stack: Stack, client: Client, upstream: UpstreamProcess, case: str) -> None:
        model, seconds, tokens = IN_A_WORKER[case]
        sessions = [send(stack, how, model) for how in ("setting", "request")]
        readers = [client.follow(session["sessionId"]) for session in sessions]
        for session, reader in zip(sessions, readers, strict=True):
            row = assert_ended(stack, upstream, session, [reader], case.partition(",")[0])
            assert row.claimed_at is not None
            assert row.ended_at is not None
            lasted = (row.ended_at - row.claimed_at).total_seconds()
            before = tokens / 100 if "idle" in case else 0.0
            assert seconds + before - 0.05 <= lasted < seconds + before + LATE_SECONDS
            assert len(reader.text.split()) >= tokens
            assert f'"session_id": "{row.id}"' in stack.worker.container.process.log_since_start()
            # Closed before the end was committed; there was a connection, whatever the upstream was at.
            assert row.upstream_closed_at is not None
            assert row.upstream_closed_at <= row.ended_at
            (record,) = upstream.requests(row.model)
            assert record.outcome == "disconnected"
            receipt = client.terminate(session["sessionId"])
            assert (receipt["alreadyEnded"], receipt["requestedAt"]) == (True, None)
            assert receipt["partialResponse"] == reader.text

    def test_one_that_keeps_speaking_is_not_idle(self, stack: Stack, upstream: UpstreamProcess) -> None:
        """A word just in time counts anew, thinking as well as content."""
        client, model = stack.client(), "pace=2,thinking=2,tokens=3"
        session = client.post_message("slowly", model=model, timeouts={"firstTokenSeconds": 1.5, "idleSeconds": 1.5})
        reader = client.follow(session["sessionId"])
        assert_ended(stack, upstream, session, [reader], "stop")


class TestWhatARequestMayAsk:
    @pytest.mark.parametrize("name", SHORT)
    @pytest.mark.parametrize("seconds", [CAP_SECONDS + 0.5, 0, -1, "soon"])
    def test_what_is_refused_is_named(self, client: Client, name: str, seconds: Any) -> None:
        before = client.call("GET", "/api/conversations")
        with pytest.raises(ApiError) as refused:
            client.post_message("go on", model="tokens=1", timeouts={name: seconds})
        assert (refused.value.status, refused.value.code) == (422, "invalid")
        assert [one["field"] for one in refused.value.problem["errors"]] == [f"timeouts.{name}"]
        assert client.call("GET", "/api/conversations") == before

    def test_the_cap_itself_is_allowed(self, client: Client) -> None:
        session = client.post_message("go on", model="tokens=1", timeouts=dict.fromkeys(SHORT, CAP_SECONDS))
        assert client.follow(session["sessionId"]).wait_until_done()["reason"] == "stop"

    def test_no_such_time_out(self, client: Client) -> None:
        with pytest.raises(ApiError) as refused:
            client.post_message("go on", model="tokens=1", timeouts={"patienceSeconds": 1})
        assert (refused.value.status, refused.value.code) == (422, "invalid")


# Without a worker the reaper looks at the clock


@pytest.fixture(scope="module")
def reaped(module_stack: Stack) -> None:
    """With a reaper and beat, from here on."""
    module_stack.start_recovery()


# Each: its time-out, long enough for the worker to be known as lost before it is due, and the model.
OF_A_LOST_WORKER = {
    "first_token_timeout": ({"firstTokenSeconds": 3.5}, "first_token_silence=30"),
    "idle_timeout": ({"idleSeconds": 3.5}, "pace=100,tokens=50,silence_at=10:30,alphabet=mixed"),
    "max_duration": ({"maxDurationSeconds": 4.0}, "pace=40,tokens=100000,thinking=5"),
}


def begin(stack: Stack, client: Client) -> dict[str, tuple[dict[str, Any], Reader]]:
    """One stream for each time-out, read, and so far under way that its worker has noted down when it is due."""
    begun = {}
    for reason, (timeouts, model) in OF_A_LOST_WORKER.items():
        session = client.post_message("go on", model=model, timeouts=timeouts)
        begun[reason] = session, client.follow(session["sessionId"])
    for reason, (session, reader) in begun.items():
        if reason != "first_token_timeout":
            reader.wait_for_text(30)
        wait_until(lambda found=session, due=reason: rows_of(stack, found["sessionId"])[0].due_reason == due, 5)
    return begun


@pytest.mark.usefixtures("reaped")
class TestOfALostWorker:
    """Its sessions end when they would have ended, as what they would have ended, with what was seen."""

    def test_frozen(self, stack: Stack, client: Client, upstream: UpstreamProcess) -> None:
        """For longer than its lease; when it comes back it finds that all is over, writes nothing, and lets go."""
        begun = begin(stack, client)
        worker = stack.worker.container.process
        worker.pause()
        for reason, (_, reader) in begun.items():
            assert reader.wait_until_done(15)["reason"] == reason
        assert upstream.open_count() == len(begun)
        worker.resume()
        upstream.wait_until(lambda records: all(one.outcome == "disconnected" for one in records), 5)
        for reason, (session, reader) in begun.items():
            assert_ended(stack, upstream, session, [reader], reason)

    def test_killed(self, stack: Stack, client: Client, upstream: UpstreamProcess) -> None:
        begun = begin(stack, client)
        stack.worker.container.kill("SIGKILL")
        for reason, (session, reader) in begun.items():
            reader.wait_until_done(15)
            row = assert_ended(stack, upstream, session, [reader], reason)
            assert row.upstream_closed_at is None
            assert row.claimed_at is not None
            assert row.ended_at is not None
            (seconds,) = OF_A_LOST_WORKER[reason][0].values()
            assert (
                seconds - 0.05
                <= (row.ended_at - row.claimed_at).total_seconds()
                < seconds + REAP_SECONDS + 2 * LATE_SECONDS
            )
            assert upstream.requests(row.model)[0].outcome == "disconnected"


@pytest.mark.usefixtures("reaped")
def test_in_the_queue(module_stack: Stack, upstream: UpstreamProcess) -> None:
    """No worker claims it: by setting and by request. What waits longer by its own wish goes on waiting."""
    stack = module_stack
    stack.worker.container.process.kill()
    client = stack.client()
    patient = client.post_message("go on", model="name=patient", timeouts={"queueSeconds": CAP_SECONDS})
    sessions = [send(stack, how, "tokens=5") for how in ("setting", "request")]
    readers = [client.follow(session["sessionId"]) for session in sessions]
    for session, reader in zip(sessions, readers, strict=True):
        row = assert_ended(stack, upstream, session, [reader], "queue_timeout")
        assert row.ended_at is not None
        assert 1.45 <= (row.ended_at - row.started_at).total_seconds() < 1.5 + REAP_SECONDS + LATE_SECONDS
        assert (row.phase, row.attempt, row.length, row.claimed_at) == ("QUEUED", 0, 0, None)
        assert client.message(session)["content"] == ""
    assert upstream.requests() == []
    assert client.stream(patient["sessionId"])["status"] == "ACTIVE"
    client.terminate(patient["sessionId"])
