"""A stop in every phase: at once, once, and with the upstream freed."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from celery import Celery
from pytest_celery import CeleryTestSetup

from tests.functional.nodes import Client, Reader, Stack
from tests.functional.text import assert_one_text
from tests.services import ProcessFailed, wait_until
from tests.upstream import UpstreamProcess

PROMPT_SECONDS = 1.0
"""Well under a second is asked for; a machine that does other things as well is allowed some of the rest."""
TERMINATORS = 50


@pytest.fixture(scope="module", params=["postgresql", "sqlite"])
def stack_database(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def terminate_promptly(client: Client, session: dict[str, Any]) -> dict[str, Any]:
    """The receipt, which came promptly."""
    began = time.monotonic()
    receipt = client.terminate(session["sessionId"])
    assert time.monotonic() - began < PROMPT_SECONDS
    return receipt


def assert_freed(upstream: UpstreamProcess, model: str) -> None:
    """The upstream saw the disconnect, and soon."""
    upstream.wait_until(lambda records: [one.outcome for one in records if one.model == model] == ["disconnected"], 1)
    assert upstream.open_count() == 0


def in_phase(client: Client, session: dict[str, Any], phase: str) -> None:
    """Wait until the session is there."""
    wait_until(lambda: client.stream(session["sessionId"])["phase"] == phase, 10, f"the phase {phase}")


class TestInEveryPhase:
    """One stop each: the answer is prompt, the ending is the caller's, the upstream is free."""

    def test_while_it_streams(self, stack: Stack, client: Client, upstream: UpstreamProcess) -> None:
        model = "pace=50,tokens=100000,thinking=5"
        session = client.post_message("go on", model=model)
        reader = client.follow(session["sessionId"])
        reader.wait_for_text(50)
        receipt = terminate_promptly(client, session)
        assert (receipt["status"], receipt["reason"]) == ("TERMINATED", "user")
        assert receipt["alreadyEnded"] is False
        assert receipt["length"] >= 50
        moments = [receipt[name] for name in ("requestedAt", "fencedAt", "upstreamClosedAt", "committedAt")]
        assert moments[0] < moments[1] < moments[3]
        assert moments[0] < moments[2] < moments[3]
        assert_one_text(stack, client, session, receipt, [reader])
        assert_freed(upstream, model)

    def test_while_the_model_loads(self, stack: Stack, client: Client, upstream: UpstreamProcess) -> None:
        model = "load_seconds=20"
        session = client.post_message("go on", model=model)
        upstream.wait_until(lambda records: bool(records), 10)
        receipt = terminate_promptly(client, session)
        assert (receipt["reason"], receipt["length"]) == ("user", 0)
        assert receipt["upstreamClosedAt"] is not None
        assert_freed(upstream, model)

    def test_before_the_first_token(self, stack: Stack, client: Client, upstream: UpstreamProcess) -> None:
        model = "first_token_silence=20"
        session = client.post_message("go on", model=model)
        upstream.wait_until(lambda records: bool(records and records[0].headers_sent_at), 10)
        receipt = terminate_promptly(client, session)
        assert (receipt["reason"], receipt["partialResponse"]) == ("user", "")
        assert_freed(upstream, model)

    def test_in_a_silence(self, stack: Stack, client: Client, upstream: UpstreamProcess) -> None:
        model = "silence_at=10:20,pace=100"
        session = client.post_message("go on", model=model)
        reader = client.follow(session["sessionId"])
        upstream.wait_until(lambda records: bool(records and records[0].tokens_sent >= 10), 10)
        receipt = terminate_promptly(client, session)
        assert receipt["partialResponse"].split() == [f"t{number}" for number in range(10)]
        assert_one_text(stack, client, session, receipt, [reader])
        assert_freed(upstream, model)

    def test_while_connecting(self, stack: Stack, client: Client, deaf_address: str) -> None:
        stack.worker.container.process.kill()
        stack.start_worker(settings={"OLLAMA_BASE_URL": deaf_address})
        session = client.post_message("go on", model="any")
        in_phase(client, session, "LOADING")
        receipt = terminate_promptly(client, session)
        assert (receipt["reason"], receipt["length"]) == ("user", 0)

    def test_while_queued(self, stack: Stack, client: Client, upstream: UpstreamProcess) -> None:
        stack.worker.container.process.kill()
        only_place = stack.start_worker(concurrency=1)
        running = client.post_message("go on", model="name=running,pace=20,tokens=100000")
        in_phase(client, running, "GENERATING")
        queued = client.post_message("and I?", model="name=queued")
        reader = client.follow(queued["sessionId"])
        wait_until(lambda: reader.of("phase"), 5, "a phase event")
        assert reader.of("phase")[0].data["phase"] == "QUEUED"
        assert reader.of("phase")[0].id is None

        receipt = terminate_promptly(client, queued)
        assert (receipt["reason"], receipt["length"], receipt["upstreamClosedAt"]) == ("user", 0, None)
        assert_one_text(stack, client, queued, receipt, [reader])

        client.terminate(running["sessionId"])
        after = client.post_message("the next", model="name=after,tokens=3")
        client.follow(after["sessionId"]).wait_until_done()
        assert [one.model for one in upstream.requests() if "queued" in one.model] == []
        assert only_place.container.process.running

    def test_without_any_worker(self, stack: Stack, client: Client, upstream: UpstreamProcess) -> None:
        stack.worker.container.process.kill()
        session = client.post_message("is there anybody?", model="name=nobody")
        receipt = terminate_promptly(client, session)
        assert (receipt["status"], receipt["reason"], receipt["length"]) == ("TERMINATED", "user", 0)
        stack.start_worker()
        after = client.post_message("the next", model="name=after,tokens=3")
        client.follow(after["sessionId"]).wait_until_done()
        assert [one.model for one in upstream.requests()] == ["name=after,tokens=3"]


