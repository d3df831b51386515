"""Who belongs to a conversation: owners decide, everyone may leave, and somebody always remains to decide."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import UUID

import pytest
from werkzeug.test import TestResponse

from tests.integration.api import Caller, People, problem
from tests.integration.world import World
from webapp.errors import Conflict, NotFound
from webapp.models import Role, new_id


@pytest.fixture
def owner(people: People) -> Caller:
    return people("owner")


@pytest.fixture
def conversation_id(owner: Caller, world: World) -> UUID:
    return world.conversation("owner")


class Members:
    """The calls of one conversation's members."""

    def __init__(self, caller: Caller, conversation_id: UUID) -> None:
        self._caller = caller
        self._path = f"/api/conversations/{conversation_id}/members"

    def listed(self) -> dict[str, str]:
        items = self._caller.get(self._path).get_json()["items"]
        assert all(one.keys() == {"name", "role"} for one in items)
        return {one["name"]: one["role"] for one in items}

    def put(self, name: str, role: Any) -> TestResponse:
        return self._caller.call("PUT", f"{self._path}/{name}", json={"role": role})

    def delete(self, name: str) -> TestResponse:
        return self._caller.call("DELETE", f"{self._path}/{name}")


@pytest.fixture
def members(owner: Caller, conversation_id: UUID) -> Members:
    """As the owner has them."""
    return Members(owner, conversation_id)


class TestManaging:
    def test_who_begins_a_conversation_owns_it(self, members: Members) -> None:
        assert members.listed() == {"owner": "owner"}

    def test_a_member_is_made_changed_and_taken_out(
        self, members: Members, people: People, conversation_id: UUID
    ) -> None:
        path = f"/api/conversations/{conversation_id}"
        bob = people("bob")
        problem(bob.get(path), 404, "not_found")
        for role in ("viewer", "editor", "owner", "viewer"):
            answer = members.put("bob", role)
            assert (answer.status_code, answer.get_json()) == (200, {"name": "bob", "role": role})
            assert bob.get(path).get_json()["role"] == role
        assert members.listed() == {"bob": "viewer", "owner": "owner"}
        answer = members.delete("bob")
        assert (answer.status_code, answer.data) == (204, b"")
        problem(bob.get(path), 404, "not_found")
        assert members.listed() == {"owner": "owner"}

    def test_they_are_listed_by_name_to_every_member(
        self, members: Members, people: People, conversation_id: UUID
    ) -> None:
        for name in ("zoe", "bob", "ян"):
            people(name)
            members.put(name, "viewer")
        vera = people.member(conversation_id, "vera", Role.VIEWER)
        assert list(Members(vera, conversation_id).listed()) == ["bob", "owner", "vera", "zoe", "ян"]

    def test_to_say_it_twice_changes_nothing(self, members: Members, people: People, world: World) -> None:
        people("bob")
        members.put("bob", "editor")
        before = world.counts()
        assert members.put("bob", "editor").status_code == 200
        assert world.counts() == before
        assert members.delete("bob").status_code == 204
        problem(members.delete("bob"), 404, "not_found")

    def test_the_conversation_is_in_the_members_list(self, members: Members, people: People) -> None:
        bob = people("bob")
        members.put("bob", "viewer")
        assert [one["role"] for one in bob.get("/api/conversations").get_json()["items"]] == ["viewer"]

    def test_what_was_said_stays_when_its_sender_goes(
        self, members: Members, people: People, world: World, conversation_id: UUID
    ) -> None:
        bob = people.member(conversation_id, "bob", Role.EDITOR)
        session_id = UUID(bob.send("a question", conversationId=str(conversation_id)).get_json()["sessionId"])
        members.delete("bob")
        problem(bob.terminate(session_id), 404, "not_found")
        assert world.services.conversations.messages(conversation_id)[0].content == "a question"
        assert world.row(session_id).status == "ACTIVE"


