"""Errors as RFC 9457 problem documents: the same form whatever failed, and never a stack trace."""

from __future__ import annotations

from typing import Any, Final

import orjson
import structlog
from apiflask.exceptions import HTTPError
from flask import Flask, Response
from redis.exceptions import RedisError
from werkzeug.exceptions import HTTPException

from webapp import errors
from webapp.errors import SluicegateError

log = structlog.get_logger(__name__)

_BY_STATUS: Final[dict[int, type[SluicegateError]]] = {
    400: errors.BadRequest,
    401: errors.Unauthenticated,
    403: errors.Forbidden,
    404: errors.NotFound,
    405: errors.MethodNotAllowed,
    409: errors.Conflict,
    413: errors.TooLarge,
    415: errors.UnsupportedMediaType,
    422: errors.Invalid,
    429: errors.TooManyRequests,
    503: errors.Unavailable,
}


def problem(error: SluicegateError) -> Response:
    """The response for an error."""
    document: dict[str, Any] = {
        "type": f"urn:sluicegate:error:{error.code}",
        "title": error.title,
        "status": error.status,
        "detail": error.detail,
        "code": error.code,
        **{name: value for name, value in error.extra.items() if value is not None},
    }
    response = Response(orjson.dumps(document), error.status, content_type="application/problem+json")
    if error.retry_after_seconds is not None:
        response.headers["Retry-After"] = str(error.retry_after_seconds)
    if error.status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


def configure_problems(app: Flask) -> None:
    """Answer every error of the application with a problem document."""
    app.register_error_handler(SluicegateError, problem)
    app.register_error_handler(HTTPError, lambda error: problem(_invalid(error)))
    app.register_error_handler(HTTPException, _http)
    app.register_error_handler(RedisError, lambda _: problem(errors.Unavailable("Redis cannot be reached; try again")))
    app.register_error_handler(Exception, _unexpected)


def _invalid(error: HTTPError) -> SluicegateError:
    """APIFlask's word for a request that did not validate: `{location: {field: [messages]}}`."""
    if error.status_code != 422:
        return _BY_STATUS.get(error.status_code, errors.BadRequest)(error.message)
    found = [
        {"field": field, "message": str(message).removeprefix("Value error, ")}
        for fields in dict(error.detail).values()
        for field, messages in fields.items()
        for message in messages
    ]
    named = "; ".join(f"{one['field']}: {one['message']}" for one in found)
    return errors.Invalid(named or error.message, errors=found)


def _http(error: HTTPException) -> Response:
    """What Flask itself raises: no such route, a body too large, a body that is not JSON."""
    if error.code is not None and error.code < 400:
        return error.get_response()  # type: ignore[return-value]
    kind = _BY_STATUS.get(error.code or 500, SluicegateError)
    response = problem(kind(error.description))
    if error.code == 405:
        response.headers["Allow"] = dict(error.get_headers()).get("Allow", "")
    return response


def _unexpected(error: Exception) -> Response:
    log.exception("request.failed", exc_info=error)
    return problem(SluicegateError("Something went wrong on our side; it has been logged"))
