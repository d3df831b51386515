"""A worker's runtime over a real broker: which messages it runs, which it drops, and which it sends back, and when."""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import patch
from uuid import UUID

import gevent
import pytest
import redis

from tests.integration.conftest import MakeWorld
from tests.services import ValkeyServer
from webapp.models import new_id
from webapp.queue import GENERATE_QUEUE
from workers.generate import Generation
from workers.runtime import Runtime

LOOKS = 5
OWNER = "worker@one"


class LookedAt(dict[UUID, Generation]):
    """A worker's table that counts how often somebody asks whether a session is there."""

    looks = 0

    def __contains__(self, session_id: object) -> bool:
        self.looks += 1
        return super().__contains__(session_id)


@pytest.fixture
def table() -> LookedAt:
    return LookedAt()


@pytest.fixture
def runtime(world_with: MakeWorld, valkey: ValkeyServer, table: LookedAt) -> Runtime:
    """One that is draining, without the greenlets that serve what runs; nothing runs here."""
    services = world_with(celery_broker_url=valkey.url).services
    with patch("workers.runtime.keep_running"):
        runtime = Runtime(services)
        gevent.idle()  # the greenlets have come and gone
    runtime.table = table
    runtime.draining = True
    return runtime


@pytest.fixture
def queued(redis_client: redis.Redis) -> Callable[[], int]:
    """How many messages the broker has."""
    return lambda: redis_client.llen(GENERATE_QUEUE)  # type: ignore[return-value]


def test_what_is_still_being_given_up_is_sent_back_only_then(
    runtime: Runtime, table: LookedAt, queued: Callable[[], int]
) -> None:
    """Sooner, another worker would take it for a duplicate, and nobody would run it."""
    session_id = new_id()
    table[session_id] = Generation(session_id, OWNER, runtime._ports)
    with gevent.Timeout(10, AssertionError("the message is not sent back")):
        message = gevent.spawn(runtime.run, session_id, OWNER)
        while table.looks < LOOKS and not message.ready():
            gevent.sleep(0.005)
        assert (message.ready(), queued()) == (False, 0)
        del table[session_id]
        message.get()
    assert queued() == 1


def test_what_a_draining_worker_does_not_run_goes_back_once(
    runtime: Runtime, table: LookedAt, queued: Callable[[], int]
) -> None:
    """It is not entered in the table: `drain` would wait for it."""
    runtime.run(new_id(), OWNER)
    assert (queued(), dict(table)) == (1, {})


def test_what_runs_here_already_is_a_duplicate(runtime: Runtime, table: LookedAt, queued: Callable[[], int]) -> None:
    """It is dropped, and what runs is left alone."""
    runtime.draining = False
    session_id = new_id()
    running = table[session_id] = Generation(session_id, OWNER, runtime._ports)
    runtime.run(session_id, OWNER)
    assert (queued(), dict(table)) == (0, {session_id: running})
