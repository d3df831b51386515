"""REST: each call thin, over the manager."""

from __future__ import annotations

from typing import Any

from apiflask import APIFlask
from flask import Request, request
from werkzeug.exceptions import BadRequest

from webapp import auth
from webapp.config import Settings
from webapp.errors import NotJSON, UnsupportedMediaType
from webapp.rest.conversations import conversations
from webapp.rest.problems import configure_problems
from webapp.rest.streams import streams
from webapp.rest.system import system


def configure_rest(app: APIFlask, settings: Settings) -> None:
    """Register the calls, their errors and the limits of a request."""
    app.config["MAX_CONTENT_LENGTH"] = settings.request_limit_bytes
    app.config["OPENAPI_VERSION"] = "3.1.0"
    app.config["VALIDATION_ERROR_DESCRIPTION"] = "The request is not valid"
    app.security_schemes = {"bearer": {"type": "http", "scheme": "bearer"}}
    app.request_class = _Request
    configure_problems(app)
    for blueprint in (conversations, streams, system):
        app.register_blueprint(blueprint)


class _Request(Request):
    """A request whose missing body is an empty object: where members are required, they are named as missing."""

    def on_json_loading_failed(self, e: ValueError | None) -> Any:
        return {} if not self.get_data() else super().on_json_loading_failed(e)


def _require_user() -> None:
    """Nothing is said, not even of a malformed body, to somebody unknown."""
    auth.require_user()


def _require_json() -> None:
    """A body is JSON and says so: that a browser cannot send across sites without asking."""
    if request.method not in ("POST", "PUT", "PATCH") or not request.get_data():
        return
    if request.mimetype != "application/json" and not request.mimetype.endswith("+json"):
        raise UnsupportedMediaType("Send the body with Content-Type: application/json")
    try:
        body = request.get_json(force=True)
    except (BadRequest, RecursionError):  # the latter of what is nested too deeply
        raise NotJSON("The body is not JSON: send a JSON object") from None
    if not isinstance(body, dict):
        raise NotJSON("The body must be a JSON object")


# Here and not where the application is made: a blueprint is one for all applications of a process.
for guarded in (conversations, streams):
    guarded.before_request(_require_user)
    guarded.before_request(_require_json)
