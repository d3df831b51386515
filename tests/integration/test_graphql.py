"""GraphQL says what REST says: the same objects, the same refusals, through the same calls."""

from __future__ import annotations

import time
from typing import Any
from uuid import UUID

import pytest
from apiflask import APIFlask

from tests.integration.api import Caller, People
from tests.integration.conftest import MakeWorld
from tests.integration.graphql_api import Asker
from tests.integration.world import WORLD_TEXT, World
from webapp.models import Role, new_id
from webapp.streams.events import THINKING
from webapp.streams.lifecycle import TerminationReason
from webapp.views import ModelView

SEND = "mutation($input: StreamMessageInput!) {streamMessage(input: $input) {%s}}"
TERMINATE = """mutation($input: TerminateStreamInput!) {terminateStream(input: $input) {
  __typename ... on TerminationReceipt {%s} ... on StreamError {code message}}}"""
CONTINUE = "mutation($id: ID!) {continueStream(sessionId: $id) {%s}}"
RETRY = "mutation($id: ID!) {retryStream(sessionId: $id) {%s}}"
IDS = "sessionId conversationId messageId status"
UNKNOWN = str(new_id())


@pytest.fixture
def rest(people: People) -> Caller:
    return people("ada")


@pytest.fixture
def ada(rest: Caller) -> Asker:
    return Asker(rest)


@pytest.fixture
def ended(world: World, rest: Caller) -> UUID:
    """A session of ada's with thinking and text that a user terminated."""
    worker = world.run()
    worker.say("hm ", THINKING)
    worker.say(WORLD_TEXT)
    worker.obey()
    world.manager.terminate(worker.session_id, TerminationReason.USER, by="ada")
    return worker.session_id


def conversation_of(world: World, session_id: UUID) -> str:
    return str(world.row(session_id).conversation_id)


def in_graphql(conversation: dict[str, Any]) -> dict[str, Any]:
    """A conversation as REST tells it, without what GraphQL has no field for: by it the page sees that something is
    new, for which GraphQL's clients ask for the messages' ids."""
    return {name: value for name, value in conversation.items() if name != "lastMessageId"}


