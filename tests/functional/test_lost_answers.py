"""The answer to each kind of commit is lost once: the database has done it, and whoever asked hears of a break.

Nothing is done twice, and nothing waits for a worker's lease to lapse.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any, Final
from uuid import uuid4

import pytest

from tests.functional.conftest import Prepared
from tests.functional.ending import assert_ended, rows_of
from tests.functional.nodes import ApiError, Client, Stack
from tests.functional.text import assert_one_text
from tests.proxy import TcpProxy
from tests.services import PostgresServer, wait_until
from tests.upstream import UpstreamProcess, expected_text

MODEL: Final = "pace=100,tokens=150,alphabet=mixed"
ENDLESS: Final = "pace=40,tokens=100000,alphabet=mixed"
LEASE_SECONDS: Final = 10.0
SOON_SECONDS: Final = LEASE_SECONDS / 2

START: Final = rb"INSERT INTO stream_sessions.*COMMIT"
CLAIM: Final = rb"SET [^\0]*attempt=\("
BEAT: Final = rb"WITH beat"
RECORD: Final = rb"SET [^\0]*stop_requested_at="
RELEASE: Final = rb"SET [^\0]*owner=[^\0]*requeue_at=.*COMMIT"
ENDING: Final = rb"SET [^\0]*sha256="
PUBLISHED: Final = rb"SET published_at="

pytestmark = pytest.mark.usefixtures("recovery")


@pytest.fixture(scope="module")
def stack_database() -> str:
    return "postgresql"


@pytest.fixture(scope="module")
def stack_settings() -> Mapping[str, str]:
    return {
        "SLUICEGATE_LEASE_SECONDS": str(LEASE_SECONDS),
        "SLUICEGATE_LEASE_RENEW_SECONDS": "0.2",
        "SLUICEGATE_HEARTBEAT_SECONDS": "0.3",
        "SLUICEGATE_CHECKPOINT_SECONDS": "0.3",
        "SLUICEGATE_DRAIN_SECONDS": "0",
    }


@pytest.fixture(scope="module")
def proxy(postgres: PostgresServer) -> Iterator[TcpProxy]:
    """What all of the product's connections go through."""
    with TcpProxy(postgres.port) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def stack_database_url(postgres: PostgresServer, prepared: Prepared, proxy: TcpProxy) -> Iterator[str]:
    url = prepared.postgresql()
    yield url.replace(f":{postgres.port}/", f":{proxy.port}/")
    postgres.drop_database(url)


def begin(client: Client, model: str) -> tuple[dict[str, Any], Any]:
    session = client.post_message("go on", model=f"name={uuid4().hex[:8]},{model}")
    return session, client.follow(session["sessionId"])


def assert_whole(stack: Stack, client: Client, upstream: UpstreamProcess, session: dict[str, Any], reader: Any) -> None:
    """One ending, the whole text, and written by one worker alone."""
    reader.wait_until_done()
    row = assert_ended(stack, upstream, session, [reader], "stop")
    assert reader.text == expected_text(row.model).content
    assert row.attempt == 1
    assert_one_text(stack, client, session, client.terminate(session["sessionId"]), [reader])


class TestStart:
    def test_without_a_key(self, stack: Stack, client: Client, proxy: TcpProxy, upstream: UpstreamProcess) -> None:
        """The client is told that it is not known. It was written, so a repetition meets it, and it runs."""
        conversation = client.call("POST", "/api/conversations", {"title": "doubt"})
        model = f"name={uuid4().hex[:8]},tokens=5"
        loss = proxy.lose_answer(START)
        with pytest.raises(ApiError) as refusal:
            client.post_message("hello", conversation_id=conversation["id"], model=model)
        assert loss.happened.is_set()
        assert (refusal.value.status, refusal.value.code) == (503, "unavailable")
        assert "did not say whether" in refusal.value.problem["detail"]
        assert int(refusal.value.response.headers["Retry-After"]) > 0
        with pytest.raises(ApiError) as repetition:
            client.post_message("hello", conversation_id=conversation["id"], model=model)
        assert repetition.value.code == "conversation_busy"
        began_at = time.monotonic()
        found = client.stream(repetition.value.problem["sessionId"])
        assert [message["role"] for message in client.messages(conversation["id"])] == ["user", "assistant"]
        assert_whole(stack, client, upstream, found, client.follow(found["sessionId"]))
        assert time.monotonic() - began_at < SOON_SECONDS

    def test_with_a_key(self, stack: Stack, client: Client, proxy: TcpProxy, upstream: UpstreamProcess) -> None:
        """The call finds what it has begun by itself, and so does a repetition."""
        key, model = uuid4().hex, f"name={uuid4().hex[:8]},tokens=5"
        loss = proxy.lose_answer(START)
        session = client.post_message("hello", model=model, idempotency_key=key)
        began_at = time.monotonic()
        assert loss.happened.is_set()
        reader = client.follow(session["sessionId"])
        assert client.post_message("hello", model=model, idempotency_key=key)["sessionId"] == session["sessionId"]
        assert_whole(stack, client, upstream, session, reader)
        assert time.monotonic() - began_at < SOON_SECONDS
        assert len(client.messages(session["conversationId"])) == 2


