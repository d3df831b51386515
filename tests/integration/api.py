"""The HTTP API as a test sees it: one caller, with a token, a cookie or neither."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from flask import Flask
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from tests.integration.world import World
from webapp.models import Role

PROBLEM_MEMBERS = {"type", "title", "status", "detail", "code"}
CSRF = re.compile(r'name="csrf[-_]token" (?:content|value)="([^"]+)"')


class Caller:
    """Somebody who calls the API."""

    def __init__(self, app: Flask, token: str | None = None) -> None:
        self.client: FlaskClient = app.test_client()
        self.token = token

    def call(self, method: str, path: str, **more: Any) -> TestResponse:
        """One request; `headers` win over the token."""
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        return self.client.open(path, method=method, headers=headers | more.pop("headers", {}), **more)

    def get(self, path: str, **more: Any) -> TestResponse:
        return self.call("GET", path, **more)

    def post(self, path: str, body: Any = None, **more: Any) -> TestResponse:
        """A POST of JSON, unless `data` says otherwise."""
        return self.call("POST", path, **(more if "data" in more else {"json": body} | more))

    def send(self, content: str = "hello", **more: Any) -> TestResponse:
        """A message whose answer is to be followed elsewhere."""
        return self.post("/api/stream-message", {"content": content, **more}, headers={"Accept": "application/json"})

    def terminate(self, session_id: UUID | str, **more: Any) -> TestResponse:
        return self.post("/api/terminate-stream", {"sessionId": str(session_id), **more})

    def sign_in(self, token: str) -> TestResponse:
        """By the page's form, as a browser does."""
        csrf = self.csrf("/sign-in")
        return self.client.post("/sign-in", data={"token": token, "csrf_token": csrf})

    def csrf(self, page: str = "/") -> str:
        """The CSRF token that a page carries."""
        found = CSRF.search(self.client.get(page).text)
        assert found, f"{page} has no CSRF token"
        return found[1]


@dataclass
class People:
    """Makes callers with tokens of their own."""

    app: Flask
    world: World

    def __call__(self, name: str) -> Caller:
        return Caller(self.app, self.world.services.accounts.create_user(name))

    def stranger(self) -> Caller:
        """Nobody that is known."""
        return Caller(self.app)

    def member(self, conversation_id: UUID, name: str, role: Role) -> Caller:
        caller = self(name)
        self.world.join(conversation_id, name, role)
        return caller


def problem(response: TestResponse, status: int, code: str, field: str | None = None) -> dict[str, Any]:
    """The problem document of an answer, which is one in every respect."""
    assert response.status_code == status, response.text
    assert response.mimetype == "application/problem+json"
    document: dict[str, Any] = response.get_json(force=True)
    assert document.keys() >= PROBLEM_MEMBERS
    assert (document["status"], document["code"], document["type"]) == (status, code, f"urn:sluicegate:error:{code}")
    assert document["title"]
    assert document["detail"]
    assert "Traceback" not in response.text
    if field is not None:
        assert [one for one in document["errors"] if one["field"] == field and one["message"]], document["errors"]
    return document