@pytest.fixture
def deaf_address() -> Iterator[str]:
    """A server that never completes a connection: its backlog is full."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        address = server.getsockname()
        fillers = [socket.socket() for _ in range(3)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(address)
        yield f"http://127.0.0.1:{address[1]}"
        for filler in fillers:
            filler.close()


class TestRaces:
    """Fifty who stop one stream: one outcome, fifty equal receipts, one `done`."""

    def test_fifty_terminators(self, stack: Stack, client: Client, upstream: UpstreamProcess) -> None:
        session = client.post_message("go on", model="pace=100,tokens=100000")
        readers = [client.follow(session["sessionId"]) for _ in range(2)]
        readers[0].wait_for_text(20)
        receipts = terminate_together(client, session)
        assert receipts[0]["reason"] == "user"
        assert_one_outcome(stack, client, session, receipts, readers)
        upstream.wait_until(lambda records: records[0].outcome == "disconnected", 1)

    @pytest.mark.parametrize("attempt", range(6))
    def test_fifty_terminators_and_the_natural_end(self, stack: Stack, client: Client, attempt: int) -> None:
        """The answer ends by itself about when fifty stop it: a little before, in between, or a little after."""
        model = f"pace=100,tokens={20 + 10 * attempt}"
        session = client.post_message("go on", model=model)
        readers = [client.follow(session["sessionId"])]
        readers[0].wait_for_text(1)
        if attempt > 2:
            readers[0].wait_for_text(100)
        receipts = terminate_together(client, session)
        assert receipts[0]["reason"] in ("user", "stop")
        assert receipts[0]["alreadyEnded"] is (receipts[0]["reason"] == "stop")
        assert_one_outcome(stack, client, session, receipts, readers)

    def test_a_stream_that_has_ended(self, stack: Stack, client: Client) -> None:
        session = client.post_message("go on", model="tokens=5")
        reader = client.follow(session["sessionId"])
        reader.wait_until_done()
        receipts = [client.terminate(session["sessionId"]) for _ in range(2)]
        assert receipts[0] == receipts[1]
        assert receipts[0]["alreadyEnded"] is True
        assert (receipts[0]["status"], receipts[0]["requestedAt"]) == ("COMPLETED", None)
        assert_one_text(stack, client, session, receipts[0], [reader])

    def test_from_another_node(self, stack: Stack, client: Client, upstream: UpstreamProcess) -> None:
        """A stop at one web process ends the stream that another began, with readers at both."""
        other = stack.client(web=stack.start_web())
        session = client.post_message("go on", model="pace=50,tokens=100000")
        readers = [client.follow(session["sessionId"]), other.follow(session["sessionId"])]
        for reader in readers:
            reader.wait_for_text(20)
        receipt = terminate_promptly(other, session)
        assert client.terminate(session["sessionId"]) == receipt
        assert_one_text(stack, client, session, receipt, readers)
        assert upstream.open_count() == 0


def terminate_together(client: Client, session: dict[str, Any]) -> list[dict[str, Any]]:
    """What fifty callers get who ask at the same time."""
    with ThreadPoolExecutor(TERMINATORS) as pool:
        return list(pool.map(lambda _: client.terminate(session["sessionId"]), range(TERMINATORS)))


def assert_one_outcome(
    stack: Stack, client: Client, session: dict[str, Any], receipts: list[dict[str, Any]], readers: list[Reader]
) -> None:
    assert len(receipts) == TERMINATORS
    assert all(receipt == receipts[0] for receipt in receipts)
    assert_one_text(stack, client, session, receipts[0], readers)
    late = client.follow(session["sessionId"])
    late.wait_until_done()
    assert len(late.of("done")) == 1
    assert late.done == readers[0].done


class TestOtherWays:
    """Stops that do not come through the API."""

    def test_the_command_line(self, stack: Stack, client: Client, upstream: UpstreamProcess) -> None:
        session = client.post_message("go on", model="pace=50,tokens=100000")
        reader = client.follow(session["sessionId"])
        reader.wait_for_text(10)
        with pytest.raises(ProcessFailed, match="There is no user 'nobody'"):
            stack.cli("streams", "stop", "--user", "nobody")
        stack.cli("streams", "stop", session["sessionId"])
        assert reader.wait_until_done()["reason"] == "admin"
        receipt = client.terminate(session["sessionId"])
        assert (receipt["reason"], receipt["alreadyEnded"]) == ("admin", False)
        assert_one_text(stack, client, session, receipt, [reader])

    def test_celery_revoke_with_terminate(
        self, stack: Stack, client: Client, upstream: UpstreamProcess, celery_setup: CeleryTestSetup
    ) -> None:
        """Flower's button: the task's greenlet is killed, and yet the session ends, with its partial."""
        model = "pace=50,tokens=100000"
        session = client.post_message("go on", model=model)
        reader = client.follow(session["sessionId"])
        reader.wait_for_text(10)
        app: Celery = celery_setup.app
        app.control.revoke(session["sessionId"], terminate=True)
        assert reader.wait_until_done()["reason"] == "revoked"
        receipt = client.terminate(session["sessionId"])
        assert receipt["alreadyEnded"] is True
        assert_one_text(stack, client, session, receipt, [reader])
        assert_freed(upstream, model)
        stack.worker.wait_for_log("stream.terminated")

    def test_celery_revoke_of_a_queued_task(
        self, stack: Stack, client: Client, upstream: UpstreamProcess, celery_setup: CeleryTestSetup
    ) -> None:
        """The worker drops the message when it meets it, and ends the session."""
        stack.worker.container.process.kill()
        stack.start_worker(concurrency=1)
        running = client.post_message("go on", model="name=running,pace=20,tokens=100000")
        in_phase(client, running, "GENERATING")
        queued = client.post_message("and I?", model="name=queued")
        reader = client.follow(queued["sessionId"])
        app: Celery = celery_setup.app
        app.control.revoke(queued["sessionId"])
        client.terminate(running["sessionId"])
        assert reader.wait_until_done()["reason"] == "revoked"
        assert [one.model for one in upstream.requests() if "queued" in one.model] == []
