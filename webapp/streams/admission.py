"""Admission: what has to hold before a session begins, and the rows with which it does.

Every function takes the session of a transaction that the caller holds: it is admitted whole, or not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.orm import DeclarativeBase, Session

from webapp.config import Settings
from webapp.errors import Conflict, ConversationBusy, NotFound, TooManyStreams, Unavailable
from webapp.models import Conversation, Member, Message, MessageRole, OnDisconnect, Role, StreamSession, new_id, now
from webapp.streams import rows
from webapp.streams.lifecycle import StreamStatus, TerminationReason
from webapp.streams.ports import NewMessage, RequestKey, Rerun
from webapp.streams.timing import Timeouts, look_again_at


class Admission:
    """Lets sessions begin: a new message's, one that goes on with an answer, one that gives another."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def of_message(self, s: Session, new: NewMessage) -> StreamSession:
        """Write the question, the empty answer and an ACTIVE session.

        Raises:
            TooManyStreams: the user is at the cap.
            Unavailable: the queue is full.
            NotFound: the conversation is deleted.
            IntegrityError: the conversation has an ACTIVE session, or the request was made before.
        """
        self._require_room(s, new.user_id)
        if new.conversation_id:
            _require_visible(s, new.conversation_id)
        conversation_id = new.conversation_id or new_id()
        beginning = [] if new.conversation_id else _conversation(conversation_id, new)
        question = Message(id=new_id(), conversation_id=conversation_id, role=MessageRole.USER, content=new.content)
        answer = _answer(conversation_id, new.model)
        return self._begin(
            s,
            StreamSession(
                conversation_id=conversation_id,
                message_id=answer.id,
                user_id=new.user_id,
                model=new.model,
                options=new.options,
                think=new.think,
                keep_alive=new.keep_alive,
                on_disconnect=new.on_disconnect,
            ),
            answer,
            new.timeouts or Timeouts.of(self._settings),
            new.request_key,
            before=[*beginning, question],
        )

    def of_continuation(self, s: Session, rerun: Rerun) -> StreamSession:
        """Write an ACTIVE session that goes on with the message of one that has ended, from all of its text.

        Raises:
            ConversationBusy: that session, or another of the conversation, has not ended.
            Conflict: there is nothing to go on with: the answer is complete, was replaced, or was gone on with.
            TooManyStreams, Unavailable, NotFound, IntegrityError: as `of_message`.
        """
        old, message = self._ended(s, rerun)
        if old.reason == TerminationReason.STOP:
            raise Conflict("This answer is complete; retry it for another")
        if message.session_id != old.id:
            raise Conflict(
                "This answer was gone on with already; continue its latest stream", sessionId=str(message.session_id)
            )
        row = _repetition(old, message, rerun.user_id)
        row.checkpoint = message.thinking + message.content
        row.checkpoint_length = len(row.checkpoint)
        row.checkpoint_thinking_length = len(message.thinking)
        message.status, message.reason = StreamStatus.ACTIVE.value, None
        return self._begin(s, row, message, Timeouts.of_session(old, self._settings), rerun.request_key)

    def of_retry(self, s: Session, rerun: Rerun) -> StreamSession:
        """Write an ACTIVE session for another answer to the same question; the old one names it as its replacement.

        Raises:
            ConversationBusy: that session, or another of the conversation, has not ended.
            Conflict: it was replaced before, or more was said since.
            TooManyStreams, Unavailable, NotFound, IntegrityError: as `of_message`.
        """
        old, message = self._ended(s, rerun)
        # The conversation's newest, and not any that is newer: for that PostgreSQL would look through all that anybody
        # has said since.
        in_it = select(Message.id).where(Message.conversation_id == message.conversation_id)
        if s.scalar(in_it.order_by(Message.id.desc()).limit(1)) != message.id:
            raise Conflict("More was said since; only the latest answer can be retried")
        answer = _answer(message.conversation_id, old.model)
        s.add(answer)
        s.flush()
        message.replaced_by_id = answer.id
        row = _repetition(old, answer, rerun.user_id)
        return self._begin(s, row, answer, Timeouts.of_session(old, self._settings), rerun.request_key)

    def _ended(self, s: Session, rerun: Rerun) -> tuple[StreamSession, Message]:
        """The session that is to be repeated and its message, locked."""
        self._require_room(s, rerun.user_id)
        old = rows.get(s, rerun.session_id)
        if old is None:
            raise NotFound(f"There is no stream {rerun.session_id} that you can see")
        _require_visible(s, old.conversation_id)
        if (active := rows.active_in(s, old.conversation_id)) is not None:
            raise busy(active)
        message = s.get_one(Message, old.message_id, populate_existing=True, with_for_update=True)
        if message.replaced_by_id is not None:
            newer = s.get_one(Message, message.replaced_by_id)
            raise Conflict(
                "This answer was replaced by another; retry that one's stream",
                messageId=str(newer.id),
                sessionId=str(newer.session_id),
            )
        return old, message

    def _begin(
        self,
        s: Session,
        row: StreamSession,
        answer: Message,
        timeouts: Timeouts,
        key: RequestKey | None,
        before: Sequence[DeclarativeBase] = (),
    ) -> StreamSession:
        """The parts that every session has, put in behind what comes `before` them; what the database refuses is
        raised here."""
        moment = now()
        row.id = new_id()
        row.started_at = moment
        row.timeouts = asdict(timeouts)
        due = timeouts.due_in_queue(moment)
        row.due_at, row.due_reason = due.at, due.reason.value
        row.requeue_at = look_again_at(moment, moment, row.due_at)
        if row.on_disconnect == OnDisconnect.TERMINATE:
            row.abandon_at = moment + timedelta(seconds=self._settings.abandon_grace_seconds)
        answer.session_id = row.id
        was_there = answer in s
        if was_there:
            s.flush()
        kept_key = [rows.request_key(s, key, row.id, moment)] if key else []
        rows.put(s, *before, *([] if was_there else [answer]), row, *kept_key)
        return row

    def _require_room(self, s: Session, user_id: UUID) -> None:
        cap, queue_cap = self._settings.max_active_streams_per_user, self._settings.max_queued_streams
        if cap:
            rows.lock_user(s, user_id)
        active, queued = rows.crowd(s, user_id) if cap or queue_cap else (0, 0)
        if cap and active >= cap:
            raise TooManyStreams(
                f"You have {cap} active streams, the most allowed; stop one first", retry_after_seconds=5
            )
        if queue_cap and queued >= queue_cap:
            raise Unavailable("The queue is full; try again", retry_after_seconds=10)


