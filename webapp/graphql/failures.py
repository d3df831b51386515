"""Errors as GraphQL tells them: the same codes as REST's, and never a stack trace."""

from __future__ import annotations

from typing import Any

import structlog
from graphql import GraphQLError, GraphQLSyntaxError
from redis.exceptions import RedisError
from strawberry.schema.exceptions import CannotGetOperationTypeError, InvalidOperationTypeError
from strawberry.types.graphql import OperationType

from webapp.errors import BadRequest, Invalid, MethodNotAllowed, SluicegateError, Unavailable

log = structlog.get_logger(__name__)


def formatted(error: GraphQLError) -> dict[str, Any]:
    """An entry of `errors`: `message`, `locations`, `path`, and `extensions` with what a problem document has."""
    told = _told(error)
    extensions = {
        "code": told.code,
        "status": told.status,
        "retryAfterSeconds": told.retry_after_seconds,
        **told.extra,
    }
    entry = {
        "message": told.detail,
        "locations": [location.formatted for location in error.locations or ()] or None,
        "path": error.path,
        "extensions": {name: value for name, value in extensions.items() if value is not None},
    }
    return {name: value for name, value in entry.items() if value is not None}


def known(error: Exception) -> SluicegateError | None:
    """What a caller is told of an exception; None: nothing, for it is a defect of ours."""
    match error:
        case SluicegateError():
            return error
        case RedisError():
            return Unavailable("Redis cannot be reached; try again")
        case RecursionError():
            return BadRequest("The document is nested too deeply")
        case CannotGetOperationTypeError():
            return BadRequest("operationName must name one of the document's operations")
        case InvalidOperationTypeError(operation_type=OperationType.SUBSCRIPTION):
            return BadRequest("A subscription is a stream: ask for it with Accept: text/event-stream")
        case InvalidOperationTypeError():
            return MethodNotAllowed("Only queries are answered by GET: send this one by POST")
    return None


def _told(error: GraphQLError) -> SluicegateError:
    root = _root(error)
    if not isinstance(root, GraphQLError):
        return known(root) or _unexpected(root)
    if isinstance(root, GraphQLSyntaxError):
        return BadRequest(error.message)
    # What is wrong with a document or its variables has a place in it, or is found before anything is resolved; a
    # value of ours that does not fit its type has neither excuse.
    if error.path is None or root.nodes:
        return Invalid(error.message)
    return _unexpected(root)


def _root(error: Exception) -> Exception:
    """What was raised first."""
    while isinstance(error, GraphQLError) and error.original_error is not None:
        error = error.original_error
    return error


def _unexpected(error: Exception) -> SluicegateError:
    log.error("graphql.failed", exc_info=error)
    return SluicegateError("Something went wrong on our side; it has been logged")
