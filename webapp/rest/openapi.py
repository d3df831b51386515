"""What APIFlask cannot derive of the OpenAPI document: responses, from the frozen views; headers; who may call."""

from __future__ import annotations

from collections.abc import Iterator
from http import HTTPStatus
from typing import Any, Final

from apiflask import APIFlask
from pydantic import TypeAdapter

from webapp.calls import KEY_LIMIT_CHARACTERS
from webapp.config import Settings
from webapp.views import View, camel_case

_PROBLEM: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["type", "title", "status", "detail", "code"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "code": {"type": "string", "description": "stable, to decide by"},
        "errors": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["field", "message"],
                "properties": {"field": {"type": "string"}, "message": {"type": "string"}},
            },
        },
    },
}
_PROBLEM_REFERENCE: Final = {"$ref": "#/components/schemas/Problem"}
_DESCRIPTION: Final = """Stop-anywhere streaming of a language model's answers.

The events of a stream, what a position is, and when to try again: see `docs/protocol.md` of the project.
"""

EVENT_STREAM: Final[dict[str, Any]] = {
    "description": "The stream, as server-sent events; see docs/protocol.md",
    # The schema of each event: of the text as a whole there is nothing to say, and tools take it so.
    "content": {
        "text/event-stream": {
            "schema": {
                "type": "object",
                "required": ["data"],
                "properties": {
                    "event": {"type": "string", "enum": ["stream", "session", "phase", "thinking", "message", "done"]},
                    "id": {"type": "string"},
                    "retry": {"type": "integer"},
                    "data": {"type": "string"},
                },
            }
        }
    },
}


def configure_openapi(app: APIFlask, settings: Settings) -> None:
    """What holds for the document as a whole."""
    app.config.update(
        OPENAPI_VERSION="3.1.0",
        DESCRIPTION=_DESCRIPTION,
        # Ours are problem documents, and each call names those that it answers with.
        AUTO_404_RESPONSE=False,
        AUTO_VALIDATION_ERROR_RESPONSE=False,
    )
    app.servers = [{"url": "/", "description": "this server"}]
    app.security_schemes = {"bearer": {"type": "http", "scheme": "bearer", "description": "your API token"}}
    app.spec_processor(lambda document: document if isinstance(document, str) else _complete(document, settings))


def _complete(document: dict[str, Any], settings: Settings) -> dict[str, Any]:
    document["components"].setdefault("schemas", {})["Problem"] = _PROBLEM
    document["security"] = [{"bearer": []}]
    _limit(document["components"]["schemas"], settings)
    for path, method, operation in _operations(document):
        if "System" in operation.get("tags", ()):
            operation["security"] = []
        operation["parameters"] = [*operation.get("parameters", ()), *_HEADERS.get((method, path), ())]
        _say_what_ids_are(operation)
        _link(operation["responses"], method, path)
        if body := operation.get("requestBody"):
            body["required"] = _has_required(document, body)
    return document


def _limit(schemas: dict[str, Any], settings: Settings) -> None:
    """The bounds that are settings, and so not in the models."""
    schemas["NewMessageBody"]["properties"]["content"]["maxLength"] = settings.message_limit_characters
    for seconds in schemas["NewMessageBody.TimeoutsBody"]["properties"].values():
        seconds["anyOf"][0]["maximum"] = settings.request_timeout_cap_seconds


def _say_what_ids_are(operation: dict[str, Any]) -> None:
    """The path's converters do not say it by themselves."""
    for parameter in operation["parameters"]:
        if parameter["in"] == "path" and parameter["name"].endswith("_id"):
            parameter["schema"]["format"] = "uuid"


def _link(responses: dict[str, Any], method: str, path: str) -> None:
    """From what makes a session to what may be asked of it, so that a tool can go there."""
    for status in ("200", "202") if (method, path) in _BEGINS else ():
        if status in responses:
            responses[status]["links"] = _LINKS


def _operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if method != "parameters":
                yield path, method, operation


