"""Users, their tokens, and who is let in: by token, by cookie, by a one-time sign-in token."""

from __future__ import annotations

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from uuid import UUID

import pytest
from sqlalchemy import select, update

from tests.integration.api import Caller, People, problem
from tests.integration.conftest import MakeWorld
from tests.integration.world import World
from webapp.accounts import Accounts, cookie_stamp, hash_token
from webapp.auth import PERMISSIONS, Action
from webapp.errors import Conflict, Invalid, NotFound, Unauthenticated
from webapp.models import Role, SignInToken, User, db, now

TOKEN = re.compile(r"[\w.-]{20,}", re.ASCII)


@pytest.fixture
def accounts(world: World) -> Accounts:
    return world.services.accounts


def user_row(world: World, name: str) -> User:
    return world.database.read(lambda s: s.scalars(select(User).where(User.name == name)).one())


class TestUsers:
    def test_a_token_opens_its_users_door(self, accounts: Accounts) -> None:
        token = accounts.create_user("ada")
        assert TOKEN.fullmatch(token)
        user, _ = accounts.user_of_token(token)
        assert (user.name, user.operator) == ("ada", False)

    def test_what_is_kept_is_not_the_token(self, world: World, accounts: Accounts) -> None:
        tokens = [accounts.create_user("ada"), accounts.make_sign_in_token("ada")]
        kept = world.database.read(
            lambda s: repr([s.execute(table.select()).all() for table in db.metadata.sorted_tables])
        )
        assert not any(token in kept for token in tokens)
        assert all(hash_token(token) in kept for token in tokens)

    def test_no_two_tokens_are_alike(self, accounts: Accounts) -> None:
        assert len({accounts.create_user(f"user{number}") for number in range(20)}) == 20

    @pytest.mark.parametrize("name", ["ada", "ada.l@example.org", "Ada-1_x", "Ада", "愛", "x" * 64])
    def test_a_name_may_be(self, accounts: Accounts, name: str) -> None:
        accounts.create_user(name)
        assert [user.name for user in accounts.list_users()] == [name]

    def test_a_name_may_not_be(self, world: World, accounts: Accounts) -> None:
        for name in ("", " ", "a b", "a/b", "a\n", "\x00", "x" * 65, "a'b", "<b>"):
            with pytest.raises(Invalid) as caught:
                accounts.create_user(name)
            assert caught.value.extra["errors"][0]["field"] == "name"
        assert world.counts()["users"] == 0

    def test_a_name_that_is_taken_is_refused(self, world: World, accounts: Accounts) -> None:
        token = accounts.create_user("ada")
        with pytest.raises(Conflict, match="rotate ada"):
            accounts.create_user("ada", operator=True)
        assert world.counts()["users"] == 1
        assert accounts.user_of_token(token)[0].operator is False

    def test_of_many_of_one_name_one_is_made(self, world: World, accounts: Accounts) -> None:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: accounts.ensure_user("ada"), range(8)))
        assert world.counts()["users"] == 1

    def test_they_are_listed_by_name(self, accounts: Accounts) -> None:
        for name in ("bob", "ada", "eve"):
            accounts.create_user(name, operator=name == "eve")
        accounts.disable_user("bob")
        listed = accounts.list_users()
        assert [(user.name, user.operator) for user in listed] == [("ada", False), ("bob", False), ("eve", True)]
        assert [user.disabled_at is not None for user in listed] == [False, True, False]

    @pytest.mark.parametrize("change", ["disable_user", "rotate_token", "make_sign_in_token"])
    def test_one_that_is_not_there_is_said_so(self, accounts: Accounts, change: str) -> None:
        with pytest.raises(NotFound, match="nobody"):
            getattr(accounts, change)("nobody")


class TestTokens:
    def test_one_that_is_not_ours_is_refused(self, accounts: Accounts) -> None:
        token = accounts.create_user("ada")
        for wrong in ("", "x", token[:-1], token + "x", token.swapcase(), hash_token(token), "\x00", "\ud800"):
            with pytest.raises(Unauthenticated):
                accounts.user_of_token(wrong)

    def test_a_disabled_users_is_refused(self, accounts: Accounts) -> None:
        token = accounts.create_user("ada")
        accounts.disable_user("ada")
        with pytest.raises(Unauthenticated):
            accounts.user_of_token(token)

    def test_a_new_one_replaces_the_old_and_lets_in_again(self, accounts: Accounts) -> None:
        old = accounts.create_user("ada")
        accounts.disable_user("ada")
        new = accounts.rotate_token("ada")
        assert accounts.user_of_token(new)[0].name == "ada"
        with pytest.raises(Unauthenticated):
            accounts.user_of_token(old)

    def test_its_last_use_is_kept_but_not_written_each_time(self, world: World, accounts: Accounts) -> None:
        token = accounts.create_user("ada")
        assert user_row(world, "ada").token_used_at is None
        accounts.user_of_token(token)
        first = user_row(world, "ada").token_used_at
        assert first is not None
        accounts.user_of_token(token)
        assert user_row(world, "ada").token_used_at == first
        long_ago = now() - timedelta(minutes=5)
        world.database.write(lambda s: s.execute(update(User).values(token_used_at=long_ago)))
        accounts.user_of_token(token)
        assert user_row(world, "ada").token_used_at != long_ago


