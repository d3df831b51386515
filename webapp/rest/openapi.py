"""Parts of the OpenAPI document that APIFlask cannot derive: responses, from the frozen views."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any, Final

from pydantic import TypeAdapter

from webapp.views import View, camel_case

_PROBLEM: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["type", "title", "status", "detail", "code"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "code": {"type": "string"},
    },
}

EVENT_STREAM: Final[dict[str, Any]] = {
    "description": "The stream, as server-sent events; see docs/protocol.md",
    "content": {"text/event-stream": {"schema": {"type": "string"}}},
}


def problems(*statuses: int) -> dict[int, Any]:
    """Responses that are problem documents (RFC 9457)."""
    return {
        status: {
            "description": HTTPStatus(status).phrase,
            "content": {"application/problem+json": {"schema": _PROBLEM}},
        }
        for status in (*statuses, 422)
    }


def described(view: type[View], description: str, *, page: bool = False) -> dict[str, Any]:
    """A response that is a view, or `{items}` of them."""
    schema = TypeAdapter(view).json_schema()
    inlined = _camel(_inline(schema, schema.get("$defs", {})))
    if page:
        inlined = {
            "type": "object",
            "properties": {"items": {"type": "array", "items": inlined}},
            "required": ["items"],
        }
    return {"description": description, "content": {"application/json": {"schema": inlined}}}


def _inline(schema: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(schema, list):
        return [_inline(one, definitions) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if reference := schema.get("$ref"):
        return _inline(definitions[reference.rpartition("/")[2]], definitions)
    return {name: _inline(value, definitions) for name, value in schema.items() if name not in ("$defs", "title")}


def _camel(schema: dict[str, Any]) -> dict[str, Any]:
    properties = {camel_case(name): value for name, value in schema["properties"].items()}
    return schema | {"properties": properties, "required": [camel_case(name) for name in schema["required"]]}
