"""Who may do what, by every way in: one table, and what an action leaves behind where it is allowed and where not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, Final
from uuid import UUID

import pytest
from werkzeug.test import TestResponse

from tests.integration.api import Caller, People, problem
from tests.integration.graphql_api import frames
from tests.integration.world import World
from webapp.errors import NotFound
from webapp.models import Role
from webapp.streams.lifecycle import TerminationReason

OK = "ok"
ROLES: Final = ("owner", "editor", "viewer", "stranger", "nobody")
# Written by hand, and not derived from what it tests.
TABLE: Final[dict[str, tuple[str, str, str, str, str]]] = {
    #                     owner  editor       viewer       stranger     nobody
    "read conversation": (OK, OK, OK, "not_found", "unauthenticated"),
    "read messages": (OK, OK, OK, "not_found", "unauthenticated"),
    "read stream": (OK, OK, OK, "not_found", "unauthenticated"),
    "follow": (OK, OK, OK, "not_found", "unauthenticated"),
    "follow with others": (OK, OK, OK, "not_found", "unauthenticated"),
    "list members": (OK, OK, OK, "not_found", "unauthenticated"),
    "send": (OK, OK, "forbidden", "not_found", "unauthenticated"),
    "continue": (OK, OK, "forbidden", "not_found", "unauthenticated"),
    "retry": (OK, OK, "forbidden", "not_found", "unauthenticated"),
    "terminate": (OK, OK, "forbidden", "not_found", "unauthenticated"),
    "rename": (OK, "forbidden", "forbidden", "not_found", "unauthenticated"),
    "delete": (OK, "forbidden", "forbidden", "not_found", "unauthenticated"),
    "set member": (OK, "forbidden", "forbidden", "not_found", "unauthenticated"),
    "remove member": (OK, "forbidden", "forbidden", "not_found", "unauthenticated"),
}
STATUS: Final = {"unauthenticated": 401, "forbidden": 403, "csrf_failed": 403, "not_found": 404}
NOT_IN_GRAPHQL: Final = frozenset(
    {"follow with others", "list members", "rename", "delete", "set member", "remove member"}
)
READING: Final = frozenset(
    {"read conversation", "read messages", "read stream", "follow", "follow with others", "list members"}
)


@dataclass(frozen=True)
class Place:
    """A conversation with members of every role, an answer that was stopped, and perhaps one that is being written."""

    world: World
    conversation_id: UUID
    ended: UUID
    active: UUID | None

    def state(self) -> dict[str, Any]:
        """All that an action may change."""
        services, owner = self.world.services, self.world.user("owner")
        try:
            title = services.conversations.get(owner, self.conversation_id).title
        except NotFound:
            title = "(deleted)"
        sessions = (self.ended, self.active) if self.active else (self.ended,)
        return {
            "title": title,
            "members": services.conversations.members(self.conversation_id),
            "rows": self.world.counts(),
            "queued": list(self.world.queue.enqueued),
            "sessions": [(row.status, row.stop_reason) for row in map(self.world.row, sessions)],
        }


@pytest.fixture
def place(world: World, action: str) -> Place:
    conversation_id = world.conversation("owner")
    for name, role in (("editor", Role.EDITOR), ("viewer", Role.VIEWER), ("guest", Role.VIEWER)):
        world.join(conversation_id, name, role)
    world.user("newcomer")
    worker = world.run(world.start(user_id=world.user("owner"), conversation_id=conversation_id).session_id)
    worker.say("a partial")
    worker.obey()
    world.manager.terminate(worker.session_id, TerminationReason.USER, by="owner")
    active = None
    if action == "terminate":
        active = world.start(user_id=world.user("owner"), conversation_id=conversation_id).session_id
    return Place(world, conversation_id, worker.session_id, active)


# How each is asked for


def rest_call(place: Place, action: str) -> tuple[str, str, Any]:
    """Method, path and body."""
    chat, stream = f"/api/conversations/{place.conversation_id}", f"/api/streams/{place.ended}"
    calls: dict[str, tuple[str, str, Any]] = {
        "read conversation": ("GET", chat, None),
        "read messages": ("GET", f"{chat}/messages", None),
        "read stream": ("GET", stream, None),
        "follow": ("GET", f"{stream}/events", None),
        "follow with others": ("GET", f"/api/streams/events?streams={place.ended}", None),
        "list members": ("GET", f"{chat}/members", None),
        "send": ("POST", "/api/stream-message", {"content": "x", "conversationId": str(place.conversation_id)}),
        "continue": ("POST", f"{stream}/continue", None),
        "retry": ("POST", f"{stream}/retry", None),
        "terminate": ("POST", "/api/terminate-stream", {"sessionId": str(place.active)}),
        "rename": ("PATCH", chat, {"title": "renamed"}),
        "delete": ("DELETE", chat, None),
        "set member": ("PUT", f"{chat}/members/newcomer", {"role": "editor"}),
        "remove member": ("DELETE", f"{chat}/members/guest", None),
    }
    return calls[action]


def graphql_operation(place: Place, action: str) -> str:
    chat, stream = place.conversation_id, place.ended
    operations = {
        "read conversation": f'{{conversation(id: "{chat}") {{id title role}}}}',
        "read messages": f'{{conversation(id: "{chat}") {{messages {{id content}}}}}}',
        "read stream": f'{{streamSession(id: "{stream}") {{sessionId status}}}}',
        "follow": f'subscription {{streamEvents(sessionId: "{stream}") {{__typename}}}}',
        "send": f'mutation {{streamMessage(input: {{content: "x", conversationId: "{chat}"}}) {{sessionId}}}}',
        "continue": f'mutation {{continueStream(sessionId: "{stream}") {{sessionId}}}}',
        "retry": f'mutation {{retryStream(sessionId: "{stream}") {{sessionId}}}}',
        "terminate": f'mutation {{terminateStream(input: {{sessionId: "{place.active}"}}) '
        "{__typename ... on StreamError {code} ... on TerminationReceipt {status}}}",
    }
    return operations[action]


def by_token(caller: Caller, place: Place, action: str) -> str:
    method, path, body = rest_call(place, action)
    return rest_verdict(caller.call(method, path, json=body, headers={"Accept": _accepted(action)}))


def by_cookie(caller: Caller, place: Place, action: str, *, with_csrf: bool = True) -> str:
    method, path, body = rest_call(place, action)
    headers = {"Accept": _accepted(action)} | ({"X-CSRFToken": caller.csrf("/sign-in?token=x")} if with_csrf else {})
    return rest_verdict(caller.call(method, path, json=body, headers=headers))


def by_graphql(caller: Caller, place: Place, action: str) -> str:
    body = {"query": graphql_operation(place, action)}
    return graphql_verdict(caller.post("/graphql", body, headers={"Accept": _accepted(action)}))


def _accepted(action: str) -> str:
    return "text/event-stream" if action.startswith("follow") else "application/json"


def rest_verdict(answer: TestResponse) -> str:
    if answer.status_code < 300:
        return OK
    code: str = answer.get_json(force=True)["code"]
    problem(answer, STATUS[code], code)
    return code


def graphql_verdict(answer: TestResponse) -> str:
    if answer.status_code != 200:
        return rest_verdict(answer)
    if answer.mimetype == "text/event-stream":
        results = [result for name, result in frames(answer) if name == "next"]
        assert results
    else:
        results = [answer.get_json()]
    for result in results:
        for error in result.get("errors", ()):
            return str(error["extensions"]["code"])
        for field in (result["data"] or {}).values():
            if isinstance(field, dict) and field.get("__typename") == "StreamError":
                return str(field["code"])
    return OK


FACES: Final[dict[str, Callable[[Caller, Place, str], str]]] = {
    "REST by token": by_token,
    "REST by cookie": by_cookie,
    "GraphQL": by_graphql,
}


def caller_of(people: People, world: World, role: str, face: str) -> Caller:
    """Somebody of that role, as that face knows people."""
    if role == "nobody":
        return people.stranger()
    world.user(role)
    token = world.services.accounts.rotate_token(role)
    if face != "REST by cookie":
        return Caller(people.app, token)
    browser = people.stranger()
    assert browser.sign_in(token).status_code == 303
    return browser


def asked() -> Iterator[tuple[str, str, str]]:
    """Every face, action and role that go together."""
    for face, action, role in product(FACES, TABLE, ROLES):
        if face != "GraphQL" or action not in NOT_IN_GRAPHQL:
            yield face, action, role


@pytest.mark.parametrize(("face", "action", "role"), list(asked()))
def test_everybody_may_do_what_the_table_says_and_no_more(
    people: People, world: World, place: Place, face: str, action: str, role: str
) -> None:
    caller = caller_of(people, world, role, face)
    before = place.state()
    expected = TABLE[action][ROLES.index(role)]
    assert FACES[face](caller, place, action) == expected
    after = place.state()
    if action in READING or expected != OK:
        assert after == before
    else:
        EFFECTS[action](place, before, after)


@pytest.mark.parametrize("action", sorted(TABLE.keys() - READING))
def test_not_even_an_owner_by_a_cookie_without_the_csrf_token(
    people: People, world: World, place: Place, action: str
) -> None:
    owner = caller_of(people, world, "owner", "REST by cookie")
    before = place.state()
    assert by_cookie(owner, place, action, with_csrf=False) == "csrf_failed"
    assert place.state() == before


# What an action does where it is allowed


def one_more_session(place: Place, before: dict[str, Any], after: dict[str, Any]) -> None:
    assert len(after["queued"]) == len(before["queued"]) + 1
    assert place.world.row(after["queued"][-1]).conversation_id == place.conversation_id


def stopped(place: Place, before: dict[str, Any], after: dict[str, Any]) -> None:
    assert [status for status, _ in after["sessions"]] == ["TERMINATED", "TERMINATED"]


def titled(title: str, place: Place, before: dict[str, Any], after: dict[str, Any]) -> None:
    assert (before["title"], after["title"]) == ("A conversation", title)


def members_changed(name: str, role: str | None, place: Place, before: dict[str, Any], after: dict[str, Any]) -> None:
    roles = {one.name: one.role for one in before["members"]} | {name: role}
    assert {one.name: one.role for one in after["members"]} == {key: value for key, value in roles.items() if value}


EFFECTS: Final[dict[str, Callable[[Place, dict[str, Any], dict[str, Any]], None]]] = {
    "send": one_more_session,
    "continue": one_more_session,
    "retry": one_more_session,
    "terminate": stopped,
    "rename": partial(titled, "renamed"),
    "delete": partial(titled, "(deleted)"),
    "set member": partial(members_changed, "newcomer", "editor"),
    "remove member": partial(members_changed, "guest", None),
}
