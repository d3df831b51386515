"""Who is asking, and what they may do in a conversation: the one place that decides both.

A request is authenticated by `Authorization: Bearer TOKEN`, or by the page's session cookie. A cookie
is sent by the browser whoever makes it ask, so unsafe methods by cookie need the CSRF token as well.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final
from uuid import UUID

from flask import Flask, current_app, g, request, session
from flask_wtf.csrf import CSRFError, CSRFProtect

from webapp.accounts import Accounts
from webapp.config import Settings
from webapp.conversations import Conversations
from webapp.errors import CSRFFailed, Forbidden, Unauthenticated
from webapp.logs import bind
from webapp.models import Role
from webapp.views import ConversationView, UserView

_csrf: Final = CSRFProtect()
_SAFE: Final = frozenset({"GET", "HEAD", "OPTIONS"})


class Action(StrEnum):
    """What may be done in a conversation."""

    READ = "read"
    SEND = "send"
    TERMINATE = "terminate"
    MANAGE = "manage"


PERMISSIONS: Final[dict[Role, frozenset[Action]]] = {
    Role.OWNER: frozenset(Action),
    Role.EDITOR: frozenset({Action.READ, Action.SEND, Action.TERMINATE}),
    Role.VIEWER: frozenset({Action.READ}),
}


def configure_auth(app: Flask, settings: Settings, secret_key: str) -> None:
    """Cookies and CSRF. Checks are made by `require_user`, only where the cookie is what authenticates."""
    app.config.update(
        SECRET_KEY=secret_key,
        SESSION_COOKIE_NAME="sluicegate_session",
        SESSION_COOKIE_HTTPONLY=True,
        SESSION_COOKIE_SAMESITE="Lax",
        SESSION_COOKIE_SECURE=settings.cookie_secure,
        PERMANENT_SESSION_LIFETIME=settings.cookie_lifetime_seconds,
        WTF_CSRF_CHECK_DEFAULT=False,
        WTF_CSRF_TIME_LIMIT=None,
        WTF_CSRF_SSL_STRICT=False,
        WTF_CSRF_HEADERS=["X-CSRFToken", "X-CSRF-Token"],
    )
    _csrf.init_app(app)


def require_user() -> UserView:
    """Who is asking.

    Raises:
        Unauthenticated: no valid token and no valid cookie.
        CSRFFailed: an unsafe method by cookie without the CSRF token.
    """
    if "user" not in g:
        g.user = _by_token() or _by_cookie()
    if g.user is None:
        raise Unauthenticated("Send `Authorization: Bearer TOKEN`, or sign in at the page")
    user: UserView = g.user
    bind(user_id=user.id)
    return user


def require_operator() -> UserView:
    """Who is asking, where that is an operator.

    Raises:
        Forbidden: the user is none. Otherwise as `require_user`.
    """
    user = require_user()
    permit_operator(user)
    return user


def permit_operator(user: UserView) -> None:
    """Raises `Forbidden` where a user may not see to what others do."""
    if not user.operator:
        raise Forbidden(f"You are no operator: ask for `sluicegate users operator {user.name}`")


def current_user() -> UserView | None:
    """Who is signed in at the page; None: nobody."""
    return _user_of_cookie()


def sign_in_with_token(token: str) -> UserView:
    """Sign in at the page with a one-time sign-in token or an API token; sets the session cookie.

    Raises:
        Unauthenticated: it is neither.
    """
    token = token.strip()
    try:
        user, stamp = _accounts().redeem(token)
    except Unauthenticated as error:
        try:
            user, stamp = _accounts().user_of_token(token)
        except Unauthenticated:
            raise error from None
    session.clear()
    session.permanent = True
    session["user"], session["stamp"] = user.name, stamp
    return user


def sign_out() -> None:
    """Forget the session cookie."""
    session.clear()


def check_csrf() -> None:
    """For forms of the page.

    Raises:
        CSRFFailed: the form has no valid CSRF token.
    """
    try:
        _csrf.protect()
    except CSRFError as error:
        raise CSRFFailed(f"{error.description} Reload the page and try again.") from None


def require(conversation_id: UUID, action: Action) -> ConversationView:
    """The conversation, where the asking user may do this in it.

    Raises:
        NotFound: it does not exist, or the user is no member: the same to all.
        Forbidden: the user sees it but may not do this.
    """
    conversations: Conversations = current_app.extensions["sluicegate"].conversations
    conversation = conversations.get(require_user().id, conversation_id)
    bind(conversation_id=conversation_id)
    permit(Role(conversation.role), action)
    return conversation


def permit(role: Role, action: Action) -> None:
    """Raises `Forbidden` where a member of this role may not do this in a conversation."""
    if action not in PERMISSIONS[role]:
        raise Forbidden(f"As {role.value} of this conversation you may not {action.value} in it")


def _by_token() -> UserView | None:
    header = request.headers.get("Authorization", "")
    scheme, _, token = header.partition(" ")
    if not header:
        return None
    if scheme.lower() != "bearer" or not token.strip():
        raise Unauthenticated("The Authorization header must be `Bearer TOKEN`")
    return _accounts().user_of_token(token.strip())[0]


def _by_cookie() -> UserView | None:
    user = _user_of_cookie()
    if user is not None and request.method not in _SAFE:
        check_csrf()
    return user


def _user_of_cookie() -> UserView | None:
    name, stamp = session.get("user"), session.get("stamp")
    if not isinstance(name, str) or not isinstance(stamp, str):
        return None
    return _accounts().user_of_cookie(name, stamp)


def _accounts() -> Accounts:
    accounts: Accounts = current_app.extensions["sluicegate"].accounts
    return accounts
