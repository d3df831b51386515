"""The one tree of errors: each class has a stable code, an HTTP status and a title.

Every face maps an error by these attributes alone; `docs/protocol.md` lists the codes.
"""

from __future__ import annotations

from typing import Any, ClassVar


class SluicegateError(Exception):
    """Base of every error that a caller may see.

    `detail` is one sentence for a person; `extra` holds members that are added to the
    problem document; `retry_after_seconds` becomes the Retry-After header.
    """

    code: ClassVar[str] = "internal"
    status: ClassVar[int] = 500
    title: ClassVar[str] = "Internal error"

    def __init__(self, detail: str | None = None, *, retry_after_seconds: int | None = None, **extra: Any) -> None:
        self.detail = detail or self.title
        self.retry_after_seconds = retry_after_seconds
        self.extra = extra
        super().__init__(self.detail)


class BadRequest(SluicegateError):
    code, status, title = "bad_request", 400, "Bad request"


class NotJSON(BadRequest):
    code, title = "not_json", "The body is not JSON"


class InvalidCursor(BadRequest):
    code, title = "invalid_cursor", "The position to resume from is not valid"


class Unauthenticated(SluicegateError):
    code, status, title = "unauthenticated", 401, "Sign in, or send a valid token"


class Forbidden(SluicegateError):
    code, status, title = "forbidden", 403, "Your role does not permit this"


class CSRFFailed(Forbidden):
    code, title = "csrf_failed", "The CSRF token is missing or wrong"


class NotFound(SluicegateError):
    code, status, title = "not_found", 404, "There is nothing here that you can see"


class MethodNotAllowed(SluicegateError):
    code, status, title = "method_not_allowed", 405, "This method is not allowed here"


class Conflict(SluicegateError):
    code, status, title = "conflict", 409, "Conflict"


class ConversationBusy(Conflict):
    code, title = "conversation_busy", "The conversation has an active stream"


class TooLarge(SluicegateError):
    code, status, title = "too_large", 413, "Too large"


class UnsupportedMediaType(SluicegateError):
    code, status, title = "unsupported_media_type", 415, "Send application/json"


class Invalid(SluicegateError):
    """Well-formed but not acceptable; `errors` names each field and what is wrong with it."""

    code, status, title = "invalid", 422, "The request is not valid"

    def __init__(self, detail: str | None = None, *, errors: list[dict[str, str]] | None = None) -> None:
        super().__init__(detail, errors=errors or [])


class TooManyStreams(SluicegateError):
    code, status, title = "too_many_streams", 429, "Too many active streams"


class TooManyRequests(SluicegateError):
    """More often than a rate allows; nothing was done."""

    code, status, title = "rate_limited", 429, "Too many requests"


class Unavailable(SluicegateError):
    """A dependency is down or the queue is full; nothing was written, unless `detail` says that it is not known."""

    code, status, title = "unavailable", 503, "Temporarily unavailable"

    def __init__(self, detail: str | None = None, *, retry_after_seconds: int = 2, **extra: Any) -> None:
        super().__init__(detail, retry_after_seconds=retry_after_seconds, **extra)


class ConfigurationError(SluicegateError):
    """A setting is missing or wrong; raised at start, shown as one line."""

    code, title = "configuration", "The configuration is not valid"
