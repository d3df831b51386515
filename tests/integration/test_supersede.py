"""`onActive: terminate`: a message takes the place of the conversation's active stream, also where many want it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from uuid import UUID

import pytest
from apiflask import APIFlask
from werkzeug.test import TestResponse

from tests.integration.api import People, problem
from tests.integration.conftest import MakeWorld
from tests.integration.world import World


@pytest.fixture
def ada(app: APIFlask, world: World) -> People:
    return People(app, world)


def send(people: People, token: str, conversation_id: UUID, **headers: str) -> TestResponse:
    body = {"content": "hello", "conversationId": str(conversation_id), "onActive": "terminate"}
    asked = {"Authorization": f"Bearer {token}", "Accept": "application/json", **headers}
    return people.app.test_client().post("/api/stream-message", json=body, headers=asked)


def test_of_many_at_once_each_gets_its_turn(ada: People, world: World) -> None:
    caller = ada("ada")
    conversation_id = world.row(world.start().session_id).conversation_id
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: send(ada, str(caller.token), conversation_id), range(6)))
    assert [one.status_code for one in answers] == [202] * 6
    rows = [world.row(UUID(one.json["sessionId"])) for one in answers]
    assert sorted(str(row.reason) for row in rows) == ["None"] + ["superseded"] * 5


def test_a_request_that_is_repeated_does_not_end_what_it_began(ada: People, world: World) -> None:
    caller = ada("ada")
    for number in range(5):
        conversation_id = world.row(world.start().session_id).conversation_id
        key = {"Idempotency-Key": f"key-{number}"}
        with ThreadPoolExecutor(6) as pool:
            answers = list(
                pool.map(lambda _, to=conversation_id, k=key: send(ada, str(caller.token), to, **k), range(6))
            )
        assert [one.status_code for one in answers] == [202] * 6
        (session_id,) = {UUID(one.json["sessionId"]) for one in answers}
        assert world.row(session_id).status == "ACTIVE"


class TestAtTheCap:
    @pytest.fixture
    def world(self, world_with: MakeWorld) -> World:
        return world_with(max_active_streams_per_user=1)

    def test_the_stream_that_goes_makes_room(self, ada: People, world: World) -> None:
        caller = ada("ada")
        old = world.start().session_id
        answer = send(ada, str(caller.token), world.row(old).conversation_id)
        assert answer.status_code == 202, answer.text
        assert world.row(old).reason == "superseded"

    def test_one_that_would_make_none_is_left_alone(self, ada: People, world: World) -> None:
        caller = ada("ada")
        conversation_id = world.conversation("ada")
        bobs = world.start(user_id=world.user("bob"), conversation_id=conversation_id).session_id
        world.start()
        problem(send(ada, str(caller.token), conversation_id), 429, "too_many_streams")
        assert world.row(bobs).status == "ACTIVE"
