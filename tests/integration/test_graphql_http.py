"""GraphQL's own side of HTTP: who may ask, in what form, how much at once, and what a defect looks like."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.parse import quote

import pytest
from apiflask import APIFlask

from tests.integration.api import Caller, People, problem
from tests.integration.conftest import MakeWorld
from tests.integration.graphql_api import Asker, refusal
from tests.integration.world import CLOSED_REDIS, World, make_settings
from webapp.app import create_app
from webapp.calls import Calls
from webapp.models import new_id

ME = "{me {name}}"
CREATE = "mutation {createConversation {id}}"


@pytest.fixture
def rest(people: People) -> Caller:
    return people("ada")


@pytest.fixture
def ada(rest: Caller) -> Asker:
    return Asker(rest)


def get(caller: Caller, query: str, **more: Any) -> Any:
    return caller.get(f"/graphql?query={quote(query)}", **more)


class TestWhoAsks:
    def test_nobody(self, people: People, world: World) -> None:
        stranger = people.stranger()
        for accept in ("*/*", "text/event-stream", "text/html"):
            headers = {"Accept": accept}
            for answer in (
                stranger.post("/graphql", {"query": CREATE}, headers=headers),
                stranger.post("/graphql", data=b"no JSON", headers=headers),
                get(stranger, ME, headers=headers),
                stranger.get("/graphql", headers=headers),
            ):
                problem(answer, 401, "unauthenticated")
                assert answer.headers["WWW-Authenticate"] == "Bearer"

    def test_a_cookie_needs_the_csrf_token(self, people: People, world: World) -> None:
        browser = people.stranger()
        world.services.accounts.ensure_user("ada")
        browser.sign_in(world.services.accounts.make_sign_in_token("ada"))
        for query in (ME, CREATE):
            problem(browser.post("/graphql", {"query": query}), 403, "csrf_failed")
        assert world.counts()["conversations"] == 0
        answer = browser.post("/graphql", {"query": CREATE}, headers={"X-CSRFToken": browser.csrf()})
        assert answer.get_json().keys() == {"data"}
        assert get(browser, ME).get_json() == {"data": {"me": {"name": "ada"}}}


class TestTheRequest:
    def test_only_json(self, rest: Caller) -> None:
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "application/graphql"):
            answer = rest.post("/graphql", data=json.dumps({"query": ME}), headers={"Content-Type": kind})
            problem(answer, 415, "unsupported_media_type")

    @pytest.mark.parametrize("body", [b"{", b"7", b'[{"query": "{me {name}}"}]', b"[" * 100_000, b'{"query": "\xff"}'])
    def test_only_an_object(self, rest: Caller, body: bytes) -> None:
        problem(rest.post("/graphql", data=body, headers={"Content-Type": "application/json"}), 400, "not_json")

    @pytest.mark.parametrize(
        ("body", "field"),
        [
            ({}, "query"),
            ({"query": "{me\ud800 {id}}"}, "query"),
            ({"query": 7}, "query"),
            ({"query": ""}, "query"),
            ({"query": ME, "variables": [1]}, "variables"),
        ],
    )
    def test_with_a_query_in_it(self, rest: Caller, body: dict[str, Any], field: str) -> None:
        problem(rest.post("/graphql", body), 422, "invalid", field)
        problem(rest.post("/graphql", body, headers={"Accept": "text/event-stream"}), 422, "invalid", field)

    def test_other_members_are_passed_over(self, rest: Caller) -> None:
        body = {"query": f"query A {ME} query B {{me {{id}}}}", "operationName": "A", "extensions": {"x": 1}, "id": 7}
        assert rest.post("/graphql", body).get_json() == {"data": {"me": {"name": "ada"}}}

    def test_an_operation_that_is_not_there(self, rest: Caller) -> None:
        body = {"query": f"query A {ME} query B {ME}", "operationName": "C"}
        problem(rest.post("/graphql", body), 400, "bad_request")
        streamed = rest.post("/graphql", body, headers={"Accept": "text/event-stream"})
        assert '"code":"bad_request"' in streamed.text

    def test_by_get_nothing_is_changed(self, rest: Caller, world: World) -> None:
        answer = get(rest, CREATE)
        problem(answer, 405, "method_not_allowed")
        assert answer.headers["Allow"] == "POST"
        assert "queries" in answer.get_json(force=True)["detail"]
        streamed = get(rest, CREATE, headers={"Accept": "text/event-stream"})
        assert '"code":"method_not_allowed"' in streamed.text
        assert world.counts()["conversations"] == 0

    def test_nor_by_head(self, rest: Caller, world: World) -> None:
        assert rest.call("HEAD", "/graphql", json={"query": CREATE}).status_code >= 400
        asked = f"/graphql?query={quote(CREATE)}"
        assert rest.call("HEAD", asked).status_code == 405
        assert world.counts()["conversations"] == 0

    def test_of_several_operations_one_must_be_named(self, rest: Caller, world: World) -> None:
        create = CREATE.removeprefix("mutation")
        two = {"query": f"mutation A {create} mutation B {create}"}
        (error,) = rest.post("/graphql", two).get_json()["errors"]
        assert error["extensions"]["code"] == "invalid"
        assert world.counts()["conversations"] == 0
        assert "errors" not in rest.post("/graphql", two | {"operationName": "B"}).get_json()
        assert world.counts()["conversations"] == 1

    def test_nested_lists_are_counted(self, rest: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("webapp.graphql.limits.NESTED_LIST_LIMIT", 4)
        for _ in range(3):
            rest.post("/api/conversations", {})
        once = "{conversations {items {messages {id}}}}"
        assert "errors" not in rest.post("/graphql", {"query": once}).get_json()
        twice = "{conversations {items {messages {id} members {name}}}}"
        errors = rest.post("/graphql", {"query": twice}).get_json()["errors"]
        assert {one["extensions"]["code"] for one in errors} == {"invalid"}

    def test_a_query_by_get(self, rest: Caller) -> None:
        query = "query A($n: Int) {conversations(limit: $n) {nextCursor}} query B {me {id}}"
        variables = quote(json.dumps({"n": 1}))
        answer = rest.get(f"/graphql?query={quote(query)}&operationName=A&variables={variables}")
        assert answer.get_json() == {"data": {"conversations": {"nextCursor": None}}}
        problem(rest.get(f"/graphql?query={quote(query)}&variables=x"), 400, "not_json")
        problem(rest.get(f"/graphql?query={quote(query)}&variables=[1]"), 422, "invalid", "variables")

    def test_other_methods(self, rest: Caller) -> None:
        for method in ("PUT", "DELETE", "PATCH"):
            problem(rest.call(method, "/graphql", json={"query": ME}), 405, "method_not_allowed")

    def test_a_subscription_must_be_asked_for_as_a_stream(self, rest: Caller) -> None:
        query = f'subscription {{streamEvents(sessionId: "{new_id()}") {{__typename}}}}'
        document = problem(rest.post("/graphql", {"query": query}), 400, "bad_request")
        assert "text/event-stream" in document["detail"]


class TestDocuments:
    @pytest.mark.parametrize(
        ("query", "code"),
        [
            ("{", "bad_request"),
            ("no", "bad_request"),
            ('{conversation(id: "\\uD800") {id}}', "bad_request"),
            ("{" * 900, "bad_request"),
            ("{a" * 330 + "}" * 330, "bad_request"),
            ("{nothing}", "invalid"),
            ("{me}", "invalid"),
            ("{...gone}", "invalid"),
            ("{conversation {id}}", "invalid"),
            ("query($id: ID!) {conversation(id: $id) {id}}", "invalid"),
            ("query($n: Int) {conversations(limit: $n) {nextCursor}}", "invalid"),
            ("query($x: ID = 7) {conversation(id: $x) {id}}", "invalid"),
            ("{me {...a}} fragment a on User {...b} fragment b on User {...a}", "invalid"),
        ],
    )
    def test_one_that_is_none(self, ada: Asker, query: str, code: str) -> None:
        with patch("webapp.graphql.failures.log.error") as logged:
            ada.refused(query, code, n="many", x=None)
        assert not logged.called  # for it is no defect of ours

    def test_where_it_is_wrong_is_told(self, ada: Asker) -> None:
        error = ada.refused("{me {name}\n nothing}", "invalid")
        assert error["locations"] == [{"line": 2, "column": 2}]
        assert error["extensions"] == {"code": "invalid", "status": 422, "errors": []}


class TestLimits:
    def test_depth(self, ada: Asker) -> None:
        deep = "{__typename}"
        for _ in range(9):
            deep = f"{{... on Query {deep}}}"  # a fragment is no level
        assert ada.ask(deep) == "Query"
        # Nothing of ours is so deep: what is not there is as deep as it says all the same.
        nested = "{a " * 12 + "{b}" + "}" * 12
        messages = [one["message"] for one in ada.post(nested).get_json()["errors"]]
        assert any("maximum operation depth of 10" in message for message in messages)

    def test_aliases(self, ada: Asker) -> None:
        aliases = [f"a{number}: me {{name}}" for number in range(16)]
        assert len(ada.ask(f"{{{' '.join(aliases[:15])}}}")) == 15
        error = ada.refused(f"{{{' '.join(aliases)}}}", "invalid")
        assert "16 aliases" in error["message"]

    def test_tokens(self, ada: Asker) -> None:
        assert ada.ask(f"{{me {{{'name ' * 100}}}}}")
        error = ada.refused(f"{{me {{{'name ' * 1000}}}}}", "bad_request")
        assert "1000 tokens" in error["message"]

    @pytest.mark.timeout(10)
    def test_fragments_that_double(self, ada: Asker) -> None:
        """Written out they would be 2^90 fields, which nobody must set out to count."""
        fragments = [f"fragment f{n} on User {{...f{n + 1} ...f{n + 1}}}" for n in range(90)]
        error = ada.refused(f"{{me {{...f0}}}} {' '.join(fragments)} fragment f90 on User {{id}}", "invalid")
        assert "fields" in error["message"]

    @pytest.mark.timeout(10)
    def test_fragments_that_all_spread_all_others(self, ada: Asker) -> None:
        names = range(20)
        fragments = [f"fragment f{n} on User {{{' '.join(f'...f{m}' for m in names if m != n)}}}" for n in names]
        errors = ada.post(f"{{me {{...f0}}}} {' '.join(fragments)}").get_json()["errors"]
        assert {error["extensions"]["code"] for error in errors} == {"invalid"}
        assert "itself" in errors[0]["message"]

    def test_introspection(self, ada: Asker) -> None:
        assert ada.ask("{__schema {queryType {name}}}") == {"queryType": {"name": "Query"}}
        assert "Did you mean 'me'" in ada.refused("{mee {id}}", "invalid")["message"]


class TestIntrospectionOff:
    @pytest.fixture
    def ada(self, people: People, world: World, tmp_path: Path) -> Asker:
        database_url = f"sqlite:///{tmp_path / 'unused.db'}"
        closed = make_settings(database_url, CLOSED_REDIS, tmp_path, graphql_introspection=False)
        with patch("webapp.app.configure_logs"):
            other = create_app(closed)
        other.extensions["sluicegate"] = world.services
        return Asker(Caller(other, people("ada").token))

    def test_nothing_is_told_of_the_schema(self, ada: Asker) -> None:
        for query in ("{__schema {queryType {name}}}", '{__type(name: "User") {name}}'):
            result = ada.post(query).get_json()
            assert result["data"] is None
            assert "disabled" in result["errors"][0]["message"]
        assert "Did you mean" not in ada.refused("{mee {id}}", "invalid")["message"]
        (streamed,) = ada.results("{mee {id}}")
        assert "Did you mean" not in refusal(streamed, "invalid")["message"]
        assert ada.ask("{__typename me {name}}") == {"__typename": "Query", "me": {"name": "ada"}}


class TestDefects:
    @pytest.fixture(autouse=True)
    def broken(self) -> Iterator[None]:
        with patch.object(Calls, "me", side_effect=LookupError("a secret of ours")):
            yield

    def test_they_are_logged_and_masked(self, ada: Asker) -> None:
        with patch("webapp.graphql.failures.log.error") as logged:
            error = ada.refused(ME, "internal")
            (streamed,) = ada.results(ME)
        assert refusal(streamed, "internal") == error
        assert "secret" not in json.dumps(error)
        assert (error["path"], error["extensions"]) == (["me"], {"code": "internal", "status": 500})
        assert [str(call.kwargs["exc_info"]) for call in logged.call_args_list] == ["a secret of ours"] * 2

    def test_a_value_that_does_not_fit_its_type_is_one(self, ada: Asker, world: World) -> None:
        user = world.services.accounts.list_users()[0]
        with (
            patch("webapp.graphql.failures.log.error") as logged,
            patch.object(Calls, "me", return_value=type(user)(**{**_fields(user), "operator": "perhaps"})),
        ):
            error = ada.refused("{me {operator}}", "internal")
        assert "perhaps" not in error["message"]
        assert logged.called


class TestThePage:
    def test_it_is_off(self, rest: Caller) -> None:
        problem(rest.get("/graphql", headers={"Accept": "text/html"}), 422, "invalid", "query")

    def test_it_runs_no_script_but_its_own(self, app: APIFlask, people: People, world_with: MakeWorld) -> None:
        world = world_with(graphql_ide=True)
        app.extensions["sluicegate"] = world.services
        browser = Caller(app)
        problem(browser.get("/graphql", headers={"Accept": "text/html"}), 401, "unauthenticated")
        world.services.accounts.ensure_user("ada")
        browser.sign_in(world.services.accounts.make_sign_in_token("ada"))
        page = browser.get("/graphql", headers={"Accept": "text/html,*/*;q=0.8"})
        assert (page.status_code, page.mimetype) == (200, "text/html")
        policy = page.headers["Content-Security-Policy"]
        (nonce,) = re.findall(r"'nonce-([^']+)'", policy)
        scripts = re.findall(r"<script([^>]*)>", page.text)
        assert len(scripts) == 4
        for script in scripts:
            assert f'nonce="{nonce}"' in script or ("https://unpkg.com/" in script and "integrity" in script)
        assert "unsafe-inline" not in policy.partition("style-src")[0]
        token = re.search(r'name="csrf-token" content="([^"]+)"', page.text)
        assert token
        answer = browser.post("/graphql", {"query": CREATE}, headers={"X-CSRFToken": token[1]})
        assert answer.get_json().keys() == {"data"}
        assert get(browser, ME, headers={"Accept": "text/html"}).get_json() == {"data": {"me": {"name": "ada"}}}


def _fields(view: Any) -> dict[str, Any]:
    return {name: getattr(view, name) for name in type(view).__dataclass_fields__}
