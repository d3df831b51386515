"""Those who publish and consume, on a real Valkey that goes away or says nothing: nobody waits for it for ever."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import gevent
import pytest
import redis
from kombu import Connection, Exchange, Message, Queue
from kombu.exceptions import OperationalError

from tests.integration.world import CLOSED_REDIS, make_settings
from tests.services import ValkeyServer, valkey_server, wait_until
from webapp.models import new_id
from webapp.queue import ANSWER_SECONDS, CeleryQueue, make_celery
from webapp.streams.lifecycle import TerminationReason
from workers.consumer import Consumer
from workers.events import LATER_SECONDS

PUBLISHERS = 10


@pytest.fixture
def own_valkey(tmp_path: Path) -> Iterator[ValkeyServer]:
    server = valkey_server(tmp_path / "valkey", name="own-valkey")
    yield server
    server.kill()


@pytest.fixture
def queue(own_valkey: ValkeyServer, tmp_path: Path) -> CeleryQueue:
    """One that has published on several connections at once, which are in its pool."""
    settings = make_settings("sqlite:///unused.db", own_valkey.url, tmp_path, celery_broker_url=own_valkey.url)
    queue = CeleryQueue(make_celery(settings, publisher=True, set_as_current=False))
    with ThreadPoolExecutor(PUBLISHERS) as pool:
        list(pool.map(lambda _: queue.enqueue(new_id()), range(PUBLISHERS)))
    return queue


@pytest.mark.parametrize("strike", [ValkeyServer.kill, ValkeyServer.pause])
def test_who_publishes_is_not_kept_waiting(
    own_valkey: ValkeyServer, queue: CeleryQueue, strike: Callable[[ValkeyServer], None]
) -> None:
    """Not by an entry of the queue, nor by remote control, of which kombu's own would try until it succeeds."""
    session_id = new_id()
    calls: list[Callable[[], None]] = [
        lambda: queue.enqueue(session_id),
        lambda: queue.revoke(session_id),
        lambda: queue.nudge(session_id, "worker@host", TerminationReason.USER),
    ]

    with ThreadPoolExecutor(len(calls)) as pool:
        strike(own_valkey)
        try:
            given_up, waiting = wait([pool.submit(call) for call in calls], 2 * ANSWER_SECONDS)
        finally:  # whoever waits all the same is let go, for the test to end
            own_valkey.resume()
            own_valkey.start()
    assert not waiting
    assert all(one.exception() for one in given_up)


def test_who_consumes_tries_again_every_second(tmp_path: Path) -> None:
    """However long the broker has been away: a worker, or beat, is not to find out half a minute late."""
    app = make_celery(make_settings("sqlite:///unused.db", CLOSED_REDIS, tmp_path, celery_broker_url=CLOSED_REDIS))
    pauses_seconds: list[float] = []
    with app.connection_for_read() as connection, pytest.raises(OperationalError):
        connection.ensure_connection(lambda error, seconds: pauses_seconds.append(seconds), max_retries=3)
    assert pauses_seconds == [1.0] * 3


def await_subscription(connection: Connection, server: ValkeyServer) -> None:
    """Has it begin: kombu subscribes when it first waits for something."""

    def listens() -> bool:
        with suppress(TimeoutError):
            connection.drain_events(timeout=0.1)
        return bool(client.pubsub_numpat())

    with redis.Redis.from_url(server.url) as client:
        wait_until(listens, 5, "kombu has subscribed")


def test_the_events_of_tasks_are_sent_together_and_those_of_the_worker_at_once(
    own_valkey: ValkeyServer, tmp_path: Path
) -> None:
    settings = make_settings("sqlite:///unused.db", own_valkey.url, tmp_path, celery_broker_url=own_valkey.url)
    app = make_celery(settings, set_as_current=False, events="workers.events:BufferedEvents")
    heard: list[list[str]] = []

    def hear(body: Any, message: Message) -> None:
        heard.append([event["type"] for event in (body if isinstance(body, list) else [body])])

    def hear_all(count: int) -> list[list[str]]:
        while sum(map(len, heard)) < count:
            here.drain_events(timeout=5)
        return [heard.pop(0) for _ in range(len(heard))]

    with app.connection() as here, app.connection() as there, app.connection() as elsewhere:
        receiver = app.events.Receiver(here)
        with here.Consumer([receiver.queue], callbacks=[hear], accept=["json"], no_ack=True):
            await_subscription(here, own_valkey)
            with patch("workers.events.is_module_patched", return_value=True):
                first, second = app.events.Dispatcher(there), app.events.Dispatcher(elsewhere)
            for kind in ("task-received", "worker-heartbeat", *["task-started"] * 40):
                first.send(kind)
            gevent.sleep(2 * LATER_SECONDS)  # has what is due run, which it does by itself in a worker
            assert hear_all(42) == [["worker-heartbeat"], ["task-received", *["task-started"] * 40]]

            first.send("task-succeeded")
            first.disable()  # as a worker does whose connection is lost, which then makes another
            second.extend_buffer(first)
            second.flush()
            assert hear_all(1) == [["task-succeeded"]]


def test_a_connection_that_cannot_be_closed_does_not_end_a_worker(own_valkey: ValkeyServer, tmp_path: Path) -> None:
    """It was lost with a task under way, while the worker waited for more, and for remote control."""
    settings = make_settings("sqlite:///unused.db", own_valkey.url, tmp_path, celery_broker_url=own_valkey.url)
    app = make_celery(settings, set_as_current=False)
    connection, received = app.connection(), list[Message]()
    connection.Producer().publish("a task", routing_key="tasks", declare=[Queue("tasks")])
    connection.Consumer([Queue("tasks")], on_message=received.append).consume()
    control = Queue("control", Exchange("control", "fanout"), auto_delete=True)
    connection.Consumer([control], channel=connection.channel(), on_message=received.append).consume()
    while not (received and connection.default_channel._in_poll):
        with suppress(TimeoutError):
            connection.drain_events(timeout=0.1)
    own_valkey.kill()

    consumer = object.__new__(Consumer)
    consumer.connection, consumer.app = connection, app
    consumer.on_connection_error_after_connected(ConnectionError())
    assert consumer.connection is None
