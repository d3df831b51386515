"""A stream as a subscription: the same events as REST's, from the same positions, in the form of graphql-sse."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import pytest
from apiflask import APIFlask

from tests.conftest import wait_until
from tests.integration.api import Caller, People
from tests.integration.conftest import MakeWorld
from tests.integration.graphql_api import Asker, frames, refusal
from tests.integration.world import WORLD_TEXT, World
from webapp.models import new_id
from webapp.streams.events import COMMENT, THINKING, decode_events, done_position
from webapp.streams.lifecycle import StreamPhase

FOLLOW = """subscription($id: ID!, $after: String) {streamEvents(sessionId: $id, after: $after) {
  __typename
  ... on SessionEvent {id sessionId conversationId messageId model}
  ... on PhaseEvent {id phase attempt position}
  ... on ThinkingEvent {id content}
  ... on MessageEvent {id content}
  ... on DoneEvent {id status reason messageId length thinkingLength sha256}
}}"""
WHOLE = "hm " + WORLD_TEXT


@pytest.fixture
def rest(app: APIFlask, world: World) -> Caller:
    return People(app, world)("ada")


@pytest.fixture
def ada(rest: Caller) -> Asker:
    return Asker(rest)


@pytest.fixture
def ended(world: World) -> UUID:
    """A session whose log holds an event of every kind."""
    worker = world.run()
    worker.mark(StreamPhase.LOADING)
    worker.mark(StreamPhase.GENERATING)
    worker.say("hm ", THINKING)
    for start in range(0, len(WORLD_TEXT), 5):
        worker.say(WORLD_TEXT[start : start + 5])
    worker.end()
    return worker.session_id


@pytest.fixture(autouse=True)
def nothing_is_left_running(world: World) -> Iterator[None]:
    yield
    wait_until(lambda: world.services.hub.followed == 0, 2, "no log is followed")


def followed(ada: Asker, session_id: UUID, after: str | None = None) -> list[dict[str, Any]]:
    return [result["streamEvents"] for result in ada.results(FOLLOW, id=str(session_id), after=after)]


def text(events: list[dict[str, Any]]) -> str:
    return "".join(one["content"] for one in events if "content" in one)


def as_rest_sends(rest: Caller, session_id: UUID, cursor: str | None = None) -> list[dict[str, Any]]:
    """The server-sent events, as the subscription's types have them."""
    headers = {"Last-Event-ID": cursor} if cursor else {}
    sent = decode_events(rest.get(f"/api/streams/{session_id}/events", headers=headers).data)
    return [{"__typename": f"{one.kind.capitalize()}Event", "id": one.id, **one.data} for one in sent]


class TestEqualsREST:
    def test_out_of_the_database(self, ada: Asker, rest: Caller, ended: UUID) -> None:
        events = followed(ada, ended)
        assert events == as_rest_sends(rest, ended)
        assert [one["__typename"] for one in events] == ["SessionEvent", "ThinkingEvent", "MessageEvent", "DoneEvent"]
        assert (text(events), events[0]["id"]) == (WHOLE, None)

    def test_while_it_runs(self, ada: Asker, rest: Caller, world: World) -> None:
        worker = world.run()
        worker.mark(StreamPhase.LOADING)
        worker.say("hm ", THINKING)
        both: dict[str, list[dict[str, Any]]] = {}
        readers = [
            threading.Thread(target=lambda: both.update(graphql=followed(ada, worker.session_id))),
            threading.Thread(target=lambda: both.update(rest=as_rest_sends(rest, worker.session_id))),
        ]
        for reader in readers:
            reader.start()
        wait_until(lambda: world.services.hub.followed == 1, 5, "it is followed")
        for piece in ("one ", "two "):
            worker.say(piece)
        worker.end()
        for reader in readers:
            reader.join(10)
        assert text(both["graphql"]) == "hm one two "
        assert _without_phases(both["graphql"]) == _without_phases(both["rest"])
        assert {"LOADING"} == {one["phase"] for one in both["graphql"] if "phase" in one}

    def test_queued(self, ada: Asker, world: World) -> None:
        session = world.start()
        stream = ada.stream(FOLLOW, id=str(session.session_id))
        parts = iter(stream.response)
        assert b'"SessionEvent"' in next(parts)
        assert b'{"__typename":"PhaseEvent","id":null,"phase":"QUEUED","attempt":1,"position":0}' in next(parts)
        assert (stream.headers["Cache-Control"], stream.headers["X-Accel-Buffering"]) == ("no-cache", "no")
        assert stream.headers["X-Stream-Session-Id"] == str(session.session_id)
        stream.close()


