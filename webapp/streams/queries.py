"""What is read of sessions: views, receipts, lists. Changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from uuid import UUID

import orjson
import structlog
from redis.exceptions import RedisError
from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import aliased

from webapp.conversations import visible
from webapp.database import Database
from webapp.errors import NotFound, Unavailable
from webapp.models import Member, StreamSession, User
from webapp.streams import rows
from webapp.streams.lifecycle import StreamPhase, StreamStatus, TerminationReason
from webapp.streams.log import LogState, TokenLog
from webapp.views import ReceiptView, SessionView

log = structlog.get_logger(__name__)

_Narrowing = Callable[[type[StreamSession]], Sequence[ColumnElement[bool]]]


class SessionQueries:
    """Every method raises `Unavailable` where the database is down; without Redis, what the row knows is shown."""

    def __init__(self, database: Database, token_log: TokenLog) -> None:
        self._database = database
        self._log = token_log
        self._redis_answers = True
        self.count_viewers: Callable[[Sequence[UUID]], list[int]] = lambda ids: [0] * len(ids)
        """How many readers each session has; set to the hub's."""

    def receipt(self, session_id: UUID) -> ReceiptView:
        """The receipt of a session that has ended."""

        found = self._database.read(lambda s: rows.get_with_text(s, session_id))
        if found is None or found[0].status == StreamStatus.ACTIVE:
            raise Unavailable("The stop is recorded and will take effect")
        row, _, content = found
        return _receipt(row, content)

    def final_text(self, session_id: UUID) -> tuple[SessionView, str, str, bytes]:
        """Of a session that has ended: its view, thinking, content, and the data of its `done`."""
        found = self._database.read(lambda s: rows.get_with_text(s, session_id))
        if found is None:
            raise NotFound
        row, thinking, content = found
        return session_view(row), thinking[: row.thinking_length or 0], content[: row.length or 0], done_data(row)

    def view(self, session_id: UUID) -> SessionView:
        """One session.

        Raises:
            NotFound: there is none.
        """
        return self.view_of(self.row(session_id))

    def active_in(self, conversation_id: UUID) -> list[SessionView]:
        """The ACTIVE sessions of a conversation: none or one."""
        where = (StreamSession.conversation_id == conversation_id) & (StreamSession.status == StreamStatus.ACTIVE)
        return self.views_of(self._database.read(lambda s: list(s.scalars(select(StreamSession).where(where)))))

    def list_streams(
        self,
        *,
        active_only: bool = False,
        user_id: UUID | None = None,
        user_name: str | None = None,
        model: str | None = None,
        limit: int = 100,
    ) -> list[SessionView]:
        """Sessions, newest first: of the conversations that `user_id` is a member of; begun by `user_name`."""
        narrowed = partial(_narrowed, user_name=user_name, model=model)
        query = select(StreamSession).where(*narrowed(StreamSession)).limit(limit)
        if active_only:
            # By a column without an index of its own, so that no database looks for the few among all.
            query = query.where(StreamSession.status == StreamStatus.ACTIVE)
            query = query.order_by(StreamSession.started_at.desc(), StreamSession.id.desc())
        else:
            query = query.order_by(StreamSession.id.desc())
        if user_id is not None:
            query = query.where(_in_active_of(user_id) if active_only else _in_recent_of(user_id, limit, narrowed))
        return self.views_of(self._database.read(lambda s: list(s.scalars(query))))

    def queue_position(self, session_id: UUID) -> int:
        """How many sessions wait before this one; 0: it is the next."""
        return self._database.read(lambda s: rows.queue_position(s, session_id))

    def population(self) -> tuple[int, int]:
        """How many sessions are ACTIVE, and how many of those no worker has."""
        counted = select(func.count(), func.count().filter(StreamSession.owner.is_(None)))
        active, queued = self._database.read(
            lambda s: s.execute(counted.where(StreamSession.status == StreamStatus.ACTIVE)).one()
        )
        return active, queued

    def ended_among(self, session_ids: Sequence[UUID]) -> list[UUID]:
        """Which of these have ended, in one query."""
        where = StreamSession.id.in_(session_ids) & (StreamSession.status != StreamStatus.ACTIVE)
        return self._database.read(lambda s: list(s.scalars(select(StreamSession.id).where(where))))

    def row(self, session_id: UUID) -> StreamSession:
        """The row.

        Raises:
            NotFound: there is none.
        """
        row = self._database.read(lambda s: rows.get(s, session_id))
        if row is None:
            raise NotFound(f"There is no stream {session_id} that you can see")
        return row

    def row_as_seen(self, session_id: UUID, user_id: UUID) -> tuple[StreamSession, str | None]:
        """The row, and the user's role in its conversation; None: the user does not see it.

        Raises:
            NotFound: there is none.
        """
        found = self._database.read(lambda s: rows.get_as_seen(s, session_id, user_id))
        if found is None:
            raise NotFound(f"There is no stream {session_id} that you can see")
        return found

    def view_of(self, row: StreamSession) -> SessionView:
        """The view of a row that was read."""
        return self.views_of([row])[0]

    def views_of(self, found: Sequence[StreamSession]) -> list[SessionView]:
        """The views of rows that were read."""
        active = [row.id for row in found if row.status == StreamStatus.ACTIVE]
        states: dict[UUID, LogState | None] = {}
        viewers: dict[UUID, int] = {}
        if active:
            try:
                states = dict(zip(active, self._log.states(active), strict=True))
                viewers = dict(zip(active, self.count_viewers(active), strict=True))
                self._redis_answers = True
            except RedisError as error:
                if self._redis_answers:  # once, and not with every call
                    log.warning("views.without_redis", error=repr(error))
                self._redis_answers = False
        return [session_view(row, states.get(row.id), viewers.get(row.id, 0)) for row in found]


