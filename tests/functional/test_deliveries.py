"""The queue delivers a message twice, to two workers, out of order, late, or one that is none: nothing comes of it but
what one message in time would have brought about."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import redis
from celery import Celery

from tests.functional.ending import assert_ended, rows_of
from tests.functional.nodes import Client, Reader, Stack
from tests.services import wait_until
from tests.upstream import UpstreamProcess, expected_text
from webapp.queue import GENERATE_QUEUE, GENERATE_TASK

MODEL = "pace=25,tokens=50,alphabet=mixed"
VISIBILITY_SECONDS = 3600
"""kombu's own, after which a message that nobody acknowledged is delivered again."""

# Takes one message as a worker does, and is killed before it has acknowledged it.
TAKES_ONE = """
import sys, time
from celery import Celery
from kombu import Queue
with Celery(broker=sys.argv[1]).connection() as connection:
    channel = connection.default_channel
    consumer = connection.Consumer(Queue(sys.argv[2]), callbacks=[lambda body, message: print("taken", flush=True)])
    consumer.consume()
    connection.drain_events(timeout=30)
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def stack_workers() -> int:
    return 2


@pytest.fixture(scope="module")
def stack_settings() -> Mapping[str, str]:
    return {"SLUICEGATE_LEASE_SECONDS": "3", "SLUICEGATE_HEARTBEAT_SECONDS": "1"}


@pytest.fixture(autouse=True)
def workers_are_the_same(stack: Stack) -> Iterator[None]:
    """No message ends a worker."""
    before = [worker.container.process.pid for worker in stack.workers if worker.container.process.running]
    yield
    running = [worker.container.process.pid for worker in stack.workers if worker.container.process.running]
    assert [pid for pid in before if pid not in running and pid not in KILLED] == []


KILLED: set[int] = set()
"""Those that a test has killed itself."""


@contextmanager
def queue(stack: Stack) -> Iterator[Celery]:
    with Celery(broker=stack.valkey.url, set_as_current=False) as app:
        yield app


def deliver(stack: Stack, *arguments: Any, times: int = 1, task_id: str | None = None, **options: Any) -> None:
    """Messages beside those of the product."""
    with queue(stack) as app:
        for _ in range(times):
            app.send_task(
                options.get("name", GENERATE_TASK),
                args=arguments,
                kwargs=options.get("kwargs"),
                task_id=task_id or str(uuid.uuid4()),
                queue=GENERATE_QUEUE,
            )


def consumed(stack: Stack) -> None:
    """Every message has been taken and acknowledged."""
    with redis.Redis.from_url(stack.valkey.url, protocol=2) as broker:
        # kombu looks for messages whose visibility has ended now and then only
        wait_until(lambda: not broker.llen(GENERATE_QUEUE) and not broker.hlen("unacked"), 45, "the queue is empty")


def said(stack: Stack, event: str) -> list[dict[str, Any]]:
    """The lines of this event in the workers' logs, of the test."""
    lines = [line for one in stack.workers for line in one.container.process.log().splitlines() if line[:1] == "{"]
    return [line for line in map(json.loads, lines) if line["event"] == event]


def assert_ran_once(stack: Stack, upstream: UpstreamProcess, session: dict[str, Any], reader: Reader) -> None:
    row = assert_ended(stack, upstream, session, [reader], "stop")
    assert (row.attempt, row.epoch, row.losses) == (1, 1, 0)
    assert reader.text == expected_text(row.model).content
    assert len(upstream.requests(row.model)) == 1


def test_one_that_comes_many_times_at_once(stack: Stack, client: Client, upstream: UpstreamProcess) -> None:
    """Two to five times, for each of several sessions, to two workers at once."""
    sessions = []
    for number in range(6):
        sessions.append(client.post_message("go on", model=f"name=many{number},{MODEL}"))
        deliver(stack, sessions[-1]["sessionId"], times=1 + number % 4, task_id=sessions[-1]["sessionId"])
    readers = [client.follow(session["sessionId"]) for session in sessions]
    for session in sessions:
        deliver(stack, session["sessionId"])
    for session, reader in zip(sessions, readers, strict=True):
        assert_ran_once(stack, upstream, session, reader)
    consumed(stack)