class TestEqualsREST:
    """Field by field: each type has the fields of REST's object, no more and no fewer, with the same values."""

    @pytest.mark.parametrize("state", ["queued", "running", "ended"])
    def test_session(self, ada: Asker, rest: Caller, world: World, ended: UUID, state: str) -> None:
        begin = {"queued": lambda: world.start().session_id, "running": lambda: world.run().session_id}
        session_id = begin.get(state, lambda: ended)()
        query = "query($id: ID!) {streamSession(id: $id) {*StreamSession}}"
        assert ada.ask(query, id=str(session_id)) == rest.get(f"/api/streams/{session_id}").get_json()

    def test_active_streams(self, ada: Asker, rest: Caller, world: World, ended: UUID) -> None:
        one, other = world.start(), world.start()
        found = ada.ask("{activeStreams {*StreamSession}}")
        assert found == rest.get("/api/streams?status=ACTIVE").get_json()["items"]
        assert [session["sessionId"] for session in found] == [str(other.session_id), str(one.session_id)]

    def test_receipt(self, ada: Asker, rest: Caller, ended: UUID) -> None:
        receipt = ada.ask(TERMINATE % "*TerminationReceipt", input={"sessionId": str(ended)})
        assert receipt.pop("__typename") == "TerminationReceipt"
        assert receipt == rest.terminate(ended).get_json()
        assert (receipt["partialResponse"], receipt["reason"], receipt["thinkingLength"]) == (WORLD_TEXT, "user", 3)

    def test_conversation(self, ada: Asker, rest: Caller, world: World) -> None:
        session = world.start()
        world.join(session.conversation_id, "eve", Role.VIEWER)
        query = """query($id: ID!) {conversation(id: $id) {
          *Conversation activeStreams {*StreamSession} messages {*Message} members {*Member}}}"""
        found = ada.ask(query, id=str(session.conversation_id))
        path = f"/api/conversations/{session.conversation_id}"
        messages, members = found.pop("messages"), found.pop("members")
        assert found == in_graphql(rest.get(path).get_json())
        assert messages == rest.get(f"{path}/messages").get_json()["items"]
        assert len(messages) == 2
        assert members == rest.get(f"{path}/members").get_json()["items"]
        assert len(members) == 2

    def test_message_with_everything(self, ada: Asker, rest: Caller, world: World) -> None:
        worker = world.run()
        worker.say("hm ", THINKING)
        worker.say(WORLD_TEXT)
        worker.end(stats={"eval_count": 7, "total_duration": 2**53 - 1, "said": [1.5, None, {"so": True}]})
        conversation_id = conversation_of(world, worker.session_id)
        query = "query($id: ID!) {conversation(id: $id) {messages {*Message}}}"
        found = ada.ask(query, id=conversation_id)["messages"]
        assert found == rest.get(f"/api/conversations/{conversation_id}/messages").get_json()["items"]
        assert found[1]["stats"]["total_duration"] == 2**53 - 1

    def test_page(self, ada: Asker, rest: Caller, world: World) -> None:
        made = [str(world.conversation()) for _ in range(3)]
        query = """query($limit: Int, $cursor: ID) {
          conversations(limit: $limit, cursor: $cursor) {items {*Conversation} nextCursor}}"""
        first = ada.ask(query, limit=2)
        assert first == rest.get("/api/conversations?limit=2").get_json()
        second = ada.ask(query, limit=2, cursor=first["nextCursor"])
        assert second == rest.get(f"/api/conversations?limit=2&cursor={first['nextCursor']}").get_json()
        assert [one["id"] for one in first["items"] + second["items"]] == made[::-1]
        assert ada.ask(query) == rest.get("/api/conversations").get_json()

    def test_models(self, ada: Asker, rest: Caller, world: World) -> None:
        upstream = world.services.upstream
        upstream._models = [ModelView("big", 5_000_000_000, "x"), ModelView("bare", None, None)]
        upstream._asked_at = time.monotonic()
        found = ada.ask("{models {*Model}}")
        assert found == rest.get("/api/models").get_json()["items"]
        assert found[0]["sizeBytes"] == 5_000_000_000

    def test_me(self, ada: Asker, world: World) -> None:
        found = ada.ask("{me {*User}}")
        (user,) = world.services.accounts.list_users()
        assert found | {"lastUsedAt": None} == user.as_dict() | {"lastUsedAt": None}


