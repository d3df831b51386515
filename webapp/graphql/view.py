"""GraphQL over HTTP: JSON, or server-sent events in the form of graphql-sse, with one connection an operation."""

from __future__ import annotations

import json
import secrets
from collections.abc import Generator, Iterator
from typing import Any, Final

import strawberry
from apiflask import APIBlueprint
from flask import Response, current_app, render_template, request
from pydantic import BaseModel, ConfigDict, Field
from strawberry.schema.exceptions import CannotGetOperationTypeError, InvalidOperationTypeError
from strawberry.types.graphql import OperationType
from werkzeug.exceptions import MethodNotAllowed

from webapp import auth
from webapp.errors import NotJSON
from webapp.graphql.events import Connection
from webapp.graphql.failures import formatted, known
from webapp.graphql.inputs import validated
from webapp.graphql.stepping import SILENCE, stepped
from webapp.readers import event_stream
from webapp.schemas import require_json
from webapp.streams.events import COMMENT

SCHEMA: Final = "sluicegate.graphql"
"""Where an application keeps its schema, which depends on its settings."""
COMPLETE: Final = b"event: complete\ndata:\n\n"

graphql = APIBlueprint("graphql", __name__, template_folder="templates", enable_openapi=False)


class GraphQLRequest(BaseModel):
    """What every client of GraphQL sends."""

    model_config = ConfigDict(extra="ignore")
    query: str = Field(min_length=1)
    variables: dict[str, Any] | None = None
    operation_name: str | None = Field(None, alias="operationName")


@graphql.before_request
def require_user() -> None:
    """Nothing is said to somebody unknown, and nothing changed by a cookie without its CSRF token."""
    auth.require_user()
    require_json()


@graphql.route("/graphql", methods=["GET", "POST"])
def answer() -> Response:
    """Answer one operation."""
    if _wants_page():
        return _page()
    asked = validated(GraphQLRequest, _body() if request.method == "POST" else _parameters())
    if request.accept_mimetypes.best_match(["application/json", "text/event-stream"]) == "text/event-stream":
        return _streamed(asked)
    return _executed(asked)


def _executed(asked: GraphQLRequest) -> Response:
    """The result as JSON: 200, whatever became of the operation."""
    try:
        result = _schema().execute_sync(
            asked.query,
            asked.variables,
            Connection(),
            operation_name=asked.operation_name,
            allowed_operation_types=_allowed(),
        )
    except (CannotGetOperationTypeError, InvalidOperationTypeError) as error:
        told = known(error)
        if told is not None and told.status == 405:
            raise MethodNotAllowed(["POST"], told.detail) from None
        raise told or error from None
    return Response(_encoded(result), content_type="application/json")


def _streamed(asked: GraphQLRequest) -> Response:
    """Each result as `next`, then `complete`. Errors are results too: an EventSource shows nobody any other."""
    connection = Connection()
    results = stepped(
        _schema().stream(
            asked.query,
            asked.variables,
            connection,
            operation_name=asked.operation_name,
            allowed_operation_types={*_allowed(), OperationType.SUBSCRIPTION},
        )
    )
    # Here, where it is known who asks: what follows is sent when this request is over.
    first = list(_until_first_result(results))
    return event_stream(_frames(first, results, connection), connection.close, connection.session)


def _until_first_result(results: Iterator[Any]) -> Iterator[Any]:
    for said in results:
        yield said
        if said is not SILENCE:
            return


def _frames(first: list[Any], rest: Generator[Any, None, None], connection: Connection) -> Iterator[bytes]:
    try:
        for said in first:
            yield _frame(said)
        for said in rest:
            yield _frame(said)
        if connection.complete:
            yield COMPLETE
    finally:
        rest.close()


def _frame(said: Any) -> bytes:
    return COMMENT if said is SILENCE else b"event: next\ndata: %s\n\n" % _encoded(said)


def _encoded(result: Any) -> bytes:
    errors = [formatted(error) for error in result.errors or ()]
    told = {"data": result.data, "errors": errors} if errors else {"data": result.data}
    # A lone surrogate, which a client may have sent and a message may repeat, has no UTF-8.
    return json.dumps(told, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def _schema() -> strawberry.Schema:
    schema: strawberry.Schema = current_app.extensions[SCHEMA]
    return schema


def _allowed() -> set[OperationType]:
    """By GET nothing is changed: a link must not, and a cookie alone may be sent with it."""
    return {OperationType.QUERY, OperationType.MUTATION} if request.method == "POST" else {OperationType.QUERY}


def _body() -> dict[str, Any]:
    body: dict[str, Any] = request.get_json(force=True)
    return body


def _parameters() -> dict[str, Any]:
    """Raises `NotJSON` where the variables are none."""
    parameters: dict[str, Any] = request.args.to_dict()
    if variables := parameters.pop("variables", ""):
        try:
            parameters["variables"] = json.loads(variables)
        except (ValueError, RecursionError):
            raise NotJSON("variables: not JSON; send a JSON object") from None
    return parameters


# -- a page for trying it out ----------------------------------------------------------------------


def _wants_page() -> bool:
    if request.method == "POST" or "query" in request.args:
        return False
    asks = request.accept_mimetypes.best_match(["application/json", "text/event-stream", "text/html"]) == "text/html"
    return asks and bool(current_app.extensions["sluicegate"].settings.graphql_ide)


def _page() -> Response:
    """GraphiQL, from a public CDN; a script of ours is known by its nonce."""
    nonce = secrets.token_urlsafe(16)
    response = Response(render_template("graphql/graphiql.html", nonce=nonce), content_type="text/html; charset=utf-8")
    response.headers["Content-Security-Policy"] = "; ".join(
        (
            "default-src 'none'",
            f"script-src 'nonce-{nonce}' https://unpkg.com",
            "style-src 'unsafe-inline' https://unpkg.com",  # its editor writes styles into the page
            "img-src 'self' data:",
            "font-src data: https://unpkg.com",
            "connect-src 'self'",
            "frame-ancestors 'none'",
            "base-uri 'none'",
        )
    )
    response.headers.update(
        {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store"}
    )
    return response