def test_one_that_comes_after_the_end(stack: Stack, client: Client, upstream: UpstreamProcess) -> None:
    """After a stop, whose session's task is revoked or not, and after an end of its own: everything stays as it was."""
    ended = client.post_message("go on", model="tokens=3")
    reader = client.follow(ended["sessionId"])
    reader.wait_until_done()
    stopped = client.post_message("go on", model=MODEL)
    client.follow(stopped["sessionId"]).wait_for_text(10)
    receipts = [client.terminate(one["sessionId"]) for one in (ended, stopped)]
    before = [rows_of(stack, one["sessionId"])[0].epoch for one in (ended, stopped)]
    for one in (ended, stopped):
        deliver(stack, one["sessionId"], times=3, task_id=one["sessionId"])
    consumed(stack)
    assert [client.terminate(one["sessionId"]) for one in (ended, stopped)] == receipts
    assert [rows_of(stack, one["sessionId"])[0].epoch for one in (ended, stopped)] == before
    assert len(upstream.requests()) == 2
    assert_ended(stack, upstream, ended, [reader], "stop")


def test_one_that_comes_after_another_has_taken_over(stack: Stack, client: Client, upstream: UpstreamProcess) -> None:
    """The first worker's message, once more, while the second goes on: it goes on."""
    stack.start_recovery()
    model = "name=taken,pace=20,tokens=170,alphabet=mixed"
    session = client.post_message("go on", model=model)
    reader = client.follow(session["sessionId"])
    reader.wait_for_text(40)
    owner = rows_of(stack, session["sessionId"])[0].owner
    (leaving,) = (one for one in stack.workers if one.container.id in str(owner))
    KILLED.add(leaving.container.process.pid)
    leaving.container.kill("SIGKILL")
    wait_until(lambda: rows_of(stack, session["sessionId"])[0].epoch == 2, 15, "another has taken over")
    deliver(stack, session["sessionId"], times=3, task_id=session["sessionId"])
    row = assert_ended(stack, upstream, session, [reader], "stop")
    assert (row.attempt, row.losses) == (2, 1)
    assert reader.text == expected_text(model).content
    assert len(upstream.requests(model)) == 2


def test_one_whose_task_was_revoked_before_its_worker_was_lost(
    stack: Stack, client: Client, upstream: UpstreamProcess
) -> None:
    """Workers remember what was revoked, and drop the message by which another would take it over: it ends as that."""
    stack.start_recovery()
    session = client.post_message("go on", model="name=revoked,pace=10,tokens=1000,alphabet=mixed")
    reader = client.follow(session["sessionId"])
    reader.wait_for_text(40)
    with queue(stack) as app:
        app.control.revoke(session["sessionId"])  # not terminated: it runs on
    for worker in stack.workers:
        worker.wait_for_log("Tasks flagged as revoked")
    length = len(reader.text)
    reader.wait_for_text(length + 20)
    owner = rows_of(stack, session["sessionId"])[0].owner
    (leaving,) = (one for one in stack.workers if one.container.id in str(owner))
    KILLED.add(leaving.container.process.pid)
    leaving.container.kill("SIGKILL")
    row = assert_ended(stack, upstream, session, [reader], "revoked")
    assert (row.attempt, row.losses) == (1, 1)
    assert len(reader.text) > length


def test_those_that_come_in_another_order(stack: Stack, client: Client, upstream: UpstreamProcess) -> None:
    """The last one first, the first one twice: while nobody takes them they are turned round."""
    for worker in stack.workers:
        KILLED.add(worker.container.process.pid)
        worker.container.process.kill()
    sessions = [client.post_message("go on", model=f"name=turned{number},{MODEL}") for number in range(4)]
    readers = [client.follow(session["sessionId"]) for session in sessions]
    with redis.Redis.from_url(stack.valkey.url, protocol=2) as broker:
        messages: Any = broker.lrange(GENERATE_QUEUE, 0, -1)
        assert len(messages) == len(sessions)
        broker.delete(GENERATE_QUEUE)
        broker.rpush(GENERATE_QUEUE, *messages[::-1], messages[0], messages[-1])
    stack.workers[1].container.restart()
    stack.workers[0].container.restart()
    for session, reader in zip(sessions, readers, strict=True):
        assert_ran_once(stack, upstream, session, reader)
    consumed(stack)