class TestOneTimeTokens:
    def test_one_works_once(self, accounts: Accounts) -> None:
        accounts.create_user("ada")
        token = accounts.make_sign_in_token("ada")
        assert accounts.redeem(token)[0].name == "ada"
        with pytest.raises(Unauthenticated):
            accounts.redeem(token)

    def test_of_many_at_once_one_is_let_in(self, accounts: Accounts) -> None:
        accounts.create_user("ada")
        token = accounts.make_sign_in_token("ada")
        barrier = threading.Barrier(8)

        def redeem(_: int) -> bool:
            barrier.wait()
            try:
                accounts.redeem(token)
            except Unauthenticated:
                return False
            return True

        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(redeem, range(8))) == 1

    def test_one_that_is_too_old_is_refused(self, world: World, accounts: Accounts) -> None:
        accounts.create_user("ada")
        token = accounts.make_sign_in_token("ada")
        past = now() - timedelta(seconds=1)
        world.database.write(lambda s: s.execute(update(SignInToken).values(expires_at=past)))
        with pytest.raises(Unauthenticated):
            accounts.redeem(token)

    def test_it_lives_as_long_as_is_set(self, world_with: MakeWorld) -> None:
        world = world_with(sign_in_token_seconds=77)
        world.services.accounts.create_user("ada")
        before = now()
        world.services.accounts.make_sign_in_token("ada")
        expires_at = world.database.read(lambda s: s.scalars(select(SignInToken.expires_at)).one())
        assert timedelta(0) <= expires_at - before - timedelta(seconds=77) < timedelta(seconds=5)

    def test_old_ones_are_cleared_away(self, world: World, accounts: Accounts) -> None:
        accounts.create_user("ada")
        accounts.make_sign_in_token("ada")
        world.database.write(lambda s: s.execute(update(SignInToken).values(expires_at=now() - timedelta(days=1))))
        accounts.make_sign_in_token("ada")
        assert world.counts()["sign_in_tokens"] == 1

    def test_a_disabled_users_is_refused(self, world: World, accounts: Accounts) -> None:
        accounts.create_user("ada")
        token = accounts.make_sign_in_token("ada")
        accounts.disable_user("ada")
        assert world.counts()["sign_in_tokens"] == 0
        late = accounts.make_sign_in_token("ada")
        for one in (token, late):
            with pytest.raises(Unauthenticated):
                accounts.redeem(one)

    def test_it_is_no_api_token_and_an_api_token_is_none(self, accounts: Accounts) -> None:
        api_token = accounts.create_user("ada")
        with pytest.raises(Unauthenticated):
            accounts.user_of_token(accounts.make_sign_in_token("ada"))
        with pytest.raises(Unauthenticated):
            accounts.redeem(api_token)


class TestCookies:
    def test_a_stamp_goes_with_its_token(self, accounts: Accounts) -> None:
        token = accounts.create_user("ada")
        _, stamp = accounts.user_of_token(token)
        user = accounts.user_of_cookie("ada", stamp)
        assert user is not None
        assert user.name == "ada"
        assert accounts.user_of_cookie("bob", stamp) is None
        assert accounts.user_of_cookie("ada", stamp[:-1]) is None
        accounts.rotate_token("ada")
        assert accounts.user_of_cookie("ada", stamp) is None

    def test_a_stamp_shows_neither_token_nor_hash(self, accounts: Accounts) -> None:
        token = accounts.create_user("ada")
        stamp = cookie_stamp(hash_token(token))
        assert stamp == accounts.user_of_token(token)[1]
        assert stamp not in (token, hash_token(token))
        assert not hash_token(token).startswith(stamp)


