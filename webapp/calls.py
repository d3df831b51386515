"""What a user may ask for: every call that REST and GraphQL share, with its permission. The faces only translate.

Each method asks `auth` who is calling, so it runs within a request, and returns the frozen views that every face
shows. What it raises is in `errors`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal
from uuid import UUID

from flask import current_app

from webapp import auth
from webapp.auth import Action
from webapp.config import Settings
from webapp.conversations import Conversations
from webapp.errors import ConversationBusy, Invalid, NotFound, TooLarge, TooManyStreams
from webapp.limits import Limits
from webapp.logs import bind
from webapp.models import OnDisconnect, Role, StreamSession
from webapp.streams.lifecycle import TerminationReason
from webapp.streams.manager import StreamSessionManager
from webapp.streams.ports import NewMessage, RequestKey, Rerun
from webapp.streams.queries import SessionQueries
from webapp.streams.timing import Timeouts
from webapp.upstream import Upstream
from webapp.views import (
    ConversationView,
    MemberView,
    MessageView,
    ModelView,
    ReceiptView,
    SessionView,
    UserView,
    camel_case,
)

UNTITLED: Final = "New conversation"
KEY_LIMIT_CHARACTERS: Final = 255
SUPERSEDE_TRIES: Final = 20
"""How often a message that is to take a stream's place ends what stands there: each time somebody was quicker."""


@dataclass(frozen=True, slots=True)
class SendRequest:
    """A message to be answered. None: the default of the setting, or of the upstream.

    `timeouts` holds fields of `Timeouts` by name; those that it does not name are the settings'.
    """

    content: str
    conversation_id: UUID | None = None
    model: str | None = None
    options: dict[str, Any] | None = None
    think: bool | str | None = None
    keep_alive: str | None = None
    on_disconnect: OnDisconnect | None = None
    on_active: Literal["reject", "terminate"] = "reject"
    timeouts: dict[str, float] | None = None


