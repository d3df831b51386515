"""Users and their tokens. A token is shown once; what is kept is its hash."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from contextlib import suppress
from datetime import timedelta
from typing import Final, cast

from sqlalchemy import Table, bindparam, delete, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from webapp.database import Database
from webapp.errors import Conflict, Invalid, NotFound, Unauthenticated, Unavailable
from webapp.models import SignInToken, User, now
from webapp.views import UserView

NAME: Final = re.compile(r"[\w.@-]{1,64}")
_TOKEN_BYTES: Final = 32
LAST_USE_SECONDS: Final = 60
"""How exactly a token's last use is kept: one write a minute, not one a request."""
_USERS: Final = cast(Table, User.__table__)
_BY_TOKEN: Final = select(_USERS).where(_USERS.c.token_hash == bindparam("token_hash"))
"""Asked with every request, so of the table, which costs half of what the mapped class does."""


def hash_token(token: str) -> str:
    """SHA-256 in hex. A token has 256 random bits, so no slow hash is needed to keep it from being guessed."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


class Accounts:
    """Makes, finds and disables users. Every method raises `Unavailable` where the database is down."""

    def __init__(self, database: Database, *, sign_in_token_seconds: int) -> None:
        self._database = database
        self._sign_in_token_seconds = sign_in_token_seconds

    def create_user(self, name: str, *, operator: bool = False) -> str:
        """Make a user; returns the API token.

        Raises:
            Invalid: the name is not acceptable.
            Conflict: it is taken.
        """
        if not NAME.fullmatch(name):
            problem = "1 to 64 letters, digits, or any of . _ @ -"
            raise Invalid(f"The name must be {problem}", errors=[{"field": "name", "message": problem}])
        token = secrets.token_urlsafe(_TOKEN_BYTES)
        user = User(name=name, token_hash=hash_token(token), operator=operator)
        try:
            self._database.write(lambda s: s.add(user))
        except IntegrityError:
            raise Conflict(f"There is a user {name!r} already; `users rotate {name}` makes a new token") from None
        return token

    def ensure_user(self, name: str, *, operator: bool = False) -> None:
        """Make a user where there is none of that name; its token stays unknown until it is rotated."""
        try:
            self.create_user(name, operator=operator)
        except Conflict:
            return

    def list_users(self) -> list[UserView]:
        """All users, by name."""
        return self._database.read(lambda s: [_view(user) for user in s.scalars(select(User).order_by(User.name))])

    def require_user(self, name: str) -> None:
        """Raises `NotFound` where there is no user of that name."""
        self._database.read(lambda s: _named(s, name))

    def disable_user(self, name: str) -> None:
        """The user's tokens and cookies are refused from now on.

        Raises:
            NotFound: there is no such user.
        """

        def work(s: Session) -> None:
            user = _named(s, name)
            user.disabled_at = now()
            s.execute(delete(SignInToken).where(SignInToken.user_id == user.id))

        self._database.write(work)

    def set_operator(self, name: str, operator: bool) -> None:
        """Let a user see to what all users' streams do, or no longer.

        Raises:
            NotFound: there is no such user.
        """

        def work(s: Session) -> None:
            _named(s, name).operator = operator

        self._database.write(work)

    def rotate_token(self, name: str) -> str:
        """Replace the user's token, and let a disabled user in again; old tokens and cookies are refused.

        Raises:
            NotFound: there is no such user.
        """
        token = secrets.token_urlsafe(_TOKEN_BYTES)

        def work(s: Session) -> None:
            user = _named(s, name)
            user.token_hash, user.disabled_at = hash_token(token), None

        self._database.write(work)
        return token

    def make_sign_in_token(self, name: str) -> str:
        """A token for one sign-in at the page, good for `sign_in_token_seconds`."""
        token = secrets.token_urlsafe(_TOKEN_BYTES)
        expires_at = now() + timedelta(seconds=self._sign_in_token_seconds)

        def work(s: Session) -> None:
            s.execute(delete(SignInToken).where(SignInToken.expires_at < now()))
            s.add(SignInToken(token_hash=hash_token(token), user_id=_named(s, name).id, expires_at=expires_at))

        self._database.write(work)
        return token

    def user_of_token(self, token: str) -> tuple[UserView, str]:
        """Whose API token this is, and the cookie stamp that goes with it.

        Raises:
            Unauthenticated: nobody's, or a disabled user's.
        """
        hashed = hash_token(token)
        found = self._database.read(lambda s: s.execute(_BY_TOKEN, {"token_hash": hashed}).one_or_none())
        user = cast(User | None, found)
        if user is None or user.disabled_at or not hmac.compare_digest(user.token_hash, hashed):
            raise Unauthenticated("The token is not valid")
        self._note_use(user)
        return _view(user), cookie_stamp(user.token_hash)

    def redeem(self, token: str) -> tuple[UserView, str]:
        """As `user_of_token`, for a one-time sign-in token, which is used up.

        Raises:
            Unauthenticated: it is unknown, used, or too old.
        """
        hashed = hash_token(token)

        def work(s: Session) -> User | None:
            where = (SignInToken.token_hash == hashed) & (SignInToken.expires_at >= now())
            user_id = s.scalar(delete(SignInToken).where(where).returning(SignInToken.user_id))
            return s.get(User, user_id) if user_id else None

        user = self._database.write(work)
        if user is None or user.disabled_at:
            raise Unauthenticated("The sign-in token is used up, too old or wrong; ask for a new one")
        return _view(user), cookie_stamp(user.token_hash)

    def user_of_cookie(self, name: str, stamp: str) -> UserView | None:
        """The user of a session cookie; None once the user is disabled or the token was rotated."""
        user = self._database.read(lambda s: s.scalar(select(User).where(User.name == name)))
        if user is None or user.disabled_at or not hmac.compare_digest(cookie_stamp(user.token_hash), stamp):
            return None
        return _view(user)

    def _note_use(self, user: User) -> None:
        moment = now()
        if user.token_used_at is None or (moment - user.token_used_at).total_seconds() > LAST_USE_SECONDS:
            # Nobody's request waits, or fails, for this.
            with suppress(Unavailable):
                where = (User.id == user.id) & User.token_used_at.is_not_distinct_from(user.token_used_at)
                statement = update(User).where(where).values(token_used_at=moment)
                self._database.write(lambda s: s.execute(statement), busy_seconds=0)


def cookie_stamp(token_hash: str) -> str:
    """What ties a cookie to the token of its time: a hash of the hash, so that the cookie does not show it."""
    return hashlib.sha256(b"cookie:" + token_hash.encode()).hexdigest()[:32]


def _named(s: Session, name: str) -> User:
    user = s.scalar(select(User).where(User.name == name))
    if user is None:
        raise NotFound(f"There is no user {name!r}; `sluicegate users list` shows them")
    return user


def _view(user: User) -> UserView:
    return UserView(user.id, user.name, user.operator, user.created_at, user.token_used_at, user.disabled_at)