class TestRefusals:
    @pytest.mark.parametrize("name", ["nobody", "%00", "a%20b", "x" * 200, "%ff", "..", "'", "%F0%9F%92%A9"])
    def test_a_user_that_is_not_there(self, members: Members, name: str) -> None:
        problem(members.put(name, "viewer"), 404, "not_found")
        problem(members.delete(name), 404, "not_found")

    def test_it_is_said_who_is_not_there(self, members: Members) -> None:
        assert "'nobody'" in problem(members.put("nobody", "viewer"), 404, "not_found")["detail"]

    def test_a_disabled_user_cannot_be_made_a_member_but_can_be_taken_out(
        self, members: Members, people: People, world: World, conversation_id: UUID
    ) -> None:
        people("bob")
        world.services.accounts.disable_user("bob")
        problem(members.put("bob", "viewer"), 404, "not_found")
        world.join(conversation_id, "bob", Role.OWNER)
        assert members.delete("bob").status_code == 204

    @pytest.mark.parametrize("role", ["admin", "OWNER", "", None, 7, ["owner"], {}])
    def test_a_role_that_is_none(self, members: Members, people: People, role: Any) -> None:
        people("bob")
        problem(members.put("bob", role), 422, "invalid", "role")
        assert members.listed() == {"owner": "owner"}

    def test_a_role_is_needed_and_nothing_else_is_taken(self, owner: Caller, conversation_id: UUID) -> None:
        path = f"/api/conversations/{conversation_id}/members/owner"
        problem(owner.call("PUT", path), 422, "invalid", "role")
        problem(owner.call("PUT", path, json={"role": "owner", "name": "x"}), 422, "invalid", "name")
        problem(owner.call("PUT", path, data=b"{", content_type="application/json"), 400, "not_json")

    @pytest.mark.parametrize("role", [Role.EDITOR, Role.VIEWER])
    def test_who_does_not_own_it_changes_nobody(
        self, members: Members, people: People, conversation_id: UUID, role: Role
    ) -> None:
        people("bob")
        member = Members(people.member(conversation_id, "mia", role), conversation_id)
        before = members.listed()
        problem(member.put("bob", "viewer"), 403, "forbidden")
        problem(member.put("mia", "owner"), 403, "forbidden")
        problem(member.put("owner", "viewer"), 403, "forbidden")
        problem(member.delete("owner"), 403, "forbidden")
        problem(member.delete("bob"), 403, "forbidden")
        assert members.listed() == before

    def test_to_a_stranger_there_is_no_such_conversation(self, people: People, conversation_id: UUID) -> None:
        bob = people("bob")
        for place in (conversation_id, new_id()):
            path = f"/api/conversations/{place}/members"
            answers = [bob.get(path), *(Members(bob, place).delete(name) for name in ("bob", "owner"))]
            answers.append(Members(bob, place).put("bob", "owner"))
            said = {problem(answer, 404, "not_found")["detail"].replace(str(place), "ID") for answer in answers}
            assert said == {"There is no conversation ID that you can see"}

    def test_in_a_deleted_conversation_there_is_nobody(
        self, world: World, owner: Caller, members: Members, conversation_id: UUID
    ) -> None:
        owner.call("DELETE", f"/api/conversations/{conversation_id}")
        problem(members.put("owner", "owner"), 404, "not_found")
        with pytest.raises(NotFound):
            world.services.conversations.set_member(conversation_id, "owner", Role.OWNER)


class TestLeaving:
    @pytest.mark.parametrize("role", [Role.VIEWER, Role.EDITOR, Role.OWNER])
    def test_everyone_may(self, members: Members, people: People, conversation_id: UUID, role: Role) -> None:
        mia = people.member(conversation_id, "mia", role)
        assert Members(mia, conversation_id).delete("mia").status_code == 204
        assert members.listed() == {"owner": "owner"}
        problem(Members(mia, conversation_id).delete("mia"), 404, "not_found")


class TestTheLastOwner:
    def test_it_can_be_neither_demoted_nor_taken_out(
        self, members: Members, people: People, conversation_id: UUID
    ) -> None:
        people.member(conversation_id, "ed", Role.EDITOR)
        for role in ("editor", "viewer"):
            problem(members.put("owner", role), 409, "conflict")
        problem(members.delete("owner"), 409, "conflict")
        assert members.put("owner", "owner").status_code == 200
        assert members.listed() == {"ed": "editor", "owner": "owner"}

    def test_beside_another_one_it_can(self, members: Members, people: People, conversation_id: UUID) -> None:
        second = Members(people.member(conversation_id, "second", Role.OWNER), conversation_id)
        assert members.put("owner", "viewer").status_code == 200
        problem(second.delete("second"), 409, "conflict")
        assert second.put("owner", "owner").status_code == 200
        assert second.delete("second").status_code == 204

    def test_one_who_cannot_sign_in_is_none(
        self, members: Members, people: People, world: World, conversation_id: UUID
    ) -> None:
        people.member(conversation_id, "second", Role.OWNER)
        world.services.accounts.disable_user("second")
        problem(members.delete("owner"), 409, "conflict")
        problem(members.put("owner", "editor"), 409, "conflict")

    def test_owners_of_other_conversations_do_not_count(self, members: Members, people: People, world: World) -> None:
        people("bob")
        world.conversation("bob")
        problem(members.delete("owner"), 409, "conflict")

    @pytest.mark.parametrize("change", ["remove", "demote"])
    def test_of_owners_who_take_each_other_out_one_remains(
        self, people: People, world: World, conversation_id: UUID, owner: Caller, change: str
    ) -> None:
        names = ["owner", *(f"owner{number}" for number in range(1, 6))]
        conversations = world.services.conversations
        for name in names[1:]:
            people.member(conversation_id, name, Role.OWNER)
        barrier = threading.Barrier(len(names))

        def act(name: str) -> bool:
            barrier.wait()
            try:
                if change == "remove":
                    conversations.remove_member(conversation_id, name)
                else:
                    conversations.set_member(conversation_id, name, Role.VIEWER)
            except Conflict:
                return False
            return True

        with ThreadPoolExecutor(len(names)) as pool:
            done = list(pool.map(act, names))
        assert done.count(False) == 1
        owners = [one.name for one in conversations.members(conversation_id) if one.role == "owner"]
        assert owners == [names[done.index(False)]]

    def test_of_many_who_add_the_same_user_all_succeed(
        self, people: People, world: World, conversation_id: UUID, owner: Caller
    ) -> None:
        people("bob")
        barrier = threading.Barrier(8)

        def add(number: int) -> str:
            barrier.wait()
            role = (Role.VIEWER, Role.EDITOR)[number % 2]
            return world.services.conversations.set_member(conversation_id, "bob", role).role

        with ThreadPoolExecutor(8) as pool:
            assert sorted(pool.map(add, range(8))) == ["editor"] * 4 + ["viewer"] * 4
        assert len(world.services.conversations.members(conversation_id)) == 2