class TestMutations:
    def test_create_conversation(self, ada: Asker, rest: Caller) -> None:
        query = "mutation($title: String) {createConversation(title: $title) {*Conversation}}"
        made = ada.ask(query, title="Locks")
        assert made["title"] == "Locks"
        seen = rest.get(f"/api/conversations/{made['id']}").get_json()
        assert made == {name: value for name, value in in_graphql(seen).items() if name != "activeStreams"}
        assert ada.ask("mutation {createConversation {title}}")["title"] == "New conversation"

    def test_send(self, ada: Asker, rest: Caller, world: World) -> None:
        sent = ada.ask(SEND % "*StreamSession", input={"content": "hello"})
        assert sent == rest.get(f"/api/streams/{sent['sessionId']}").get_json()
        assert world.queue.enqueued == [UUID(sent["sessionId"])]

    def test_send_with_everything(self, ada: Asker, rest: Caller, world: World) -> None:
        body = {
            "content": WORLD_TEXT,
            "conversationId": str(world.conversation()),
            "model": "llama",
            "options": {"temperature": 0.5, "stop": ["x"], "deep": {"er": None}},
            "think": "high",
            "keepAlive": "5m",
            "onDisconnect": "terminate",
            "onActive": "terminate",
            "timeouts": {"queueSeconds": 5, "idleSeconds": 7.5},
        }
        first = ada.ask(SEND % IDS, input=body, headers={"Idempotency-Key": "k"})
        again = rest.post("/api/stream-message", body, headers={"Accept": "application/json", "Idempotency-Key": "k"})
        # One key and one request, by whichever face: so everything has arrived alike.
        assert again.get_json()["sessionId"] == first["sessionId"]
        row = world.row(UUID(first["sessionId"]))
        assert (row.model, row.options, row.think) == ("llama", body["options"], "high")

    def test_an_idempotency_key(self, ada: Asker, world: World) -> None:
        keyed = {"Idempotency-Key": "k"}
        first = ada.ask(SEND % IDS, keyed, input={"content": "once"})
        assert ada.ask(SEND % IDS, keyed, input={"content": "once"}) == first
        assert len(world.queue.enqueued) == 1
        refused = ada.post(SEND % IDS, keyed, input={"content": "twice"}).get_json()["errors"][0]["extensions"]
        assert (refused["code"], refused["errors"][0]["field"]) == ("invalid", "Idempotency-Key")

    @pytest.mark.parametrize("query", [CONTINUE, RETRY])
    def test_go_on_or_try_again(self, ada: Asker, world: World, ended: UUID, query: str) -> None:
        keyed = {"Idempotency-Key": "k"}
        made = ada.ask(query % (IDS + " length"), keyed, id=str(ended))
        assert ada.ask(query % (IDS + " length"), keyed, id=str(ended)) == made
        assert (made["status"], made["conversationId"]) == ("ACTIVE", conversation_of(world, ended))
        same = str(world.row(ended).message_id) == made["messageId"]
        assert (same, made["length"]) == ((True, len(WORLD_TEXT)) if query == CONTINUE else (False, 0))

    def test_terminate(self, ada: Asker, world: World) -> None:
        session = world.start()
        receipt = ada.ask(TERMINATE % "reason status alreadyEnded", input={"sessionId": str(session.session_id)})
        assert (receipt["reason"], receipt["status"], receipt["alreadyEnded"]) == ("user", "TERMINATED", False)
        assert world.row(session.session_id).status == "TERMINATED"


class TestPermissions:
    def test_a_viewer_sees_but_does_not_terminate(self, people: People, rest: Caller, world: World) -> None:
        session = world.start()
        viewer = Asker(people.member(session.conversation_id, "eve", Role.VIEWER))
        assert viewer.ask("query($id: ID!) {streamSession(id: $id) {status}}", id=str(session.session_id))
        refused = viewer.ask(TERMINATE % "status", input={"sessionId": str(session.session_id)})
        assert (refused["__typename"], refused["code"]) == ("StreamError", "forbidden")
        assert refused["message"] == viewer.caller.terminate(session.session_id).get_json(force=True)["detail"]
        body = {"content": "x", "conversationId": str(session.conversation_id)}
        viewer.refused(SEND % IDS, "forbidden", input=body)
        assert world.row(session.session_id).status == "ACTIVE"

    def test_a_stranger_finds_nothing(self, people: People, world: World, ended: UUID) -> None:
        stranger = Asker(people("bob"))
        for query in (CONTINUE % IDS, RETRY % IDS, "query($id: ID!) {streamSession(id: $id) {status}}"):
            stranger.refused(query, "not_found", id=str(ended))
            stranger.refused(query, "not_found", id=UNKNOWN)
        conversation_id = conversation_of(world, ended)
        stranger.refused("query($id: ID!) {conversation(id: $id) {id}}", "not_found", id=conversation_id)
        for body in ({"sessionId": str(ended)}, {"sessionId": UNKNOWN}):
            assert stranger.ask(TERMINATE % "status", input=body)["code"] == "not_found"
        assert stranger.ask("{conversations {items {id}} activeStreams {sessionId}}") == {
            "conversations": {"items": []},
            "activeStreams": [],
        }

    def test_another_conversation_than_its_own(self, ada: Asker, world: World, ended: UUID) -> None:
        body = {"sessionId": str(ended), "conversationId": str(world.conversation())}
        assert ada.ask(TERMINATE % "status", input=body)["code"] == "not_found"