class Calls:
    """The calls of one application."""

    def __init__(
        self,
        settings: Settings,
        conversations: Conversations,
        manager: StreamSessionManager,
        queries: SessionQueries,
        upstream: Upstream,
        limits: Limits,
    ) -> None:
        self._settings = settings
        self._conversations = conversations
        self._manager = manager
        self._queries = queries
        self._upstream = upstream
        self._limits = limits

    def me(self) -> UserView:
        """Who is asking."""
        return auth.require_user()

    # -- conversations -------------------------------------------------------------------------

    def create_conversation(self, title: str | None) -> ConversationView:
        """Begin a conversation."""
        return self._conversations.create(auth.require_user().id, title or UNTITLED)

    def conversations(
        self, limit: int, cursor: UUID | None, search: str | None = None
    ) -> tuple[list[ConversationView], UUID | None]:
        """A page of the user's conversations, newest first, and the cursor of the next."""
        return self._conversations.list(auth.require_user().id, limit, cursor, search)

    def conversation(self, conversation_id: UUID) -> ConversationView:
        """One conversation."""
        return auth.require(conversation_id, Action.READ)

    def active_streams_in(self, conversation_id: UUID) -> list[SessionView]:
        """The conversation's ACTIVE sessions: none or one."""
        auth.require(conversation_id, Action.READ)
        return self._queries.active_in(conversation_id)

    def conversation_state(self, conversation_id: UUID) -> tuple[ConversationView, list[SessionView], UUID | None]:
        """One conversation, its ACTIVE sessions and its newest message: what a page looks at again and again."""
        conversation = auth.require(conversation_id, Action.READ)
        active = self._queries.active_in(conversation_id)
        return conversation, active, self._conversations.last_message_id(conversation_id)

    def messages(self, conversation_id: UUID) -> Sequence[MessageView]:
        """All messages, oldest first; one still streaming shows what has been checkpointed."""
        auth.require(conversation_id, Action.READ)
        return self._conversations.messages(conversation_id)

    def rename_conversation(self, conversation_id: UUID, title: str) -> None:
        """Give it another title."""
        auth.require(conversation_id, Action.MANAGE)
        self._conversations.rename(conversation_id, title)

    def delete_conversation(self, conversation_id: UUID) -> None:
        """End its active stream, then hide it."""
        auth.require(conversation_id, Action.MANAGE)
        self._end_streams(conversation_id)
        self._conversations.hide(conversation_id)
        self._end_streams(conversation_id)  # one may have begun in between; from now on none can

    def _end_streams(self, conversation_id: UUID) -> None:
        by = auth.require_user().name
        for active in self._queries.active_in(conversation_id):
            self._manager.terminate(active.session_id, TerminationReason.CONVERSATION_DELETED, by=by)

    # -- members -------------------------------------------------------------------------------

    def members(self, conversation_id: UUID) -> list[MemberView]:
        """Who belongs to it, by name."""
        auth.require(conversation_id, Action.READ)
        return self._conversations.members(conversation_id)

    def set_member(self, conversation_id: UUID, name: str, role: Role) -> MemberView:
        """Make a user a member, or give a member another role."""
        auth.require(conversation_id, Action.MANAGE)
        return self._conversations.set_member(conversation_id, name, role)

    def remove_member(self, conversation_id: UUID, name: str) -> None:
        """Take a member out; everyone may leave."""
        own = name == auth.require_user().name
        auth.require(conversation_id, Action.READ if own else Action.MANAGE)
        self._conversations.remove_member(conversation_id, name)

    # -- streams -------------------------------------------------------------------------------

    def stream(self, session_id: UUID, action: Action = Action.READ) -> SessionView:
        """A session, where the user may do this in its conversation.

        Raises:
            NotFound: it is unknown, or in a conversation that the user cannot see: the same to both.
        """
        return self._queries.view_of(self._row(session_id, action))

    def _row(self, session_id: UUID, action: Action) -> StreamSession:
        """The row of a session in whose conversation the user may do this: one question for both."""
        row, role = self._queries.row_as_seen(session_id, auth.require_user().id)
        bind(session_id=session_id)
        if role is None:
            raise NotFound(f"There is no stream {session_id} that you can see")
        bind(conversation_id=row.conversation_id)
        auth.permit(Role(role), action)
        return row

    def streams(self, *, active_only: bool, limit: int = 100) -> list[SessionView]:
        """The sessions of the user's conversations, newest first."""
        return self._queries.list_streams(active_only=active_only, user_id=auth.require_user().id, limit=limit)

    def send(self, request: SendRequest, key: str | None = None) -> SessionView:
        """Send a message and begin its answer; a repetition with the same `key` gives the first one's session."""
        user = auth.require_user()
        request_key = _request_key(user, key, asdict(request))
        if same := self._repeated(request_key):
            return same
        limit = self._settings.message_limit_characters
        if len(request.content) > limit:
            raise TooLarge(
                f"content: {len(request.content)} characters are more than the {limit} allowed", field="content"
            )
        if request.conversation_id is not None:
            auth.require(request.conversation_id, Action.SEND)
        self._limits.hit_messages(user)
        new = NewMessage(
            user_id=user.id,
            content=request.content,
            model=request.model or self._upstream.default_model(),
            conversation_id=request.conversation_id,
            options=request.options,
            think=request.think,
            keep_alive=request.keep_alive or self._settings.keep_alive or None,
            on_disconnect=request.on_disconnect or OnDisconnect(self._settings.on_disconnect),
            timeouts=self._timeouts(request.timeouts or {}),
            request_key=request_key,
        )
        if request.on_active == "terminate" and request.conversation_id is not None:
            return self._supersede(new, request.conversation_id)
        return self._manager.start(new)

    def _supersede(self, new: NewMessage, conversation_id: UUID) -> SessionView:
        """Begin in place of the conversation's active session; others may be about to do the same."""
        for _ in range(SUPERSEDE_TRIES):
            try:
                return self._manager.start(new)
            except (ConversationBusy, TooManyStreams) as error:
                in_the_way = self._queries.active_in(conversation_id)
                if same := self._repeated(new.request_key):
                    return same  # what is in the way may be what this very request began, when it was sent before
                if isinstance(error, TooManyStreams) and not self._makes_room(in_the_way, new.user_id):
                    raise
            for active in in_the_way:
                self._manager.terminate(active.session_id, TerminationReason.SUPERSEDED, by=auth.require_user().name)
        return self._manager.start(new)

    def _makes_room(self, sessions: Sequence[SessionView], user_id: UUID) -> bool:
        """Whether the end of one of these leaves the user below the cap."""
        return any(self._queries.row(one.session_id).user_id == user_id for one in sessions)

    def continue_stream(self, session_id: UUID, key: str | None = None) -> SessionView:
        """Go on writing the answer of a session that has ended, from where its partial ends; a new session."""
        return self._rerun("continue", session_id, key)

    def retry_stream(self, session_id: UUID, key: str | None = None) -> SessionView:
        """Answer the same question anew; the old answer is kept, and marked as replaced; a new session."""
        return self._rerun("retry", session_id, key)

    def _rerun(self, kind: Literal["continue", "retry"], session_id: UUID, key: str | None) -> SessionView:
        user = auth.require_user()
        request_key = _request_key(user, key, {kind: session_id})
        if same := self._repeated(request_key):
            return same
        self.stream(session_id, Action.SEND)
        self._limits.hit_messages(user)
        rerun = Rerun(session_id, user.id, request_key)
        return self._manager.continue_(rerun) if kind == "continue" else self._manager.retry(rerun)

    def terminate(self, session_id: UUID, conversation_id: UUID | None = None) -> ReceiptView:
        """Terminate a session; the receipt is the same to every caller, however many, however often."""
        by = auth.require_user().name
        row = self._row(session_id, Action.TERMINATE)
        if conversation_id is not None and conversation_id != row.conversation_id:
            raise NotFound(f"There is no stream {session_id} in conversation {conversation_id} that you can see")
        return self._manager.terminate(session_id, TerminationReason.USER, by, row)

    def _repeated(self, request_key: RequestKey | None) -> SessionView | None:
        if request_key is None or (same := self._manager.repeated(request_key)) is None:
            return None
        auth.require(same.conversation_id, Action.READ)  # it may have been deleted since, or taken from the user
        return same

    def _timeouts(self, asked: dict[str, float]) -> Timeouts:
        """The settings' time-outs, with what a request asks for in their place.

        Raises:
            Invalid: one is not above zero, or over the cap.
        """
        cap = self._settings.request_timeout_cap_seconds
        for name, seconds in asked.items():
            if not 0 < seconds <= cap:
                problem = f"must be above 0 and at most {cap:g} seconds"
                field = f"timeouts.{camel_case(name)}"
                raise Invalid(f"{field}: {problem}", errors=[{"field": field, "message": problem}])
        return Timeouts.of(self._settings).with_(asked)

    # -- models --------------------------------------------------------------------------------

    def models(self) -> tuple[list[ModelView], str | None]:
        """What the upstream offers, and the model of a request that names none."""
        auth.require_user()
        found = self._upstream.models()
        return found, self._upstream.default_model() if found else None


def calls() -> Calls:
    """The calls of the application that serves this request."""
    found: Calls = current_app.extensions["sluicegate"].calls
    return found


def _request_key(user: UserView, key: str | None, body: dict[str, Any]) -> RequestKey | None:
    """A client's name for a request, which lets it repeat one whose answer it did not get."""
    if key is None:
        return None
    if not 1 <= len(key) <= KEY_LIMIT_CHARACTERS or not key.isprintable():
        problem = f"must have 1 to {KEY_LIMIT_CHARACTERS} printable characters"
        raise Invalid(f"Idempotency-Key {problem}", errors=[{"field": "Idempotency-Key", "message": problem}])
    # Not as it was spelled: whatever means the same is the same, by REST or GraphQL.
    said = json.dumps(body, sort_keys=True, default=str)
    return RequestKey(user.id, key, hashlib.sha256(said.encode()).hexdigest())
