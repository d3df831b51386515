"""What schemathesis does before each of its calls; see `test_schema.py`."""

from __future__ import annotations

import uuid
from typing import Any
from urllib.parse import urlencode

import schemathesis

KEY = "Idempotency-Key"
QUERY_LIMIT_BYTES = 3500
"""A request line over 4094 bytes is refused by gunicorn itself, in HTML, before the application sees it."""


@schemathesis.hook
def filter_query(context: schemathesis.HookContext, query: Any) -> bool:
    """Whether a query is short enough for the application to see."""
    return not isinstance(query, dict) or len(urlencode(query, doseq=True, errors="replace")) < QUERY_LIMIT_BYTES


@schemathesis.hook
def before_call(context: schemathesis.HookContext, case: schemathesis.Case, kwargs: dict[str, Any]) -> None:
    """A key that was used before, with another body, is refused, and examples repeat themselves: each gets its own."""
    positive = case.meta is None or case.meta.generation.mode.is_positive
    if positive and KEY in case.headers:
        case.headers[KEY] = str(uuid.uuid4())


@schemathesis.check
def refuses_as_graphql_does(context: schemathesis.CheckContext, response: schemathesis.Response, case: Any) -> None:
    """A refusal is an error with one of our codes, in an answer of GraphQL's form; `internal` is a fault of ours."""
    assert response.status_code in (200, 400), f"status {response.status_code}"
    errors = response.json().get("errors", [])
    codes = [error.get("extensions", {}).get("code") for error in errors]
    assert None not in codes, f"an error without a code: {errors}"
    assert "internal" not in codes, f"a fault of ours: {errors}"