class TestErrors:
    BODIES: tuple[tuple[str, dict[str, Any]], ...] = (
        ("content", {"content": "  "}),
        ("content", {"content": "nul \x00"}),
        ("content", {"content": "lone \ud800"}),
        ("conversationId", {"content": "x", "conversationId": "7"}),
        ("model", {"content": "x", "model": "m" * 201}),
        ("options", {"content": "x", "options": [1]}),
        ("think", {"content": "x", "think": "very"}),
        ("onDisconnect", {"content": "x", "onDisconnect": "stay"}),
        ("onActive", {"content": "x", "onActive": None}),
        ("timeouts.queueSeconds", {"content": "x", "timeouts": {"queueSeconds": 0}}),
        ("timeouts.idle_seconds", {"content": "x", "timeouts": {"idleSeconds": 1e9}}),
    )

    @pytest.mark.parametrize(("field", "body"), BODIES, ids=[field for field, _ in BODIES])
    def test_an_input_is_refused_in_rests_words(
        self, ada: Asker, rest: Caller, world: World, field: str, body: dict[str, Any]
    ) -> None:
        told = rest.post("/api/stream-message", body).get_json(force=True)
        error = ada.post(SEND % IDS, input=body).get_json()["errors"][0]
        assert (error["message"], error["path"]) == (told["detail"], ["streamMessage"])
        expected = {"code": told["code"], "status": told["status"], "errors": told["errors"]}
        assert error["extensions"] == expected
        assert told["code"] == "invalid"
        assert not world.queue.enqueued

    @pytest.mark.parametrize(
        ("field", "query"),
        [
            ("id", '{conversation(id: "7") {id}}'),
            ("id", "{streamSession(id: 7) {status}}"),
            ("sessionId", 'mutation {continueStream(sessionId: "x") {status}}'),
            ("sessionId", 'mutation {retryStream(sessionId: "") {status}}'),
            ("cursor", '{conversations(cursor: "x") {nextCursor}}'),
            ("limit", "{conversations(limit: 201) {nextCursor}}"),
            ("limit", "{conversations(limit: 0) {nextCursor}}"),
            ("title", 'mutation {createConversation(title: " ") {id}}'),
        ],
    )
    def test_a_malformed_argument_is_named(self, ada: Asker, field: str, query: str) -> None:
        ada.refused(query, "invalid", field)

    def test_a_name_that_has_no_utf_8(self, ada: Asker) -> None:
        assert "odd" in ada.refused(SEND % IDS, "invalid", input={"content": "x", "odd\ud800": 1})["message"]

    def test_a_malformed_id_of_a_stream_to_terminate(self, ada: Asker) -> None:
        refused = ada.ask(TERMINATE % "status", input={"sessionId": "7"})
        assert (refused["code"], "sessionId" in refused["message"]) == ("invalid", True)

    def test_a_conversation_that_is_busy_names_its_stream(self, ada: Asker, world: World) -> None:
        session = world.start()
        error = ada.refused(
            SEND % IDS, "conversation_busy", input={"content": "x", "conversationId": str(session.conversation_id)}
        )
        assert error["extensions"]["sessionId"] == str(session.session_id)
        assert error["extensions"]["status"] == 409

    def test_too_large(self, ada: Asker, world: World) -> None:
        content = "x" * (world.settings.message_limit_characters + 1)
        assert ada.refused(SEND % IDS, "too_large", input={"content": content})["extensions"]["field"] == "content"

    def test_what_is_down_says_when_to_come_again(
        self, app: APIFlask, ada: Asker, world: World, world_with: MakeWorld
    ) -> None:
        app.extensions["sluicegate"] = world_with(redis_url="redis://127.0.0.1:1/0").services
        error = ada.refused(SEND % IDS, "unavailable", input={"content": "x"})
        assert (error["extensions"]["status"], error["extensions"]["retryAfterSeconds"]) == (503, 2)
        assert ada.ask(TERMINATE % "status", input={"sessionId": UNKNOWN})["code"] == "not_found"

    def test_one_field_fails_and_the_others_are_answered(self, ada: Asker) -> None:
        # `me` cannot be null, so neither can the whole: what is left is said by the error's path.
        result = ada.post('{me {name} gone: conversation(id: "7") {id}}').get_json()
        assert (result["data"], result["errors"][0]["path"]) == (None, ["gone"])
