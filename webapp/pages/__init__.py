"""The chat page and the way in: small server-rendered shells for the modules under `static/`."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit
from uuid import UUID

import flask_swagger_ui
from flask import Blueprint, Response, current_app, redirect, render_template, request, send_from_directory, url_for
from flask.typing import ResponseReturnValue

from webapp import auth
from webapp.config import Settings
from webapp.errors import CSRFFailed, SluicegateError, TooManyRequests, Unauthenticated
from webapp.limits import Limits

# Not under /static: that path is the application's own.
pages = Blueprint("pages", __name__, template_folder="templates", static_folder="static", static_url_path="/assets")

_CONTENT_SECURITY_POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "worker-src 'self'",
        "font-src 'self'",
        "form-action 'self'",
        "frame-ancestors 'none'",
        "base-uri 'none'",
    )
)
# What a model writes becomes elements through one gate, the sanitiser's; no other script may make any of text.
_TRUSTED_TYPES: Final = "; require-trusted-types-for 'script'; trusted-types dompurify sluicegate"
THEME_COOKIE: Final = "sluicegate_theme"
_THEMES: Final = ("light", "dark")
_SWAGGER_UI: Final = Path(flask_swagger_ui.__file__).parent / "dist"
_SWAGGER_UI_SECONDS: Final = 3600
_LOOPBACK: Final = ("127.0.0.1", "localhost", "::1")
_CONVERSATION_PATH: Final = re.compile(r"/c/[0-9a-fA-F-]{36}", re.ASCII)


@pages.context_processor
def chosen_theme() -> dict[str, str | None]:
    """The colours that were chosen at the page, so that it comes in them; None: as the system is set."""
    theme = request.cookies.get(THEME_COOKIE)
    return {"theme": theme if theme in _THEMES else None}


@pages.get("/")
@pages.get("/c/<uuid:conversation_id>")
def chat(conversation_id: UUID | None = None) -> ResponseReturnValue:
    """The chat; the modules read from the address which conversation is meant."""
    user = auth.current_user()
    if user is None:
        return redirect(url_for(".sign_in_form", next=request.path if conversation_id else None), 303)
    return render_template("pages/chat.html", user=user)


@pages.get("/sign-in")
def sign_in_form() -> ResponseReturnValue:
    """The form; with `?token=` one button, so that whatever merely fetches the link does not use it up."""
    token = request.args.get("token", "")
    if not token and auth.current_user() is not None:
        return redirect(url_for(".chat"), 303)
    return _render_sign_in(token=token)


@pages.post("/sign-in")
def sign_in() -> ResponseReturnValue:
    """Exchange a one-time sign-in token, or an API token, for the session cookie."""
    limits: Limits = current_app.extensions["sluicegate"].limits
    address = request.remote_addr or ""
    try:
        auth.check_csrf()  # first: another site must not use up somebody's tries
        limits.hit_sign_in(address)
        auth.sign_in_with_token(request.form.get("token", ""))
        limits.forgive_sign_in(address)
    except (CSRFFailed, TooManyRequests, Unauthenticated) as error:
        return _render_sign_in(error=error), error.status, _retry_after(error)
    return redirect(_landing_path(), 303)


@pages.post("/sign-out")
def sign_out() -> ResponseReturnValue:
    """Forget the session cookie."""
    try:
        auth.check_csrf()
    except CSRFFailed:
        # The form is older than the session: the page is shown anew, with a form that works.
        return redirect(url_for(".chat"), 303)
    auth.sign_out()
    return redirect(url_for(".sign_in_form"), 303)


@pages.get("/ops")
def ops() -> ResponseReturnValue:
    """What operators look after: all streams, the workers, charts; the module asks the API for it."""
    user = auth.current_user()
    if user is None:
        return redirect(url_for(".sign_in_form", next=request.path), 303)
    if not user.operator:
        return render_template("pages/ops_refused.html", user=user), 403
    return render_template("pages/ops.html", flower_url=_flower_url())


@pages.get("/docs")
def api() -> ResponseReturnValue:
    """The OpenAPI document, to be read and tried; without any other server's scripts."""
    return render_template("pages/docs.html")


@pages.get("/docs/<any('swagger-ui.css', 'swagger-ui-bundle.js'):name>")
def swagger_ui(name: str) -> Response:
    """Swagger UI's own files, as they are installed."""
    return send_from_directory(_SWAGGER_UI, name, max_age=_SWAGGER_UI_SECONDS)


@pages.after_request
def set_security_headers(response: Response) -> Response:
    """No script or style but ours, and no address with a token in it told to anybody."""
    trusted_types = _TRUSTED_TYPES if request.endpoint in ("pages.chat", "pages.ops") else ""
    response.headers["Content-Security-Policy"] = _CONTENT_SECURITY_POLICY + trusted_types
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Referrer-Policy"] = "no-referrer"
    if request.endpoint not in ("pages.static", "pages.swagger_ui"):
        response.headers["Cache-Control"] = "no-store"
    return response


def _render_sign_in(token: str = "", error: SluicegateError | None = None) -> str:
    return render_template(
        "pages/sign_in.html",
        token=token,
        error=error,
        landing_path=_landing_path(),
        user=auth.current_user(),
    )


def _retry_after(error: SluicegateError) -> dict[str, str]:
    return {"Retry-After": str(error.retry_after_seconds)} if error.retry_after_seconds else {}


def _landing_path() -> str:
    """Where to go once signed in: the page that was asked for, if it is one of ours, and never another site."""
    wanted = request.values.get("next", "")
    return wanted if _CONVERSATION_PATH.fullmatch(wanted) or wanted == url_for(".ops") else url_for(".chat")


def _flower_url() -> str:
    """Where whoever asks finds Flower: as configured, else at its port of the host that was asked; empty where it
    cannot be reached there."""
    settings: Settings = current_app.extensions["sluicegate"].settings
    asked = urlsplit(request.host_url)
    if settings.flower_url or not settings.flower_port or not find_spec("flower"):
        return settings.flower_url
    if settings.host in _LOOPBACK and asked.hostname not in _LOOPBACK:
        return ""
    host = f"[{asked.hostname}]" if ":" in (asked.hostname or "") else asked.hostname
    return f"{asked.scheme}://{host}:{settings.flower_port}/"