def test_claim(stack: Stack, client: Client, proxy: TcpProxy, upstream: UpstreamProcess) -> None:
    """The worker finds that it was its own claim, and goes on, long before anybody takes it for lost."""
    loss = proxy.lose_answer(CLAIM)
    session, reader = begin(client, MODEL)
    loss.wait()
    lost_at = time.monotonic()
    reader.wait_for_text(1)
    assert time.monotonic() - lost_at < SOON_SECONDS
    assert_whole(stack, client, upstream, session, reader)


def test_heartbeat(stack: Stack, client: Client, proxy: TcpProxy, upstream: UpstreamProcess) -> None:
    """The checkpoint is not written twice; the worker goes on from what the row has."""
    session, reader = begin(client, MODEL)
    reader.wait_for_text(50)
    proxy.lose_answer(BEAT).wait()

    def is_checkpointed_further() -> bool:
        row, _ = rows_of(stack, session["sessionId"])
        return len(row.checkpoint) == row.checkpoint_length > 100

    wait_until(is_checkpointed_further)
    row, _ = rows_of(stack, session["sessionId"])
    assert expected_text(row.model).content.startswith(row.checkpoint)
    assert_whole(stack, client, upstream, session, reader)


def test_stop(stack: Stack, client: Client, proxy: TcpProxy, upstream: UpstreamProcess) -> None:
    """Whoever asked is told to repeat it; it takes effect all the same, and once."""
    session, reader = begin(client, ENDLESS)
    reader.wait_for_text(20)
    loss = proxy.lose_answer(RECORD)
    with pytest.raises(ApiError) as refusal:
        client.terminate(session["sessionId"])
    assert loss.happened.is_set()
    assert (refusal.value.status, refusal.value.response.headers["Retry-After"]) == (503, "2")
    reader.wait_until_done(SOON_SECONDS)
    receipts = [client.terminate(session["sessionId"]) for _ in range(2)]
    assert receipts[0] == receipts[1]
    row = assert_ended(stack, upstream, session, [reader], "user")
    assert row.stop_by == "tester"
    assert_one_text(stack, client, session, receipts[0], [reader])


@pytest.mark.parametrize("by", ["the model", "a user"])
def test_ending(stack: Stack, client: Client, proxy: TcpProxy, upstream: UpstreamProcess, by: str) -> None:
    """The worker repeats it until it knows; there is one ending, and `done` follows."""
    session, reader = begin(client, MODEL if by == "the model" else ENDLESS)
    reader.wait_for_text(20)
    loss = proxy.lose_answer(ENDING)
    if by == "the model":
        loss.wait()
        reader.wait_until_done(SOON_SECONDS - 1)  # the reaper would see to it later
        assert_whole(stack, client, upstream, session, reader)
    else:
        receipt = client.terminate(session["sessionId"])
        assert_one_text(stack, client, session, receipt, [reader])
        assert_ended(stack, upstream, session, [reader], "user")
    assert loss.happened.is_set()


def test_published(stack: Stack, client: Client, proxy: TcpProxy, upstream: UpstreamProcess) -> None:
    """`done` is in the log, once, and nobody puts it there again."""
    loss = proxy.lose_answer(PUBLISHED)
    session, reader = begin(client, "tokens=10")
    done = reader.wait_until_done()
    assert done["reason"] == "stop"
    loss.wait()
    assert rows_of(stack, session["sessionId"])[0].published_at is not None
    assert_one_text(stack, client, session, client.terminate(session["sessionId"]), [reader])


def test_release(stack: Stack, client: Client, proxy: TcpProxy, upstream: UpstreamProcess) -> None:
    """A worker that stops gives its session up, though it does not hear so; another goes on, and soon."""
    session, reader = begin(client, ENDLESS)
    reader.wait_for_text(20)
    loss = proxy.lose_answer(RELEASE)
    stack.start_worker()
    stack.worker.container.kill("SIGTERM")
    loss.wait()
    stopped_at, length = time.monotonic(), len(reader.text)
    reader.wait_for_text(length + 20)
    assert time.monotonic() - stopped_at < SOON_SECONDS
    receipt = client.terminate(session["sessionId"])
    assert_one_text(stack, client, session, receipt, [reader])
    row = assert_ended(stack, upstream, session, [reader], "user")
    assert expected_text(row.model).content.startswith(reader.text)
    assert row.attempt == 2
    said = stack.worker.container.process.log_since_start()
    assert "stream.handed_over" in said
    assert "Traceback" not in said
    stack.worker.container.process.kill()  # Celery takes its time to leave, which is not looked at here