def _has_required(document: dict[str, Any], body: dict[str, Any]) -> bool:
    """Whether some member must be there, so that a body must."""
    name = body["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
    return bool(document["components"]["schemas"][name].get("required"))


def _parameter(name: str, place: str, description: str, **schema: Any) -> dict[str, Any]:
    schema = {"type": "string"} | schema
    return {"name": name, "in": place, "required": False, "description": description, "schema": schema}


_KEY: Final = _parameter(
    "Idempotency-Key",
    "header",
    "1 to 255 characters of your own: a repetition with the same gets the first's session",
    maxLength=KEY_LIMIT_CHARACTERS,
    pattern="^[!-~]([ -~]*[!-~])?$",
)
_HEADERS: Final = {
    ("post", "/api/stream-message"): [_KEY],
    ("post", "/api/streams/{session_id}/continue"): [_KEY],
    ("post", "/api/streams/{session_id}/retry"): [_KEY],
    ("get", "/api/streams/{session_id}/events"): [
        _parameter("Last-Event-ID", "header", "the last `id` that you have had; it goes before the query's"),
        _parameter("lastEventId", "query", "the same"),
    ],
}


_SESSION_HEADER: Final = "$response.header.X-Stream-Session-Id"
_BEGINS: Final = frozenset(
    ("post", path)
    for path in ("/api/stream-message", "/api/streams/{session_id}/continue", "/api/streams/{session_id}/retry")
)
_LINKS: Final[dict[str, Any]] = {
    name: {
        "operationRef": f"#/paths/{path.replace('/', '~1')}/{method}",
        "parameters": {"path.session_id": _SESSION_HEADER},
    }
    for name, method, path in (
        ("stream", "get", "/api/streams/{session_id}"),
        ("events", "get", "/api/streams/{session_id}/events"),
        ("continue", "post", "/api/streams/{session_id}/continue"),
        ("retry", "post", "/api/streams/{session_id}/retry"),
    )
} | {
    "terminate": {
        "operationRef": "#/paths/~1api~1terminate-stream/post",
        "requestBody": {"sessionId": _SESSION_HEADER},
    }
}


def problems(*statuses: int) -> dict[int, Any]:
    """Responses that are problem documents (RFC 9457)."""
    return {
        status: {
            "description": HTTPStatus(status).phrase,
            "content": {"application/problem+json": {"schema": _PROBLEM_REFERENCE}},
        }
        for status in sorted({*statuses, 422, 503})
    }


def described(
    view: type[View],
    description: str,
    *,
    page: bool = False,
    only: tuple[str, ...] = (),
    more: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A response that is a view, or some of its members, or `{items}` of views; with `more` properties."""
    properties = schema_of(view)["properties"]
    if page:
        properties = {"items": {"type": "array", "items": schema_of(view)}}
    elif only:
        properties = {name: properties[name] for name in only}
    properties |= more or {}
    schema = {"type": "object", "properties": properties, "required": [*properties]}
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def schema_of(view: type[View]) -> dict[str, Any]:
    """The JSON Schema of a view."""
    schema = TypeAdapter(view).json_schema()
    camel: dict[str, Any] = _camel(_inline(schema, schema.get("$defs", {})))
    return camel


def _inline(schema: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(schema, list):
        return [_inline(one, definitions) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if reference := schema.get("$ref"):
        return _inline(definitions[reference.rpartition("/")[2]], definitions)
    return {name: _inline(value, definitions) for name, value in schema.items() if name not in ("$defs", "title")}


def _camel(schema: Any) -> Any:
    """Members as JSON spells them, also those of views within views."""
    if isinstance(schema, list):
        return [_camel(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    camel = {name: _camel(value) for name, value in schema.items()}
    if "properties" in schema:
        camel["properties"] = {camel_case(name): _camel(value) for name, value in schema["properties"].items()}
        camel["required"] = [camel_case(name) for name in schema["required"]]
    return camel
