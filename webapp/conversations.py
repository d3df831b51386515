"""Conversations, their members and messages. Who may do what is decided in `auth`, not here."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from webapp.database import Database
from webapp.errors import NotFound
from webapp.models import Conversation, Member, Message, Role, StreamSession, new_id, now
from webapp.streams.lifecycle import StreamStatus
from webapp.views import ConversationView, MessageView


class Conversations:
    """Every method raises `Unavailable` where the database is down."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, user_id: UUID, title: str) -> ConversationView:
        """A new conversation, owned by the user."""

        def work(s: Session) -> ConversationView:
            conversation = Conversation(id=new_id(), title=title)
            s.add(conversation)
            s.flush()
            s.add(Member(user_id=user_id, conversation_id=conversation.id, role=Role.OWNER))
            return _view(conversation, Role.OWNER)

        return self._database.write(work)

    def list(self, user_id: UUID, limit: int, before: UUID | None) -> tuple[list[ConversationView], UUID | None]:
        """The user's conversations, newest first; and the id that `before` takes for the next page, if there is one."""
        query = (
            select(Conversation, Member.role)
            .join(Member, Member.conversation_id == Conversation.id)
            .where(Member.user_id == user_id, Conversation.deleted_at.is_(None))
            .order_by(Member.conversation_id.desc())
            .limit(limit + 1)
        )
        if before is not None:
            query = query.where(Member.conversation_id < before)
        found = self._database.read(lambda s: [_view(one, role) for one, role in s.execute(query)])
        return found[:limit], found[limit - 1].id if len(found) > limit else None

    def get(self, user_id: UUID, conversation_id: UUID) -> ConversationView:
        """One conversation, as the user sees it.

        Raises:
            NotFound: there is none, it is deleted, or the user is no member: the same to all.
        """
        query = (
            select(Conversation, Member.role)
            .join(Member, Member.conversation_id == Conversation.id)
            .where(Member.user_id == user_id, Conversation.id == conversation_id, Conversation.deleted_at.is_(None))
        )
        found = self._database.read(lambda s: s.execute(query).first())
        if found is None:
            raise NotFound(f"There is no conversation {conversation_id} that you can see")
        return _view(found[0], found[1])

    def rename(self, conversation_id: UUID, title: str) -> None:
        """Give it another title."""
        where = Conversation.id == conversation_id
        self._database.write(lambda s: s.execute(update(Conversation).where(where).values(title=title)))

    def hide(self, conversation_id: UUID) -> None:
        """Nobody sees it any more; retention removes it later."""
        where = (Conversation.id == conversation_id) & Conversation.deleted_at.is_(None)
        self._database.write(lambda s: s.execute(update(Conversation).where(where).values(deleted_at=now())))

    def messages(self, conversation_id: UUID) -> Sequence[MessageView]:
        """All messages, oldest first; one still streaming shows what has been checkpointed."""
        query = (
            select(Message, StreamSession)
            .outerjoin(StreamSession, StreamSession.id == Message.session_id)
            .where(Message.conversation_id == conversation_id)
            .order_by(Message.id)
        )
        return self._database.read(lambda s: [_message(one, session) for one, session in s.execute(query)])


def _view(conversation: Conversation, role: str) -> ConversationView:
    return ConversationView(conversation.id, conversation.title, str(Role(role).value), conversation.created_at)


def _message(message: Message, session: StreamSession | None) -> MessageView:
    content, thinking = message.content, message.thinking
    if session is not None and session.status == StreamStatus.ACTIVE:
        thinking = session.checkpoint[: session.checkpoint_thinking_length]
        content = session.checkpoint[session.checkpoint_thinking_length :]
    return MessageView(
        id=message.id,
        role=message.role,
        content=content,
        thinking=thinking,
        status=message.status,
        reason=message.reason,
        detail=session.detail if session else None,
        model=message.model,
        session_id=message.session_id,
        replaced_by=message.replaced_by_id,
        length=len(content),
        created_at=message.created_at,
        stats=message.stats,
    )