class TestByToken:
    def test_without_one_nothing_is_said(self, people: People) -> None:
        answer = people.stranger().get("/api/conversations")
        problem(answer, 401, "unauthenticated")
        assert answer.headers["WWW-Authenticate"] == "Bearer"

    def test_a_wrong_one_is_refused(self, people: People) -> None:
        caller = people("ada")
        wrong = ["Bearer x", f"Basic {caller.token}", f"{caller.token}", "Bearer", "Bearer ", f"Token {caller.token}"]
        for header in wrong:
            problem(caller.get("/api/conversations", headers={"Authorization": header}), 401, "unauthenticated")

    @pytest.mark.parametrize("form", ["Bearer {}", "bearer {}", "BEARER  {} "])
    def test_the_scheme_may_be_written_in_any_case(self, people: People, form: str) -> None:
        caller = people("ada")
        header = {"Authorization": form.format(caller.token)}
        assert caller.get("/api/conversations", headers=header).status_code == 200

    def test_it_is_asked_for_before_the_body_is_looked_at(self, people: People) -> None:
        for path in ("/api/stream-message", "/api/terminate-stream", "/api/conversations"):
            stranger = people.stranger()
            problem(stranger.post(path, data="{", content_type="application/json"), 401, "unauthenticated")
            problem(stranger.post(path, data="x", content_type="text/plain"), 401, "unauthenticated")

    def test_a_disabled_user_is_refused(self, people: People, accounts: Accounts) -> None:
        caller = people("ada")
        accounts.disable_user("ada")
        problem(caller.get("/api/conversations"), 401, "unauthenticated")

    def test_a_rotated_one_is_refused(self, people: People, accounts: Accounts) -> None:
        caller = people("ada")
        caller_again = Caller(people.app, accounts.rotate_token("ada"))
        problem(caller.get("/api/conversations"), 401, "unauthenticated")
        assert caller_again.get("/api/conversations").status_code == 200

    def test_it_needs_no_csrf_token(self, people: People) -> None:
        assert people("ada").post("/api/conversations", {}).status_code == 201

    def test_a_wrong_one_is_not_made_good_by_a_cookie(self, people: People, accounts: Accounts) -> None:
        accounts.create_user("ada")
        browser = people.stranger()
        browser.sign_in(accounts.make_sign_in_token("ada"))
        assert browser.get("/api/conversations").status_code == 200
        problem(browser.get("/api/conversations", headers={"Authorization": "Bearer x"}), 401, "unauthenticated")


class TestByCookie:
    @pytest.fixture
    def browser(self, people: People, accounts: Accounts) -> Caller:
        """Signed in at the page as `ada`."""
        accounts.create_user("ada")
        browser = people.stranger()
        assert browser.sign_in(accounts.make_sign_in_token("ada")).status_code == 303
        return browser

    def test_a_safe_call_needs_no_csrf_token(self, browser: Caller) -> None:
        assert browser.get("/api/conversations").status_code == 200

    def test_an_unsafe_one_without_it_is_refused(self, browser: Caller, world: World) -> None:
        conversation_id = world.conversation("ada")
        session_id = world.start(conversation_id=conversation_id).session_id
        before = world.counts()
        calls = [
            ("POST", "/api/conversations", {}),
            ("POST", "/api/stream-message", {"content": "hello"}),
            ("POST", "/api/terminate-stream", {"sessionId": str(session_id)}),
            ("PATCH", f"/api/conversations/{conversation_id}", {"title": "x"}),
            ("DELETE", f"/api/conversations/{conversation_id}", None),
        ]
        for method, path, body in calls:
            problem(browser.call(method, path, json=body), 403, "csrf_failed")
            wrong = browser.call(method, path, json=body, headers={"X-CSRFToken": "wrong"})
            problem(wrong, 403, "csrf_failed")
        assert world.counts() == before
        assert world.row(session_id).status == "ACTIVE"

    @pytest.mark.parametrize("header", ["X-CSRFToken", "X-CSRF-Token"])
    def test_an_unsafe_one_with_it_is_made(self, browser: Caller, header: str) -> None:
        answer = browser.post("/api/conversations", {"title": "mine"}, headers={header: browser.csrf()})
        assert answer.status_code == 201

    def test_another_browsers_is_none(self, browser: Caller, people: People, accounts: Accounts) -> None:
        accounts.create_user("bob")
        other = people.stranger()
        other.sign_in(accounts.make_sign_in_token("bob"))
        answer = browser.post("/api/conversations", {}, headers={"X-CSRFToken": other.csrf()})
        problem(answer, 403, "csrf_failed")

    def test_a_disabled_user_is_refused(self, browser: Caller, accounts: Accounts) -> None:
        accounts.disable_user("ada")
        problem(browser.get("/api/conversations"), 401, "unauthenticated")

    def test_after_the_token_was_rotated_it_is_refused(self, browser: Caller, accounts: Accounts) -> None:
        accounts.rotate_token("ada")
        problem(browser.get("/api/conversations"), 401, "unauthenticated")

    def test_a_forged_one_is_refused(self, browser: Caller) -> None:
        cookie = browser.client.get_cookie("sluicegate_session")
        assert cookie is not None
        browser.client.set_cookie("sluicegate_session", cookie.value[:-4] + "AAAA")
        problem(browser.get("/api/conversations"), 401, "unauthenticated")

    def test_it_is_not_for_scripts_nor_for_other_sites(self, people: People, accounts: Accounts) -> None:
        accounts.create_user("ada")
        answer = people.stranger().sign_in(accounts.make_sign_in_token("ada"))
        (cookie,) = [one for one in answer.headers.getlist("Set-Cookie") if one.startswith("sluicegate_session=")]
        assert "HttpOnly" in cookie
        assert "SameSite=Lax" in cookie

    def test_a_one_time_token_is_used_up(self, people: People, accounts: Accounts) -> None:
        accounts.create_user("ada")
        token = accounts.make_sign_in_token("ada")
        assert people.stranger().sign_in(token).status_code == 303
        again = people.stranger()
        assert again.sign_in(token).status_code == 401
        problem(again.get("/api/conversations"), 401, "unauthenticated")

    def test_the_form_without_its_csrf_token_uses_nothing_up(self, people: People, accounts: Accounts) -> None:
        accounts.create_user("ada")
        token = accounts.make_sign_in_token("ada")
        assert people.stranger().client.post("/sign-in", data={"token": token}).status_code == 403
        assert people.stranger().sign_in(token).status_code == 303

    def test_an_api_token_signs_in_as_well(self, people: People, accounts: Accounts) -> None:
        token = accounts.create_user("ada")
        browser = people.stranger()
        assert browser.sign_in(f" {token}\n").status_code == 303
        assert browser.get("/api/conversations").status_code == 200

    def test_signing_out_ends_it(self, browser: Caller) -> None:
        assert browser.client.post("/sign-out", data={"csrf_token": browser.csrf()}).status_code == 303
        problem(browser.get("/api/conversations"), 401, "unauthenticated")


