"""Two hundred streams, stopped at random moments: what was seen is what was saved, and nothing comes after it."""

from __future__ import annotations

import random
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from tests.functional.nodes import Client, Reader, Stack
from tests.functional.text import assert_one_text, text_beyond
from tests.services import wait_until
from tests.upstream import UpstreamProcess

STREAMS = {"postgresql": 200, "sqlite": 50}
AT_ONCE = 16
PACES = (1, 5, 20, 50, 100, 200, 500)
SEED = 20_261_122


@dataclass(frozen=True)
class Plan:
    """One stream's fate, drawn before it begins."""

    name: str
    pace: int
    thinking: int
    readers: int
    stop_after_seconds: float
    late_after_seconds: float
    drop: bool
    seed: int

    @property
    def model(self) -> str:
        return f"name={self.name},pace={self.pace},tokens=100000,thinking={self.thinking},alphabet=mixed"


@pytest.fixture(scope="module", params=["postgresql", "sqlite"])
def stack_database(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def draw(number: int, chance: random.Random) -> Plan:
    """A plan; the paces and numbers of readers take turns, so that all of them occur together."""
    return Plan(
        name=f"n{number}-{uuid.uuid4().hex[:8]}",
        pace=PACES[number % len(PACES)],
        thinking=chance.choice((0, 0, 3, 40)),
        readers=(1, 2, 5)[number % 3],
        stop_after_seconds=chance.uniform(0, 2),
        late_after_seconds=chance.uniform(0, 1),
        drop=chance.random() < 0.5,
        seed=chance.randrange(2**32),
    )


def live_through(stack: Stack, client: Client, plan: Plan) -> None:
    """Start a stream, read it in the plan's ways, stop it at the plan's moment, and compare what everybody has."""
    chance = random.Random(plan.seed)
    session = client.post_message("go on", model=plan.model)
    session_id = session["sessionId"]
    readers = [client.follow(session_id, reconnect=True)]
    waiter = _Timer()
    if plan.readers > 1:
        waiter.until(plan.late_after_seconds)
        readers += [client.follow(session_id, reconnect=True) for _ in range(plan.readers - 1)]
    if plan.drop:
        chance.choice(readers).drop()
    waiter.until(plan.stop_after_seconds)
    receipt = client.terminate(session_id)

    assert receipt["reason"] == "user"
    assert_one_text(stack, client, session, receipt, readers)
    assert client.terminate(session_id) == receipt
    _resume_from_random_ids(client, session_id, readers[0], chance)


def _resume_from_random_ids(client: Client, session_id: str, reader: Reader, chance: random.Random) -> None:
    """A reader who comes with any id that was sent gets exactly what lies behind it."""
    whole = reader.thinking + reader.text
    for cursor in chance.sample(reader.ids[:-1], min(3, len(reader.ids) - 1)):
        assert text_beyond(client, session_id, cursor) == whole[int(cursor.split("-")[0]) :]
    with client.events(session_id, reader.ids[-1]) as stream:
        assert list(stream) == []  # 204: who has had `done` has had all


class _Timer:
    """Moments of one stream's life, counted from now."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._never = threading.Event()

    def until(self, seconds: float) -> None:
        """Let that much of the stream's life pass: the random moment is what this test is about."""
        self._never.wait(max(0.0, self._start + seconds - time.monotonic()))


@pytest.mark.timeout(300)
def test_two_hundred_streams_stopped_at_random_moments(
    stack: Stack, client: Client, upstream: UpstreamProcess, stack_database: str
) -> None:
    chance = random.Random(SEED)
    plans = [draw(number, chance) for number in range(STREAMS[stack_database])]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for result in [pool.submit(live_through, stack, client, plan) for plan in plans]:
            result.result()

    wait_until(lambda: upstream.open_count() == 0, 5, "no chat is open at the upstream")
    asked = {request.model: request for request in upstream.requests()}
    reached = [asked[plan.model] for plan in plans if plan.model in asked]
    assert len(reached) > len(plans) * 0.9
    assert {request.outcome for request in reached} == {"disconnected"}
    assert all(request.disconnected_at for request in reached)
