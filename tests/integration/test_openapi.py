"""What the API says of itself, as tools take it; and the headers that keep its answers what they are."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from apiflask import APIFlask
from schemathesis.core.result import Ok

from tests.integration.api import Caller, People, problem
from tests.integration.world import World

NOT_PUBLISHED = {"openapi.spec", "static"}
POLICY = "default-src 'none'; frame-ancestors 'none'"


@pytest.fixture
def document(people: People) -> dict[str, Any]:
    answer = people.stranger().get("/openapi.json")
    assert answer.status_code == 200
    found: dict[str, Any] = answer.get_json()
    return found


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        yield from ((method.upper(), path, operation) for method, operation in methods.items())


class TestTheDocument:
    def test_a_tool_takes_all_of_it(self, document: dict[str, Any]) -> None:
        schema = schemathesis.openapi.from_dict(document)
        assert schema.specification.version == "3.1.0"
        found = list(schema.get_all_operations())
        assert [one for one in found if not isinstance(one, Ok)] == []
        assert len(found) == len(list(operations(document)))
        for one in found:
            assert one.ok().as_strategy() is not None

    def test_every_call_of_rest_is_there(self, app: APIFlask, document: dict[str, Any]) -> None:
        published = {
            (method, re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule))
            for rule in app.url_map.iter_rules()
            if rule.endpoint.split(".")[0] in ("conversations", "streams", "operations", "system")
            for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
        }
        assert {(method, path) for method, path, _ in operations(document)} == published

    def test_each_says_what_it_does_and_how_it_refuses(self, document: dict[str, Any]) -> None:
        for method, path, operation in operations(document):
            named = f"{method} {path}"
            assert operation["summary"], named
            refusals = {int(status) for status in operation["responses"] if status >= "400"}
            if not path.startswith("/api"):
                assert operation["security"] == [], named
                continue
            assert refusals >= {401, 422, 503}, named
            assert ("{" not in path) or 404 in refusals, named
            if method in ("POST", "PUT", "PATCH"):
                assert refusals >= {400, 403, 413, 415}, named
            for status in refusals:
                content = operation["responses"][str(status)]["content"]
                assert content == {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}, (
                    named
                )

    def test_each_success_has_a_form(self, document: dict[str, Any]) -> None:
        for method, path, operation in operations(document):
            for status, response in operation["responses"].items():
                if path.startswith("/api") and status in ("200", "201", "202"):
                    schemas = [one["schema"] for one in response["content"].values()]
                    assert all(schemas), f"{method} {path} {status}"
                    assert schemas, f"{method} {path} {status}"

    @pytest.mark.parametrize(
        ("method", "path", "required"),
        [
            ("post", "/api/stream-message", True),
            ("post", "/api/terminate-stream", True),
            ("post", "/api/conversations", False),
            ("patch", "/api/conversations/{conversation_id}", True),
            ("put", "/api/conversations/{conversation_id}/members/{name}", True),
        ],
    )
    def test_bodies_are_described(self, document: dict[str, Any], method: str, path: str, required: bool) -> None:
        body = document["paths"][path][method]["requestBody"]
        assert body["required"] is required
        assert list(body["content"]) == ["application/json"]

    def test_headers_are_described(self, document: dict[str, Any]) -> None:
        def names(method: str, path: str) -> set[str]:
            return {one["name"] for one in document["paths"][path][method]["parameters"]}

        assert "Idempotency-Key" in names("post", "/api/stream-message")
        assert "Idempotency-Key" in names("post", "/api/streams/{session_id}/retry")
        assert {"Last-Event-ID", "lastEventId"} <= names("get", "/api/streams/{session_id}/events")

    def test_a_token_is_what_is_asked_for(self, document: dict[str, Any]) -> None:
        assert document["security"] == [{"bearer": []}]
        assert document["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"

    def test_it_names_no_server_but_whichever_serves_it(self, document: dict[str, Any]) -> None:
        assert [one["url"] for one in document["servers"]] == ["/"]

    def test_answers_are_as_described(self, people: People, world: World, document: dict[str, Any]) -> None:
        schema = schemathesis.openapi.from_dict(document)
        ada = people("ada")
        sent = ada.send()
        chat, stream = sent.get_json()["conversationId"], sent.get_json()["sessionId"]
        made = ada.post("/api/conversations", {"title": "mine"})
        answers = {
            ("/api/stream-message", "POST"): sent,
            ("/api/conversations", "POST"): made,
            ("/api/conversations", "GET"): ada.get("/api/conversations"),
            ("/api/conversations/{conversation_id}", "GET"): ada.get(f"/api/conversations/{chat}"),
            ("/api/conversations/{conversation_id}/messages", "GET"): ada.get(f"/api/conversations/{chat}/messages"),
            ("/api/conversations/{conversation_id}/members", "GET"): ada.get(f"/api/conversations/{chat}/members"),
            ("/api/streams", "GET"): ada.get("/api/streams"),
            ("/api/streams/{session_id}", "GET"): ada.get(f"/api/streams/{stream}"),
            ("/api/terminate-stream", "POST"): ada.terminate(stream),
            ("/api/streams/{session_id}/retry", "POST"): ada.post(f"/api/streams/{stream}/retry"),
        }
        for (path, method), answer in answers.items():
            assert answer.status_code < 300, answer.text
            schema[path][method].validate_response(schemathesis.Response.from_any(answer))


class TestHeaders:
    PATHS = ("/api/conversations", "/api/nothing", "/healthz", "/openapi.json", "/api/stream-message")

    def test_no_answer_of_the_api_can_pass_for_a_page(self, people: People) -> None:
        for caller in (people("ada"), people.stranger()):
            for path in self.PATHS:
                answer = caller.get(path)
                assert answer.mimetype in ("application/json", "application/problem+json"), path
                assert answer.headers["Content-Security-Policy"] == POLICY, path
                assert answer.headers["X-Content-Type-Options"] == "nosniff", path

    def test_nor_can_a_stream(self, people: People, world: World) -> None:
        ada = people("ada")
        worker = world.run()
        worker.end()
        answer = ada.get(f"/api/streams/{worker.session_id}/events")
        assert answer.mimetype == "text/event-stream"
        assert answer.headers["Content-Security-Policy"] == POLICY
        assert answer.headers["X-Content-Type-Options"] == "nosniff"

    def test_a_page_keeps_its_own_policy(self, people: People) -> None:
        for path in ("/sign-in", "/docs"):
            answer = people.stranger().get(path)
            policy = answer.headers["Content-Security-Policy"]
            assert "script-src 'self'" in policy, path
            assert "unsafe" not in policy, path
            assert answer.headers["X-Content-Type-Options"] == "nosniff", path


class TestThePage:
    def test_all_that_it_loads_is_ours(self, people: People) -> None:
        stranger: Caller = people.stranger()
        page = stranger.get("/docs")
        assert page.status_code == 200
        assert "<script>" not in page.text
        links = re.findall(r'(?:src|href|data-document)="([^"]+)"', page.text)
        assert len(links) >= 5
        for link in links:
            assert link.startswith("/"), link
            assert stranger.get(link).status_code == 200, link

    def test_nothing_else_is_served_beside_it(self, people: People) -> None:
        for name in ("index.html", "oauth2-redirect.html", "../__init__.py", "%2e%2e/flask_swagger_ui.py"):
            problem(people.stranger().get(f"/docs/{name}"), 404, "not_found")