class TestPositions:
    def test_from_each(self, ada: Asker, rest: Caller, ended: UUID) -> None:
        for offset in range(len(WHOLE) + 1):
            events = followed(ada, ended, f"{offset}-0")
            assert text(events) == WHOLE[offset:]
            assert events == as_rest_sends(rest, ended, f"{offset}-0")

    def test_dones_own_is_complete_at_once(self, ada: Asker, ended: UUID) -> None:
        assert followed(ada, ended, str(done_position(len(WHOLE)))) == []

    def test_an_empty_one_is_the_start(self, ada: Asker, ended: UUID) -> None:
        assert text(followed(ada, ended, "")) == WHOLE

    @pytest.mark.parametrize("garbled", ["x", "7", "1-2-3", "٧-٠", "\ud800", "9999-0"])
    def test_one_that_is_none(self, ada: Asker, ended: UUID, garbled: str) -> None:
        (result,) = ada.results(FOLLOW, id=str(ended), after=garbled)
        assert refusal(result, "invalid_cursor")["extensions"]["status"] == 400


class TestRefusals:
    def test_what_cannot_be_seen(self, app: APIFlask, world: World, ended: UUID) -> None:
        stranger = Asker(People(app, world)("bob"))
        for session_id in (ended, new_id()):
            (result,) = stranger.results(FOLLOW, id=str(session_id))
            assert refusal(result, "not_found")["path"] == ["streamEvents"]

    def test_a_malformed_id(self, ada: Asker) -> None:
        (result,) = ada.results(FOLLOW, id="7")
        refusal(result, "invalid", "sessionId")

    @pytest.mark.parametrize(
        ("query", "code"),
        [
            ("{", "bad_request"),
            ("subscription {nothing}", "invalid"),
            ("subscription {streamEvents {__typename}}", "invalid"),
            ('subscription {a: streamEvents(sessionId: "7") {__typename} b: streamEvents(sessionId: "7") {__typename}}',
             "invalid"),
            ("{me {%s}}" % ("name " * 1000), "bad_request"),
        ],
    )  # fmt: skip
    def test_documents_are_refused_in_the_stream(self, ada: Asker, query: str, code: str) -> None:
        """For an EventSource tells its page of no other error."""
        (result,) = ada.results(query)
        refusal(result, code)

    def test_redis_that_is_down_is_waited_for(self, app: APIFlask, ada: Asker, world_with: MakeWorld) -> None:
        world = world_with(redis_url="redis://127.0.0.1:1/0", keepalive_seconds=0.2)
        session = world_with().start()
        app.extensions["sluicegate"] = world.services
        stream = ada.stream(FOLLOW, id=str(session.session_id))
        parts = iter(stream.response)
        assert b"SessionEvent" in next(parts)
        assert COMMENT in (next(parts), next(parts))
        stream.close()


class TestOtherOperations:
    def test_each_is_one_result(self, ada: Asker, world: World) -> None:
        assert ada.results("{me {name}}") == [{"me": {"name": "ada"}}]
        ada.results("mutation {createConversation {id}}")
        assert world.counts()["conversations"] == 1
        (result,) = ada.results('{conversation(id: "7") {id}}')
        refusal(result, "invalid", "id")

    def test_a_subscription_by_get(self, ada: Asker, rest: Caller, ended: UUID) -> None:
        query = {"query": FOLLOW, "variables": json.dumps({"id": str(ended)})}
        stream = rest.get("/graphql", query_string=query, headers={"Accept": "text/event-stream"})
        names = [name for name, _ in frames(stream)]
        assert names == ["next"] * 4 + ["complete"]


class TestTheEnd:
    def test_a_silence_is_filled_with_comments(self, app: APIFlask, ada: Asker, world_with: MakeWorld) -> None:
        world = world_with(keepalive_seconds=0.2)
        app.extensions["sluicegate"] = world.services
        worker = world.run()
        stream = ada.stream(FOLLOW, id=str(worker.session_id))
        parts = iter(stream.response)
        next(parts)
        assert [next(parts), next(parts)] == [COMMENT, COMMENT]
        worker.say("at last")
        assert b"at last" in next(parts)
        stream.close()
        wait_until(lambda: world.services.hub.followed == 0, 1, "the reader is gone")

    def test_a_server_that_stops_does_not_say_that_it_is_complete(self, ada: Asker, world: World) -> None:
        """Or the client would not come back for the rest."""
        worker = world.run()
        worker.say("some ")
        stream = ada.stream(FOLLOW, id=str(worker.session_id))
        parts = iter(stream.response)
        next(parts)
        assert b"some " in next(parts)
        wait = threading.Timer(0.2, world.services.hub.close)
        wait.start()
        assert list(parts) == []
        wait.join()

    @pytest.mark.parametrize("after", [0, 1, 2])
    def test_whoever_leaves_is_forgotten(self, ada: Asker, world: World, after: int) -> None:
        worker = world.run()
        worker.say("some ")
        stream = ada.stream(FOLLOW, id=str(worker.session_id))
        parts = iter(stream.response)
        for _ in range(after):
            next(parts)
        stream.close()
        assert world.services.hub.followed == 0


def _without_phases(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [one for one in events if one["__typename"] != "PhaseEvent"]
