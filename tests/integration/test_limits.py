"""How often a user may send and an address may try to sign in: counted by all web processes, and never in the way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch
from uuid import UUID

import pytest
from apiflask import APIFlask
from werkzeug.test import TestResponse

from tests.integration.api import Caller, People, problem
from tests.integration.conftest import MakeWorld
from tests.integration.world import CLOSED_REDIS, World, make_settings
from tests.services import ValkeyServer
from webapp.app import create_app
from webapp.config import load_settings
from webapp.errors import ConfigurationError, TooManyRequests
from webapp.limits import Limits, home_of
from webapp.models import new_id, now
from webapp.queue import make_hurried_redis
from webapp.streams.lifecycle import TerminationReason
from webapp.views import UserView

SIGN_IN_PATH = "/sign-in"


def user(name: str = "ada") -> UserView:
    return UserView(new_id(), name, False, now(), None, None)


@pytest.fixture
def limits_with(valkey: ValkeyServer, tmp_path: Path) -> Iterator[Callable[..., Limits]]:
    """Makes the limits of a web process; several share what they have counted."""
    valkey.flush()
    made: list[Limits] = []

    def make(messages: str = "", sign_ins: str = "", redis_url: str = valkey.url) -> Limits:
        settings = make_settings("sqlite:///unused.db", redis_url, tmp_path)
        made.append(Limits(make_hurried_redis(settings), messages=messages, sign_ins=sign_ins))
        return made[-1]

    yield make
    for one in made:
        one._redis.connection_pool.disconnect()


def refused(hit: Callable[[], None]) -> int:
    """Seconds until it is allowed again, of a hit that is one too many."""
    with pytest.raises(TooManyRequests) as caught:
        hit()
    assert caught.value.retry_after_seconds is not None
    return caught.value.retry_after_seconds


class TestCounting:
    def test_so_many_are_allowed_and_then_none(self, limits_with: Callable[..., Limits]) -> None:
        limits, ada = limits_with(messages="3/minute"), user()
        for _ in range(3):
            limits.hit_messages(ada)
        assert 50 <= refused(lambda: limits.hit_messages(ada)) <= 61
        limits.hit_messages(user("bob"))

    def test_when_it_says_so_it_is_allowed_again(self, limits_with: Callable[..., Limits]) -> None:
        limits, ada = limits_with(messages="2/second"), user()
        limits.hit_messages(ada)
        limits.hit_messages(ada)
        seconds = refused(lambda: limits.hit_messages(ada))
        assert 1 <= seconds <= 2
        time.sleep(seconds)
        limits.hit_messages(ada)

    def test_it_never_says_too_soon(self, limits_with: Callable[..., Limits]) -> None:
        limits, ada = limits_with(messages="1/3 seconds"), user()
        limits.hit_messages(ada)
        time.sleep(1.6)  # what is left is nearer to one second than to two
        assert refused(lambda: limits.hit_messages(ada)) == 2

    def test_what_is_refused_is_not_counted(self, limits_with: Callable[..., Limits], valkey: ValkeyServer) -> None:
        limits, ada = limits_with(messages="10/minute;2/second"), user()
        limits.hit_messages(ada)
        limits.hit_messages(ada)
        for _ in range(20):
            refused(lambda: limits.hit_messages(ada))
        time.sleep(1.1)
        limits.hit_messages(ada)

    def test_all_processes_count_together(self, limits_with: Callable[..., Limits]) -> None:
        processes, ada = [limits_with(messages="20/minute") for _ in range(4)], user()

        def hit(number: int) -> bool:
            try:
                processes[number % 4].hit_messages(ada)
            except TooManyRequests:
                return False
            return True

        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(hit, range(60))) == 20

    def test_every_key_has_a_ttl_and_our_prefix(self, limits_with: Callable[..., Limits]) -> None:
        limits = limits_with(messages="5/minute;100/hour", sign_ins="2/minute")
        limits.hit_messages(user())
        limits.hit_sign_in("10.0.0.1")
        limits.forgive_sign_in("10.0.0.1")
        limits.forgive_sign_in("10.0.0.2")  # whose window had passed meanwhile
        keys = list(limits._redis.scan_iter())
        assert len(keys) == 4
        assert all(key.startswith(b"sg:limit:") for key in keys)
        assert all(0 < limits._redis.ttl(key) <= 3600 for key in keys)

    def test_without_a_rate_nothing_is_counted(self, limits_with: Callable[..., Limits]) -> None:
        limits, ada = limits_with(), user()
        for _ in range(300):
            limits.hit_messages(ada)
            limits.hit_sign_in("10.0.0.1")
            limits.forgive_sign_in("10.0.0.1")
        assert limits._redis.dbsize() == 0

    def test_a_good_try_to_sign_in_is_given_back(self, limits_with: Callable[..., Limits]) -> None:
        limits = limits_with(sign_ins="2/minute")
        for _ in range(10):
            limits.hit_sign_in("10.0.0.1")
            limits.forgive_sign_in("10.0.0.1")
        limits.hit_sign_in("10.0.0.1")
        limits.hit_sign_in("10.0.0.1")
        refused(lambda: limits.hit_sign_in("10.0.0.1"))
        limits.hit_sign_in("10.0.0.2")

    @pytest.mark.parametrize(
        ("address", "home"),
        [
            ("192.0.2.7", "192.0.2.7"),
            ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
            ("2001:db8:1:2::1", "2001:db8:1:2::/64"),
            ("::ffff:192.0.2.7", "192.0.2.7"),
            ("", ""),
        ],
    )
    def test_an_ipv6_customer_is_one(self, address: str, home: str) -> None:
        assert home_of(address) == home


class TestWithoutRedis:
    @pytest.fixture
    def own_valkey(self, tmp_path: Path) -> Iterator[ValkeyServer]:
        """One that may be stopped."""
        from tests.services import valkey_server

        server = valkey_server(tmp_path / "valkey")
        yield server
        server.resume()
        server.stop()

    def test_it_is_counted_in_memory(self, limits_with: Callable[..., Limits]) -> None:
        limits, ada = limits_with(messages="3/minute", sign_ins="1/minute", redis_url=CLOSED_REDIS), user()
        for _ in range(3):
            limits.hit_messages(ada)
        assert 50 <= refused(lambda: limits.hit_messages(ada)) <= 61
        limits.hit_sign_in("10.0.0.1")
        limits.forgive_sign_in("10.0.0.1")
        limits.hit_sign_in("10.0.0.1")
        refused(lambda: limits.hit_sign_in("10.0.0.1"))

    def test_also_where_none_is_configured(self, limits_with: Callable[..., Limits]) -> None:
        limits, ada = limits_with(messages="1/minute", redis_url=""), user()
        limits.hit_messages(ada)
        refused(lambda: limits.hit_messages(ada))

    def test_one_that_hangs_holds_up_one_caller_for_a_moment(
        self, limits_with: Callable[..., Limits], own_valkey: ValkeyServer
    ) -> None:
        limits, ada = limits_with(messages="1000/minute", redis_url=own_valkey.url), user()
        limits.hit_messages(ada)
        own_valkey.pause()
        before = time.monotonic()
        for _ in range(100):
            limits.hit_messages(ada)
        assert time.monotonic() - before < 2

    def test_whoever_asks_whether_it_is_back_asks_for_all(
        self, limits_with: Callable[..., Limits], own_valkey: ValkeyServer
    ) -> None:
        limits, ada = limits_with(messages="1000/minute", redis_url=own_valkey.url), user()
        own_valkey.pause()
        limits.hit_messages(ada)
        limits._away_until = time.monotonic()

        def seconds(_: int) -> float:
            before = time.monotonic()
            limits.hit_messages(ada)
            return time.monotonic() - before

        with ThreadPoolExecutor(8) as pool:
            waited = [one for one in pool.map(seconds, range(8)) if one > 0.3]
        assert len(waited) == 1

    def test_one_that_is_back_is_used_again(self, limits_with: Callable[..., Limits], own_valkey: ValkeyServer) -> None:
        with patch("webapp.limits.REDIS_RETRY_SECONDS", 0.2):
            limits, ada = limits_with(messages="3/minute", redis_url=own_valkey.url), user()
            for _ in range(3):
                limits.hit_messages(ada)
            own_valkey.pause()
            limits.hit_messages(ada)  # which memory knows nothing of
            own_valkey.resume()
            time.sleep(0.3)
            refused(lambda: limits.hit_messages(ada))

    def test_a_connection_that_broke_is_made_anew(
        self, limits_with: Callable[..., Limits], own_valkey: ValkeyServer
    ) -> None:
        limits, ada = limits_with(messages="3/minute", redis_url=own_valkey.url), user()
        limits.hit_messages(ada)
        own_valkey.restart()
        limits.hit_messages(ada)
        assert limits._away_until == 0

    def test_it_may_listen_on_a_unix_socket(self, limits_with: Callable[..., Limits], tmp_path: Path) -> None:
        import redis

        limits = limits_with(messages="3/minute", redis_url=f"unix://{tmp_path}/valkey.sock?db=2")
        (connection,) = {limits._shared.storage.storage.connection_pool.connection_class}
        assert connection is redis.UnixDomainSocketConnection
        assert limits._shared.storage.storage.connection_pool.connection_kwargs["db"] == 2


class TestMessages:
    @pytest.fixture
    def world(self, world_with: MakeWorld) -> World:
        return world_with(rate_limit="3/minute")

    @pytest.fixture
    def ada(self, app: APIFlask, world: World) -> Caller:
        return People(app, world)("ada")

    def test_one_too_many_is_refused_and_nothing_written(self, ada: Caller, world: World) -> None:
        for _ in range(3):
            assert ada.send().status_code == 202
        before, queued = world.counts(), len(world.queue.enqueued)
        answer = ada.send()
        problem(answer, 429, "rate_limited")
        assert 50 <= int(answer.headers["Retry-After"]) <= 61
        assert (world.counts(), len(world.queue.enqueued)) == (before, queued)

    def test_the_limit_is_a_users_own(self, ada: Caller, app: APIFlask, world: World) -> None:
        for _ in range(4):
            ada.send()
        assert People(app, world)("bob").send().status_code == 202

    def test_repetitions_of_one_request_are_not_counted(self, ada: Caller) -> None:
        headers = {"Accept": "application/json", "Idempotency-Key": "one"}
        answers = [ada.post("/api/stream-message", {"content": "hello"}, headers=headers) for _ in range(6)]
        assert {answer.status_code for answer in answers} == {202}
        assert [ada.send().status_code for _ in range(3)] == [202, 202, 429]

    def test_a_repetition_is_answered_also_where_no_more_is_allowed(self, ada: Caller) -> None:
        headers = {"Accept": "application/json", "Idempotency-Key": "one"}
        first = ada.post("/api/stream-message", {"content": "hello"}, headers=headers)
        for _ in range(3):
            ada.send()
        again = ada.post("/api/stream-message", {"content": "hello"}, headers=headers)
        assert (again.status_code, again.get_json()) == (202, first.get_json())

    @pytest.mark.parametrize("call", ["continue", "retry"])
    def test_going_on_with_an_answer_is_counted_too(self, ada: Caller, world: World, call: str) -> None:
        sent = UUID(ada.send().get_json()["sessionId"])
        world.manager.terminate(sent, TerminationReason.USER)
        ada.send()
        ada.send()
        answer = ada.post(f"/api/streams/{sent}/{call}")
        problem(answer, 429, "rate_limited")

    def test_graphql_and_rest_count_together(self, ada: Caller) -> None:
        query = """mutation {streamMessage(input: {content: "hello"}) {sessionId}}"""
        answers = [ada.post("/graphql", {"query": query}).get_json() for _ in range(2)]
        assert all("errors" not in answer for answer in answers)
        assert [ada.send().status_code for _ in range(2)] == [202, 429]
        (error,) = ada.post("/graphql", {"query": query}).get_json()["errors"]
        assert error["extensions"]["code"] == "rate_limited"

    def test_looking_and_stopping_are_not_counted(self, ada: Caller) -> None:
        sent = ada.send().get_json()
        for _ in range(10):
            assert ada.get(f"/api/streams/{sent['sessionId']}").status_code == 200
            assert ada.terminate(sent["sessionId"]).status_code == 200
        assert ada.send().status_code == 202

    def test_by_default_it_is_two_a_second(self, app: APIFlask, world_with: MakeWorld) -> None:
        world = world_with()
        app.extensions["sluicegate"] = world.services
        assert world.settings.rate_limit == "120/minute"
        limits, ada = world.services.limits, user()
        for _ in range(120):
            limits.hit_messages(ada)
        refused(lambda: limits.hit_messages(ada))

    def test_without_redis_it_is_redis_that_is_missed(self, app: APIFlask, ada: Caller, world_with: MakeWorld) -> None:
        app.extensions["sluicegate"] = world_with(redis_url=CLOSED_REDIS, rate_limit="1/minute").services
        problem(ada.send(), 503, "unavailable")
        problem(ada.send(), 429, "rate_limited")


class TestSigningIn:
    @pytest.fixture
    def world(self, world_with: MakeWorld) -> World:
        return world_with(sign_in_rate_limit="3/minute")

    @staticmethod
    def try_from(caller: Caller, token: str, address: str = "192.0.2.1", **headers: str) -> TestResponse:
        form = {"token": token, "csrf_token": caller.csrf(SIGN_IN_PATH)}
        return caller.client.post(SIGN_IN_PATH, data=form, headers=headers, environ_overrides={"REMOTE_ADDR": address})

    def test_after_so_many_wrong_ones_even_a_right_one_has_to_wait(self, people: People) -> None:
        token = people("ada").token or ""
        browser = people.stranger()
        for _ in range(3):
            assert self.try_from(browser, "wrong").status_code == 401
        answer = self.try_from(browser, token)
        assert answer.status_code == 429
        assert 50 <= int(answer.headers["Retry-After"]) <= 61
        assert answer.mimetype == "text/html"
        assert "too many tries to sign in from your address" in answer.text
        assert 'role="alert"' in answer.text
        assert self.try_from(people.stranger(), token, address="192.0.2.2").status_code == 303

    def test_a_one_time_token_is_not_used_up_by_it(self, people: People, world: World) -> None:
        people("ada")
        token = world.services.accounts.make_sign_in_token("ada")
        for _ in range(3):
            self.try_from(people.stranger(), "wrong")
        assert self.try_from(people.stranger(), token).status_code == 429
        assert self.try_from(people.stranger(), token, address="192.0.2.2").status_code == 303

    def test_right_ones_are_not_held_against_anybody(self, people: People) -> None:
        token = people("ada").token or ""
        assert {self.try_from(people.stranger(), token).status_code for _ in range(10)} == {303}

    def test_a_form_from_elsewhere_uses_nobodys_tries_up(self, people: People) -> None:
        token = people("ada").token or ""
        for _ in range(10):
            assert people.stranger().client.post(SIGN_IN_PATH, data={"token": token}).status_code == 403
        assert self.try_from(people.stranger(), token, address="127.0.0.1").status_code == 303

    def test_a_claimed_address_does_not_count(self, people: People) -> None:
        for number in range(3):
            self.try_from(people.stranger(), "wrong", **{"X-Forwarded-For": f"198.51.100.{number}"})
        answer = self.try_from(people.stranger(), "wrong", **{"X-Forwarded-For": "198.51.100.9"})
        assert answer.status_code == 429

    def test_without_redis_the_page_works(self, app: APIFlask, people: People, world_with: MakeWorld) -> None:
        token = people("ada").token or ""
        app.extensions["sluicegate"] = world_with(redis_url=CLOSED_REDIS, sign_in_rate_limit="1/minute").services
        assert self.try_from(people.stranger(), token).status_code == 303
        assert self.try_from(people.stranger(), "wrong").status_code == 401
        assert self.try_from(people.stranger(), token).status_code == 429


class TestBehindProxies:
    @pytest.mark.parametrize(
        ("proxies", "seen"),
        [(0, "192.0.2.1"), (1, "198.51.100.3"), (2, "198.51.100.2")],
    )
    def test_as_many_entries_are_believed_as_there_are_proxies(self, tmp_path: Path, proxies: int, seen: str) -> None:
        database_url = f"sqlite:///{tmp_path / 'unused.db'}"
        with patch("webapp.app.configure_logs"):
            app = create_app(make_settings(database_url, CLOSED_REDIS, tmp_path, trusted_proxies=proxies))
        asked: list[str] = []
        limits = app.extensions["sluicegate"].limits
        with patch.object(limits, "hit_sign_in", asked.append), patch("webapp.auth.check_csrf"):
            app.test_client().post(
                SIGN_IN_PATH,
                headers={"X-Forwarded-For": "198.51.100.1, 198.51.100.2, 198.51.100.3"},
                environ_overrides={"REMOTE_ADDR": "192.0.2.1"},
            )
        assert asked == [seen]


class TestSettings:
    @pytest.mark.parametrize("rate", ["120/minute", "1/2 seconds", "5 per hour", "10/second;120/minute", "", " "])
    @pytest.mark.parametrize("variable", ["SLUICEGATE_RATE_LIMIT", "SLUICEGATE_SIGN_IN_RATE_LIMIT"])
    def test_a_rate_may_be(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str, rate: str) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv(variable, rate)
        load_settings()

    @pytest.mark.parametrize("rate", ["120", "fast", "120/fortnight", "0/minute", "-1/minute", "1.5/minute", ";"])
    @pytest.mark.parametrize("variable", ["SLUICEGATE_RATE_LIMIT", "SLUICEGATE_SIGN_IN_RATE_LIMIT"])
    def test_a_rate_may_not_be(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str, rate: str) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv(variable, rate)
        with pytest.raises(ConfigurationError, match=rf"^{variable}: must be a rate as 120/minute"):
            load_settings()