def busy(session_id: UUID | None) -> ConversationBusy:
    """The refusal of a second session in a conversation; `session_id` is the first's, where it is known."""
    return ConversationBusy(
        "This conversation has an active stream; wait for its end, or stop it",
        sessionId=str(session_id) if session_id else None,
    )


def _require_visible(s: Session, conversation_id: UUID) -> None:
    if not rows.keep_visible(s, conversation_id):
        raise NotFound(f"There is no conversation {conversation_id} that you can see")


def _conversation(conversation_id: UUID, new: NewMessage) -> list[DeclarativeBase]:
    """A new one, and its owner."""
    title = " ".join(new.content.split())[:60]
    owner = Member(user_id=new.user_id, conversation_id=conversation_id, role=Role.OWNER)
    return [Conversation(id=conversation_id, title=title), owner]


def _answer(conversation_id: UUID, model: str) -> Message:
    return Message(
        id=new_id(),
        conversation_id=conversation_id,
        role=MessageRole.ASSISTANT,
        model=model,
        status=StreamStatus.ACTIVE,
    )


def _repetition(old: StreamSession, answer: Message, user_id: UUID) -> StreamSession:
    return StreamSession(
        conversation_id=old.conversation_id,
        message_id=answer.id,
        user_id=user_id,
        model=old.model,
        options=old.options,
        think=old.think,
        keep_alive=old.keep_alive,
        on_disconnect=old.on_disconnect,
    )
