"""REST: each call thin, over the manager."""

from __future__ import annotations

from typing import Any

from apiflask import APIFlask
from flask import Request, Response

from webapp import auth
from webapp.config import Settings
from webapp.rest.conversations import conversations
from webapp.rest.openapi import configure_openapi
from webapp.rest.operations import operations
from webapp.rest.problems import configure_problems
from webapp.rest.streams import streams
from webapp.rest.system import system
from webapp.schemas import require_json


def configure_rest(app: APIFlask, settings: Settings) -> None:
    """Register the calls, their errors and the limits of a request."""
    app.config["MAX_CONTENT_LENGTH"] = settings.request_limit_bytes
    app.request_class = _Request
    app.after_request(_set_security_headers)
    configure_openapi(app, settings)
    configure_problems(app)
    for blueprint in (conversations, streams, operations, system):
        app.register_blueprint(blueprint)


def _set_security_headers(response: Response) -> Response:
    """What is no page is never shown as one, whatever is in it; a page says for itself what it may do."""
    response.headers["X-Content-Type-Options"] = "nosniff"
    if response.mimetype != "text/html":
        response.headers.setdefault("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
    return response


class _Request(Request):
    """A request whose missing body is an empty object: where members are required, they are named as missing."""

    def on_json_loading_failed(self, e: ValueError | None) -> Any:
        return {} if not self.get_data() else super().on_json_loading_failed(e)


def _require_user() -> None:
    """Nothing is said, not even of a malformed body, to somebody unknown."""
    auth.require_user()


def _require_operator() -> None:
    auth.require_operator()


# Here and not where the application is made: a blueprint is one for all applications of a process.
for guarded in (conversations, streams):
    guarded.before_request(_require_user)
    guarded.before_request(require_json)
operations.before_request(_require_operator)
operations.before_request(require_json)
