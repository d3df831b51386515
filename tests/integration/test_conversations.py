"""A user's conversations: what a search finds, and by what a reader sees that something is new."""

from __future__ import annotations

from uuid import UUID

import pytest

from tests.integration.api import Caller, People, problem
from tests.integration.world import World
from webapp.models import Role


@pytest.fixture
def ada(people: People) -> Caller:
    return people("ada")


def titles(caller: Caller, search: str, **more: str) -> list[str]:
    answer = caller.get("/api/conversations", query_string={"search": search, **more})
    assert answer.status_code == 200, answer.text
    return [one["title"] for one in answer.get_json()["items"]]


def talk(caller: Caller, title: str, *said: str) -> UUID:
    """A conversation of that title; what is said in it is not answered."""
    conversation_id = caller.post("/api/conversations", {"title": title}).get_json()["id"]
    for content in said:
        session = caller.send(content, conversationId=conversation_id).get_json()
        caller.terminate(session["sessionId"])
    return UUID(conversation_id)


class TestSearch:
    def test_it_finds_titles_and_messages_in_any_case(self, ada: Caller) -> None:
        talk(ada, "Weirs", "how high?")
        talk(ada, "Locks", "as wide as a WEIR")
        talk(ada, "Culverts", "how long?")
        assert titles(ada, "weir") == ["Locks", "Weirs"]
        assert titles(ada, "LONG") == ["Culverts"]
        assert titles(ada, "nothing of the kind") == []
        assert titles(ada, "") == ["Culverts", "Locks", "Weirs"]

    @pytest.mark.parametrize("text", ["100%", "a_b", "a\\b", "'; --", '"'])
    def test_what_means_something_to_sql_means_itself(self, ada: Caller, text: str) -> None:
        talk(ada, f"with {text} in it")
        talk(ada, "1000 aXb a/b")
        assert titles(ada, text) == [f"with {text} in it"]

    def test_it_finds_nothing_of_anybody_else_and_nothing_deleted(self, ada: Caller, people: People) -> None:
        bob = people("bob")
        talk(bob, "Bob's weirs")
        ada.call("DELETE", f"/api/conversations/{talk(ada, 'Gone weirs', 'weir')}")
        assert titles(ada, "weir") == []

    def test_it_goes_on_from_page_to_page(self, ada: Caller) -> None:
        for number in range(5):
            talk(ada, f"Weir {number}")
            talk(ada, f"Lock {number}")
        found: list[str] = []
        cursor = None
        while cursor or not found:
            query = {"search": "weir", "limit": "2", **({"cursor": cursor} if cursor else {})}
            page = ada.get("/api/conversations", query_string=query).get_json()
            found += [one["title"] for one in page["items"]]
            cursor = page["nextCursor"]
        assert found == [f"Weir {number}" for number in reversed(range(5))]

    def test_one_that_is_too_long_or_cannot_be_text_is_refused(self, ada: Caller) -> None:
        problem(ada.get("/api/conversations", query_string={"search": "x" * 201}), 422, "invalid", field="search")
        problem(ada.get("/api/conversations?search=%00"), 422, "invalid", field="search")


class TestTheNewestMessage:
    def test_it_is_told_with_the_conversation(self, ada: Caller, world: World) -> None:
        conversation_id = talk(ada, "Weirs")
        path = f"/api/conversations/{conversation_id}"
        assert ada.get(path).get_json()["lastMessageId"] is None
        session = ada.send("how high?", conversationId=str(conversation_id)).get_json()
        state = ada.get(path).get_json()
        assert state["lastMessageId"] == session["messageId"]
        assert state["lastMessageId"] == ada.get(f"{path}/messages").get_json()["items"][-1]["id"]
        assert [one["sessionId"] for one in state["activeStreams"]] == [session["sessionId"]]

    def test_every_member_is_told(self, ada: Caller, people: People) -> None:
        conversation_id = talk(ada, "Weirs", "how high?")
        vera = people.member(conversation_id, "vera", Role.VIEWER)
        path = f"/api/conversations/{conversation_id}"
        assert vera.get(path).get_json()["lastMessageId"] == ada.get(path).get_json()["lastMessageId"]
