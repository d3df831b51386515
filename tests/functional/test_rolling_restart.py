"""Every process is stopped and started again, one after the other, under load: no stream ends by it, and none has a
token too few or too many."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest

from tests.functional.ending import rows_of
from tests.functional.nodes import ApiError, Client, EventStream, Reader, Stack
from tests.functional.text import assert_one_text
from tests.services import wait_until
from tests.upstream import UpstreamProcess, expected_text

pytestmark = pytest.mark.timeout(240)

STREAMS = 12
WORKERS = 2
MAX_ATTEMPTS = 2
"""Losses of one; hand-overs are none."""


@pytest.fixture(scope="module")
def stack_workers() -> int:
    return WORKERS


@pytest.fixture(scope="module")
def stack_settings() -> Mapping[str, str]:
    return {
        "SLUICEGATE_LEASE_SECONDS": "3",
        "SLUICEGATE_HEARTBEAT_SECONDS": "1",
        "SLUICEGATE_DRAIN_SECONDS": "0.5",
        "SLUICEGATE_MAX_ATTEMPTS": str(MAX_ATTEMPTS),
    }


class Balanced:
    """A client before several web processes: each call goes to the next that answers, as a load balancer sends it."""

    def __init__(self, clients: list[Client]) -> None:
        self._turns = itertools.cycle(clients)
        self._count = len(clients)

    def events(self, session_id: str, cursor: str | None) -> EventStream:
        return self._next(lambda client: client.events(session_id, cursor))

    def post(self, model: str) -> EventStream:
        return self._next(lambda client: client.post_stream("go on", model=model, think=True))

    def _next(self, call: Any) -> EventStream:
        for _ in range(self._count - 1):
            try:
                stream: EventStream = call(next(self._turns))
                return stream
            except (OSError, ApiError) as error:
                if isinstance(error, ApiError) and error.status < 500:
                    raise
        last: EventStream = call(next(self._turns))
        return last


def posting(balanced: Balanced, model: str) -> Reader:
    """A reader that posts, reads that very response, and comes back by GET with its last id where it breaks off."""
    session: list[str] = []

    def open_stream(cursor: str | None) -> EventStream:
        if session:
            return balanced.events(session[0], cursor)
        stream = balanced.post(model)
        session.append(stream.session_id)
        return stream

    return Reader(open_stream, reconnect=True).start()


def following(balanced: Balanced, other: Reader) -> Reader:
    """A reader of the same stream as another's, by GET, from its start."""
    session_id = session_id_of(other)
    return Reader(lambda cursor: balanced.events(session_id, cursor), reconnect=True).start()


MODELS = [f"name=r{n},pace=8,thinking={(n % 3) * 8},tokens=5000,alphabet=mixed" for n in range(STREAMS)]
"""Of a length that outlasts the test; some think first."""


def under_way(readers: list[Reader]) -> None:
    for reader in readers:
        wait_until(lambda reader=reader: len(reader.thinking + reader.text) >= 20, 30)


def go_on(readers: list[Reader]) -> None:
    """Each is sent more than it has by now."""
    lengths = [len(reader.text) for reader in readers]
    for reader, length in zip(readers, lengths, strict=True):
        wait_until(lambda reader=reader, length=length: len(reader.text) >= length + 30, 30)


def assert_unbroken(stack: Stack, client: Client, readers: list[Reader], more: list[Reader]) -> None:
    """Each runs until it is stopped, and has the numbered tokens up to there, once each, for everybody.

    `more` are other readers of the same streams.
    """
    for model, reader, *others in zip(MODELS, readers, *([more] if more else []), strict=True):
        session = client.stream(session_id_of(reader))
        receipt = client.terminate(session["sessionId"])
        assert receipt["reason"] == "user"
        assert_one_text(stack, client, session, receipt, [reader, *others])
        expected = expected_text(model)
        assert reader.thinking == expected.thinking
        assert reader.text == expected.content[: len(reader.text)]
        offsets = [int(one.split("-")[0]) for one in reader.ids]
        assert offsets == sorted(offsets)


def session_id_of(reader: Reader) -> str:
    return str(reader.of("session")[0].data["sessionId"])


@contextmanager
def left(readers: list[Reader]) -> Iterator[None]:
    """They leave, however the test ends."""
    try:
        yield
    finally:
        for reader in readers:
            reader.leave(0)


def test_of_all_workers_and_then_one_is_killed(stack: Stack, client: Client, upstream: UpstreamProcess) -> None:
    """Some streams are handed over as often as they may lose a worker; then they lose one, and go on all the same."""
    stack.start_recovery()
    readers = [posting(Balanced([client]), model) for model in MODELS]
    with left(readers):
        under_way(readers)
        for worker in stack.workers[:WORKERS]:
            assert worker.container.process.stop(20) == 0
            wait_until(lambda: freed(upstream), 10, "one request of each stream is open, and no other")
            worker.container.process.start()
            worker.ready()
        go_on(readers)
        before = [rows_of(stack, session_id_of(reader))[0] for reader in readers]
        assert {row.status for row in before} == {"ACTIVE"}
        assert {row.losses for row in before} == {0}
        assert max(row.attempt for row in before) > MAX_ATTEMPTS
        stack.worker.container.kill("SIGKILL")
        lost = [row.id for row in before if stack.worker.container.id in str(row.owner)]
        for session_id in lost:
            wait_until(lambda one=session_id: rows_of(stack, str(one))[0].losses == 1, 30, "it is found lost")
        go_on(readers)
        assert any(row.id in lost and row.attempt > MAX_ATTEMPTS for row in before)
        assert_unbroken(stack, client, readers, [])
    wait_until(lambda: upstream.open_count() == 0, 5, "no chat is open")


def freed(upstream: UpstreamProcess) -> bool:
    """Whether no stream is being written twice, and the worker that left has closed what it had."""
    running = [one.model for one in upstream.requests() if one.outcome is None]
    return len(running) == len(set(running)) == STREAMS


def test_of_all_web_processes(stack: Stack, client: Client, upstream: UpstreamProcess) -> None:
    """Readers come back to whoever answers, with their cursor: those that follow, and those that posted."""
    webs = [stack.web, stack.start_web()]
    clients = [stack.client(web=web) for web in webs]
    readers = [posting(Balanced([clients[n % 2], clients[(n + 1) % 2]]), model) for n, model in enumerate(MODELS)]
    with left(readers):
        under_way(readers)
        followers = [following(Balanced(clients), reader) for reader in readers]
        with left(followers):
            for web in webs:
                go_on(followers)
                web.restart()
            go_on(readers)
            assert all(reader.connections > 1 for reader in readers)
            assert {rows_of(stack, session_id_of(reader))[0].attempt for reader in readers} == {1}
            assert_unbroken(stack, client, readers, followers)
    assert len(upstream.requests()) == STREAMS