class TestRoles:
    def test_what_each_may_do(self) -> None:
        assert {
            Role.OWNER: {Action.READ, Action.SEND, Action.TERMINATE, Action.MANAGE},
            Role.EDITOR: {Action.READ, Action.SEND, Action.TERMINATE},
            Role.VIEWER: {Action.READ},
        } == PERMISSIONS

    @pytest.fixture
    def conversation_id(self, world: World) -> UUID:
        return world.conversation("owner")

    def test_a_viewer_reads_and_follows_and_nothing_else(
        self, people: People, world: World, conversation_id: UUID
    ) -> None:
        viewer = people.member(conversation_id, "vera", Role.VIEWER)
        session_id = world.start(user_id=world.user("owner"), conversation_id=conversation_id).session_id
        before = world.counts()
        assert viewer.get(f"/api/conversations/{conversation_id}").get_json()["role"] == "viewer"
        assert viewer.get(f"/api/conversations/{conversation_id}/messages").status_code == 200
        assert viewer.get(f"/api/streams/{session_id}").status_code == 200
        problem(viewer.terminate(session_id), 403, "forbidden")
        problem(viewer.send(conversationId=str(conversation_id)), 403, "forbidden")
        problem(viewer.call("PATCH", f"/api/conversations/{conversation_id}", json={"title": "x"}), 403, "forbidden")
        problem(viewer.call("DELETE", f"/api/conversations/{conversation_id}"), 403, "forbidden")
        assert world.counts() == before
        assert world.row(session_id).stop_reason is None

    def test_an_editor_sends_and_terminates_but_does_not_manage(
        self, people: People, world: World, conversation_id: UUID
    ) -> None:
        editor = people.member(conversation_id, "ed", Role.EDITOR)
        sent = editor.send(conversationId=str(conversation_id))
        assert sent.status_code == 202
        receipt = editor.terminate(sent.get_json()["sessionId"]).get_json()
        assert (receipt["reason"], receipt["status"]) == ("user", "TERMINATED")
        assert editor.get(f"/api/streams/{receipt['sessionId']}").get_json()["terminatedBy"] == "ed"
        problem(editor.call("PATCH", f"/api/conversations/{conversation_id}", json={"title": "x"}), 403, "forbidden")
        problem(editor.call("DELETE", f"/api/conversations/{conversation_id}"), 403, "forbidden")