def _in_active_of(user_id: UUID) -> ColumnElement[bool]:
    """That the user sees the session: asked of each that is ACTIVE, of which there are few however long it has been."""
    at = StreamSession.conversation_id
    role = select(Member.role).where(Member.user_id == user_id, Member.conversation_id == at)
    return role.correlate(StreamSession).scalar_subquery().is_not(None) & visible(at)


def _in_recent_of(user_id: UUID, limit: int, narrowed: _Narrowing) -> ColumnElement[bool]:
    """That the session is in one of the user's conversations with the newest of those that are asked for, `limit` of
    them; the newest `limit` sessions are in those.

    One look at each conversation of the user, instead of at all sessions in these, or at all there are.
    """
    of_it = aliased(StreamSession)
    there = (of_it.conversation_id == Member.conversation_id, *narrowed(of_it))
    newest = select(of_it.id).where(*there).order_by(of_it.id.desc()).limit(1).correlate(Member).scalar_subquery()
    mine = select(Member.conversation_id).where(Member.user_id == user_id, visible(Member.conversation_id))
    return StreamSession.conversation_id.in_(mine.order_by(newest.desc().nulls_last()).limit(limit))


def _narrowed(session: type[StreamSession], user_name: str | None, model: str | None) -> Sequence[ColumnElement[bool]]:
    """Those that a user has begun, and those of a model, where these are named."""
    of_user = session.user_id == select(User.id).where(User.name == user_name).scalar_subquery()
    of_model = session.model == model
    return [one for one, named in ((of_user, user_name), (of_model, model)) if named is not None]


def session_view(row: StreamSession, state: LogState | None = None, viewers: int = 0) -> SessionView:
    """The view of a row; of an ACTIVE one with what Redis says, where it was asked."""
    length, thinking_length = row.length or 0, row.thinking_length or 0
    phase = StreamPhase(row.phase)
    if row.length is None:
        thinking_length = row.checkpoint_thinking_length
        length = row.checkpoint_length - thinking_length
    if state is not None and row.length is None and state.end >= row.checkpoint_length:
        thinking_length, length = state.thinking_length, state.end - state.thinking_length
        phase = state.phase if row.claimed_at and state.phase is not StreamPhase.QUEUED else phase
    return SessionView(
        session_id=row.id,
        conversation_id=row.conversation_id,
        message_id=row.message_id,
        model=row.model,
        status=StreamStatus(row.status),
        phase=phase,
        reason=TerminationReason(row.reason) if row.reason else None,
        detail=row.detail,
        length=length,
        thinking_length=thinking_length,
        attempt=row.attempt,
        started_at=row.started_at,
        ended_at=row.ended_at,
        terminated_by=terminated_by(row),
        viewers=viewers,
        on_disconnect=row.on_disconnect,
    )


def done_data(row: StreamSession) -> bytes:
    """The data of `done`, from the committed row."""
    return orjson.dumps(
        {
            "status": row.status,
            "reason": row.reason,
            "messageId": str(row.message_id),
            "length": row.length,
            "thinkingLength": row.thinking_length,
            "sha256": row.sha256,
        }
    )


def _receipt(row: StreamSession, content: str) -> ReceiptView:
    reason = TerminationReason(str(row.reason))
    return ReceiptView(
        session_id=row.id,
        conversation_id=row.conversation_id,
        message_id=row.message_id,
        status=StreamStatus(row.status),
        reason=reason,
        already_ended=not reason.by_terminate_call,
        partial_response=content[: row.length or 0],
        length=row.length or 0,
        thinking_length=row.thinking_length or 0,
        sha256=row.sha256 or "",
        requested_at=row.stop_requested_at,
        fenced_at=row.fenced_at,
        upstream_closed_at=row.upstream_closed_at,
        committed_at=row.ended_at or row.started_at,
    )


def terminated_by(row: StreamSession) -> str | None:
    """Who asked for the ending, where that is what ended the session."""
    return row.stop_by if row.reason is not None and row.reason == row.stop_reason else None