def test_one_that_was_taken_by_somebody_who_died(stack: Stack, client: Client, upstream: UpstreamProcess) -> None:
    """Killed between taking the message and acknowledging it: the reaper queues the session again, and the message
    comes back when its visibility ends, long after the session has."""
    for worker in stack.workers:
        KILLED.add(worker.container.process.pid)
        worker.container.process.kill()
    session = client.post_message("go on", model=MODEL)
    reader = client.follow(session["sessionId"])
    die_with_a_message(stack)
    with redis.Redis.from_url(stack.valkey.url, protocol=2) as broker:
        assert (broker.llen(GENERATE_QUEUE), broker.hlen("unacked")) == (0, 1)
        for worker in stack.workers:
            worker.container.restart()
        stack.start_recovery()
        assert_ran_once(stack, upstream, session, reader)
        assert broker.hlen("unacked") == 1
        ((tag, taken_at),) = broker.zrange("unacked_index", 0, -1, withscores=True)
        broker.zadd("unacked_index", {tag: taken_at - VISIBILITY_SECONDS})
        consumed(stack)  # kombu has put it back in the queue, and a worker has taken it
    assert_ran_once(stack, upstream, session, reader)


def die_with_a_message(stack: Stack) -> None:
    """Take one message from the queue, and be killed before it is acknowledged."""
    command = [sys.executable, "-c", TAKES_ONE, stack.valkey.url, GENERATE_QUEUE]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as taker:
        assert taker.stdout is not None
        try:
            assert taker.stdout.readline() == "taken\n"
        finally:
            taker.kill()


def test_what_is_no_message_for_a_session(stack: Stack, client: Client, upstream: UpstreamProcess) -> None:
    """It is said so, once each, and the worker goes on; nothing is tried again."""
    unknown = str(uuid.uuid4())
    deliver(stack, unknown, task_id=unknown)
    deliver(stack, "no uuid at all", task_id="garbage-1")
    deliver(stack, 17, task_id="garbage-2")
    deliver(stack, task_id="garbage-3")
    deliver(stack, unknown, unknown, unknown, task_id="garbage-4")
    deliver(stack, kwargs={"session": unknown}, task_id="garbage-5")
    deliver(stack, unknown, task_id="garbage-6", name="sluicegate.no_such_task")
    with redis.Redis.from_url(stack.valkey.url, protocol=2) as broker:
        broker.rpush(GENERATE_QUEUE, json.dumps(envelope(b"\xff not json".hex(), "garbage-7")))
    session = client.post_message("and now?", model=MODEL)
    assert_ran_once(stack, upstream, session, client.follow(session["sessionId"]))
    consumed(stack)
    assert [line["session_id"] for line in said(stack, "stream.unknown")] == [unknown]
    failed = sorted(str(line["session_id"]) for line in said(stack, "task.failed"))
    assert failed == [f"garbage-{number}" for number in range(1, 6)]
    logs = "".join(worker.container.process.log() for worker in stack.workers)
    assert "sluicegate.no_such_task" in logs
    deliver(stack, unknown, task_id=unknown)
    with queue(stack) as app:
        app.control.revoke("garbage-8")
    deliver(stack, "no uuid at all", task_id="garbage-8")
    consumed(stack)
    assert "Unhandled" not in logs


def envelope(body: str, task_id: str) -> dict[str, Any]:
    """A message of kombu's, whose body is no JSON."""
    return {
        "body": body,
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {"task": GENERATE_TASK, "id": task_id, "lang": "py"},
        "properties": {
            "correlation_id": task_id,
            "delivery_tag": str(uuid.uuid4()),
            "delivery_info": {"exchange": GENERATE_QUEUE, "routing_key": GENERATE_QUEUE},
            "delivery_mode": 2,
            "body_encoding": None,
            "priority": 0,
        },
    }
