"""Conversations, their members and messages. Who may do what is decided in `auth`, not here."""

from __future__ import annotations

import builtins
from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import ColumnElement, func, select, update
from sqlalchemy.orm import InstrumentedAttribute, Session

from webapp.accounts import NAME
from webapp.database import Database
from webapp.errors import Conflict, NotFound
from webapp.models import Conversation, Member, Message, Role, StreamSession, User, new_id, now
from webapp.streams.lifecycle import StreamStatus
from webapp.views import ConversationView, MemberView, MessageView


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

    def list(
        self, user_id: UUID, limit: int, before: UUID | None, search: str | None = None
    ) -> tuple[list[ConversationView], UUID | None]:
        """The user's conversations, newest first; and the id that `before` takes for the next page, if there is one.

        `search`: only those that have it in the title or in a message, upper case or lower (on SQLite only of ASCII's
        letters). It reads the user's messages one by one.
        """
        # The page first, by the members' index: in a join PostgreSQL goes through everybody's conversations beside it.
        mine = select(Member.conversation_id, Member.role).where(Member.user_id == user_id)
        mine = mine.where(visible(Member.conversation_id))
        if before is not None:
            mine = mine.where(Member.conversation_id < before)
        if search:
            mine = mine.where(self._mentions(search))
        page = mine.order_by(Member.conversation_id.desc()).limit(limit + 1).subquery()
        query = (
            select(Conversation, page.c.role)
            .join(page, page.c.conversation_id == Conversation.id)
            .order_by(page.c.conversation_id.desc())
        )
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

    def _mentions(self, text: str) -> ColumnElement[bool]:
        """Whether a member's conversation has the text in its title or in one of its messages.

        Not by LIKE, which for some patterns and texts takes as many steps as both are long together; and under gevent
        SQLite has nobody else run meanwhile.
        """
        find = func.instr if self._database.engine.dialect.name == "sqlite" else func.strpos
        needle = func.lower(text)
        titled = find(func.lower(Conversation.title), needle) > 0
        said = find(func.lower(Message.content), needle) > 0
        in_title = select(Conversation.id).where(Conversation.id == Member.conversation_id, titled)
        in_message = select(Message.id).where(Message.conversation_id == Member.conversation_id, said)
        return in_title.correlate(Member).exists() | in_message.correlate(Member).exists()

    def last_message_id(self, conversation_id: UUID) -> UUID | None:
        """The newest message, by which a reader sees whether there is anything new."""
        query = select(Message.id).where(Message.conversation_id == conversation_id)
        return self._database.read(lambda s: s.scalar(query.order_by(Message.id.desc()).limit(1)))

    def rename(self, conversation_id: UUID, title: str) -> None:
        """Give it another title."""
        where = Conversation.id == conversation_id
        self._database.write(lambda s: s.execute(update(Conversation).where(where).values(title=title)))

    def hide(self, conversation_id: UUID) -> None:
        """Nobody sees it any more; retention removes it later."""
        where = (Conversation.id == conversation_id) & Conversation.deleted_at.is_(None)
        self._database.write(lambda s: s.execute(update(Conversation).where(where).values(deleted_at=now())))

    def members(self, conversation_id: UUID) -> builtins.list[MemberView]:
        """Who belongs to it, by name."""
        query = (
            select(User.name, Member.role)
            .join(Member, Member.user_id == User.id)
            .where(Member.conversation_id == conversation_id)
            .order_by(User.name)
        )
        return self._database.read(lambda s: [MemberView(name, role) for name, role in s.execute(query)])

    def set_member(self, conversation_id: UUID, name: str, role: Role) -> MemberView:
        """Make a user a member, or give a member another role.

        Raises:
            NotFound: there is no such user, or it is disabled.
            Conflict: it is the last owner.
        """

        def work(s: Session) -> MemberView:
            _lock(s, conversation_id)
            user = _user_named(s, name)
            if user is None or user.disabled_at:
                raise NotFound(f"There is no user {name!r}")
            member = s.get(Member, (user.id, conversation_id))
            if member is None:
                s.add(Member(user_id=user.id, conversation_id=conversation_id, role=role))
            else:
                _keep_an_owner(s, member, role)
                member.role = role
            return MemberView(user.name, role.value)

        return self._database.write(work)

    def remove_member(self, conversation_id: UUID, name: str) -> None:
        """Take a member out; what it has said stays.

        Raises:
            NotFound: there is no such member.
            Conflict: it is the last owner.
        """

        def work(s: Session) -> None:
            _lock(s, conversation_id)
            user = _user_named(s, name)
            member = s.get(Member, (user.id, conversation_id)) if user else None
            if member is None:
                raise NotFound(f"{name!r} is no member of this conversation")
            _keep_an_owner(s, member, None)
            s.delete(member)

        self._database.write(work)

    def messages(self, conversation_id: UUID) -> Sequence[MessageView]:
        """All messages, oldest first; one still streaming shows what has been checkpointed."""
        query = (
            select(Message, StreamSession)
            .outerjoin(StreamSession, StreamSession.id == Message.session_id)
            .where(Message.conversation_id == conversation_id)
            .order_by(Message.id)
        )
        return self._database.read(lambda s: [_message(one, session) for one, session in s.execute(query)])


def visible(conversation_id: InstrumentedAttribute[UUID]) -> ColumnElement[bool]:
    """Whether a conversation is not deleted: a condition on another table's rows, asked of one row after the other.

    A scalar, which no database turns into a join: its order, and the index it is read by, stay the query's own.
    """
    found = select(Conversation.id).where(Conversation.id == conversation_id, Conversation.deleted_at.is_(None))
    return found.correlate(conversation_id.class_).scalar_subquery().is_not(None)


def _view(conversation: Conversation, role: str) -> ConversationView:
    return ConversationView(conversation.id, conversation.title, str(Role(role).value), conversation.created_at)


def _lock(s: Session, conversation_id: UUID) -> None:
    """Changes of one conversation's members come one after the other; SQLite's writers do anyway.

    Not against messages that begin: `FOR NO KEY UPDATE` lets rows that refer to the conversation be made.
    """
    query = select(Conversation.id).where(Conversation.id == conversation_id, Conversation.deleted_at.is_(None))
    if s.scalar(query.with_for_update(key_share=True)) is None:
        raise NotFound(f"There is no conversation {conversation_id} that you can see")


def _user_named(s: Session, name: str) -> User | None:
    # What no name can be is not asked for: PostgreSQL refuses some of it.
    return s.scalar(select(User).where(User.name == name)) if NAME.fullmatch(name) else None


def _keep_an_owner(s: Session, member: Member, role: Role | None) -> None:
    """Somebody who can sign in must be left to manage the conversation.

    Raises:
        Conflict: `member` is the last such owner, and would be one no longer.
    """
    if member.role != Role.OWNER or role is Role.OWNER:
        return
    others = (
        select(Member.user_id)
        .join(User, User.id == Member.user_id)
        .where(Member.conversation_id == member.conversation_id, Member.user_id != member.user_id)
        .where(Member.role == Role.OWNER, User.disabled_at.is_(None))
    )
    if s.scalars(others).first() is None:
        raise Conflict("This is the last owner of the conversation: make another member an owner first")


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
