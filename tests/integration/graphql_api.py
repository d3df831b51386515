"""GraphQL as a test asks it: through a caller of the API, over JSON or as a stream of results."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from werkzeug.test import TestResponse

from tests.integration.api import Caller

LEAVES = {"SCALAR", "ENUM"}
FIELDS = """query($name: String!) {__type(name: $name) {fields {name type {
  kind ofType {kind ofType {kind ofType {kind}}}}}}}"""


class Asker:
    """Somebody who asks GraphQL."""

    def __init__(self, caller: Caller) -> None:
        self.caller = caller

    def post(self, query: str, headers: dict[str, str] | None = None, **variables: Any) -> TestResponse:
        """The response to one operation, in which `*TYPE` stands for all fields of a type that are no objects."""
        query = re.sub(r"\*(\w+)", lambda found: self._leaves(found[1]), query)
        return self.caller.post("/graphql", {"query": query, "variables": variables}, headers=headers or {})

    def ask(self, query: str, headers: dict[str, str] | None = None, **variables: Any) -> Any:
        """The data, where nothing is wrong; that of the only field, where there is one."""
        response = self.post(query, headers, **variables)
        assert response.status_code == 200, response.text
        assert response.mimetype == "application/json"
        result = response.get_json()
        assert result.keys() == {"data"}, result
        data = result["data"]
        return next(iter(data.values())) if len(data) == 1 else data

    def refused(self, query: str, code: str, field: str | None = None, **variables: Any) -> dict[str, Any]:
        """The error of an operation that is answered with one."""
        response = self.post(query, **variables)
        assert response.status_code == 200, response.text
        return refusal(response.get_json(), code, field)

    def _leaves(self, name: str) -> str:
        fields = self.ask(FIELDS, name=name)["fields"]
        return " ".join(one["name"] for one in fields if _innermost(one["type"]) in LEAVES)

    def results(self, query: str, **variables: Any) -> list[Any]:
        """What a stream of results holds, which is complete: each result's data, or all of it if there are errors."""
        events = list(frames(self.stream(query, **variables)))
        assert events[-1] == ("complete", None)
        assert {name for name, _ in events[:-1]} <= {"next"}
        return [result if "errors" in result else result["data"] for _, result in events[:-1]]

    def stream(self, query: str, **variables: Any) -> TestResponse:
        """The response to one operation, as a stream of results."""
        response = self.post(query, {"Accept": "text/event-stream"}, **variables)
        assert (response.status_code, response.mimetype) == (200, "text/event-stream"), response.text
        return response


def refusal(result: dict[str, Any], code: str, field: str | None = None) -> dict[str, Any]:
    """The only error of a result, which is one in every respect."""
    (error,) = result["errors"]
    assert error["extensions"]["code"] == code, error
    assert error["extensions"]["status"] >= 400
    assert error["message"]
    assert "Traceback" not in json.dumps(result)
    if field is not None:
        assert [one for one in error["extensions"]["errors"] if one["field"] == field and one["message"]], error
    found: dict[str, Any] = error
    return found


def frames(response: TestResponse) -> Iterator[tuple[str, Any]]:
    """The events of graphql-sse: name, and the result that it carries."""
    for block in response.text.split("\n\n"):
        fields = dict(line.split(":", 1) for line in block.split("\n") if line and not line.startswith(":"))
        if "event" in fields:
            yield fields["event"].strip(), json.loads(fields["data"]) if fields["data"].strip() else None


def _innermost(kind: dict[str, Any]) -> str:
    while kind.get("ofType"):
        kind = kind["ofType"]
    return str(kind["kind"])
