"""Tables and constraints; no behaviour.

The database itself guards what must hold: one ACTIVE session a conversation, known words only,
and no row that points nowhere. Ids are UUIDv7: they sort by time and cannot be guessed.
"""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

import uuid_utils.compat
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import (
    JSON,
    CheckConstraint,
    DateTime,
    Dialect,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Text,
    TypeDecorator,
    Uuid,
    false,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from webapp.streams.lifecycle import StreamPhase, StreamStatus, TerminationReason


class Base(DeclarativeBase):
    """Constraints have predictable names, so that migrations can drop them."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


db = SQLAlchemy(model_class=Base)


class UTCDateTime(TypeDecorator[datetime]):
    """A moment in UTC, aware on every database; SQLite itself forgets the zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return value if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return value if value is None or value.tzinfo else value.replace(tzinfo=UTC)


class Role(StrEnum):
    """What a member may do in a conversation."""

    OWNER = "owner"
    EDITOR = "editor"
    VIEWER = "viewer"


class MessageRole(StrEnum):
    """Who speaks."""

    USER = "user"
    ASSISTANT = "assistant"


class OnDisconnect(StrEnum):
    """What becomes of a stream that nobody watches."""

    CONTINUE = "continue"
    TERMINATE = "terminate"


def new_id() -> UUID:
    """A UUIDv7 (RFC 9562): its first 48 bits are the time in milliseconds."""
    return uuid_utils.compat.uuid7()


def now() -> datetime:
    """This moment, in UTC."""
    return datetime.now(UTC)


def _one_of(column: str, words: type[StrEnum]) -> CheckConstraint:
    listed = ", ".join(f"'{word.value}'" for word in words)
    return CheckConstraint(f"{column} IN ({listed})", name=column)


class User(db.Model):  # type: ignore[name-defined]
    __tablename__ = "users"

    id: Mapped[UUID] = mapped_column(Uuid, primary_key=True, default=new_id)
    name: Mapped[str] = mapped_column(String(100), unique=True)
    token_hash: Mapped[str] = mapped_column(String(64), unique=True)
    token_used_at: Mapped[datetime | None] = mapped_column(UTCDateTime)
    operator: Mapped[bool] = mapped_column(default=False, server_default=false())
    created_at: Mapped[datetime] = mapped_column(UTCDateTime, default=now)
    disabled_at: Mapped[datetime | None] = mapped_column(UTCDateTime)


class IdempotencyKey(db.Model):  # type: ignore[name-defined]
    """A client's name for a request, so that its repetition is known; the session may go before it."""

    __tablename__ = "idempotency_keys"

    user_id: Mapped[UUID] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"), primary_key=True)
    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    body_sha256: Mapped[str] = mapped_column(String(64))
    session_id: Mapped[UUID] = mapped_column(Uuid)
    created_at: Mapped[datetime] = mapped_column(UTCDateTime, default=now, index=True)


class SignInToken(db.Model):  # type: ignore[name-defined]
    """A token for one sign-in at the page; kept as its hash."""

    __tablename__ = "sign_in_tokens"

    token_hash: Mapped[str] = mapped_column(String(64), primary_key=True)
    user_id: Mapped[UUID] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"), index=True)
    expires_at: Mapped[datetime] = mapped_column(UTCDateTime, index=True)


class Conversation(db.Model):  # type: ignore[name-defined]
    __tablename__ = "conversations"

    id: Mapped[UUID] = mapped_column(Uuid, primary_key=True, default=new_id)
    title: Mapped[str] = mapped_column(String(200))
    created_at: Mapped[datetime] = mapped_column(UTCDateTime, default=now)
    deleted_at: Mapped[datetime | None] = mapped_column(UTCDateTime)

    __table_args__ = (
        Index(
            None,
            "deleted_at",
            sqlite_where=text("deleted_at IS NOT NULL"),
            postgresql_where=text("deleted_at IS NOT NULL"),
        ),
    )


class Member(db.Model):  # type: ignore[name-defined]
    __tablename__ = "conversation_members"

    user_id: Mapped[UUID] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"), primary_key=True)
    conversation_id: Mapped[UUID] = mapped_column(
        ForeignKey("conversations.id", ondelete="CASCADE"), primary_key=True, index=True
    )
    role: Mapped[str] = mapped_column(String(10))

    __table_args__ = (_one_of("role", Role),)


class Message(db.Model):  # type: ignore[name-defined]
    """What was said. `status` and `reason` of an answer are its latest session's, written with its ending."""

    __tablename__ = "messages"

    id: Mapped[UUID] = mapped_column(Uuid, primary_key=True, default=new_id)
    conversation_id: Mapped[UUID] = mapped_column(ForeignKey("conversations.id", ondelete="CASCADE"))
    role: Mapped[str] = mapped_column(String(10))
    content: Mapped[str] = mapped_column(Text, default="")
    thinking: Mapped[str] = mapped_column(Text, default="")
    model: Mapped[str | None] = mapped_column(String(200))
    status: Mapped[str | None] = mapped_column(String(10))
    reason: Mapped[str | None] = mapped_column(String(24))
    # No foreign key: retention removes old sessions, and the message goes on naming its own.
    session_id: Mapped[UUID | None] = mapped_column(Uuid)
    replaced_by_id: Mapped[UUID | None] = mapped_column(ForeignKey("messages.id", ondelete="SET NULL"))
    stats: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    created_at: Mapped[datetime] = mapped_column(UTCDateTime, default=now)

    __table_args__ = (
        _one_of("role", MessageRole),
        _one_of("status", StreamStatus),
        _one_of("reason", TerminationReason),
        Index(None, "conversation_id", "id"),
        Index(None, "replaced_by_id"),
    )


_ACTIVE: dict[str, Any] = {"sqlite_where": text("status = 'ACTIVE'"), "postgresql_where": text("status = 'ACTIVE'")}
_UNCLAIMED = text("status = 'ACTIVE' AND owner IS NULL")
_UNPUBLISHED = text("published_at IS NULL AND status <> 'ACTIVE'")


class StreamSession(db.Model):  # type: ignore[name-defined]
    """One run of a model for one answer: who owns it, and how it ended. Lengths are in code points."""

    __tablename__ = "stream_sessions"

    id: Mapped[UUID] = mapped_column(Uuid, primary_key=True, default=new_id)
    conversation_id: Mapped[UUID] = mapped_column(ForeignKey("conversations.id", ondelete="CASCADE"))
    message_id: Mapped[UUID] = mapped_column(ForeignKey("messages.id", ondelete="CASCADE"), index=True)
    user_id: Mapped[UUID] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"))
    model: Mapped[str] = mapped_column(String(200))
    options: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    think: Mapped[bool | str | None] = mapped_column(JSON)
    keep_alive: Mapped[str | None] = mapped_column(String(20))
    on_disconnect: Mapped[str] = mapped_column(String(10), default=OnDisconnect.CONTINUE.value)
    timeouts: Mapped[dict[str, float] | None] = mapped_column(JSON)

    status: Mapped[str] = mapped_column(String(10), default=StreamStatus.ACTIVE.value)
    reason: Mapped[str | None] = mapped_column(String(24))
    detail: Mapped[str | None] = mapped_column(Text)
    phase: Mapped[str] = mapped_column(String(10), default=StreamPhase.QUEUED.value)

    # Who owns it
    epoch: Mapped[int] = mapped_column(Integer, default=0)
    attempt: Mapped[int] = mapped_column(Integer, default=0)
    losses: Mapped[int] = mapped_column(Integer, default=0, server_default=text("0"))
    owner: Mapped[str | None] = mapped_column(String(200))
    requeue_at: Mapped[datetime | None] = mapped_column(UTCDateTime)
    claimed_at: Mapped[datetime | None] = mapped_column(UTCDateTime)
    heartbeat_at: Mapped[datetime | None] = mapped_column(UTCDateTime)

    # When it is over by itself, unless something happens before, and why
    due_at: Mapped[datetime | None] = mapped_column(UTCDateTime)
    due_reason: Mapped[str | None] = mapped_column(String(24))
    abandon_at: Mapped[datetime | None] = mapped_column(UTCDateTime)

    # What a crash leaves
    checkpoint: Mapped[str] = mapped_column(Text, default="")
    checkpoint_length: Mapped[int] = mapped_column(Integer, default=0)
    checkpoint_thinking_length: Mapped[int] = mapped_column(Integer, default=0)

    # The stop request: the first one stays
    stop_reason: Mapped[str | None] = mapped_column(String(24))
    stop_by: Mapped[str | None] = mapped_column(String(100))
    stop_requested_at: Mapped[datetime | None] = mapped_column(UTCDateTime)

    # The ending
    length: Mapped[int | None] = mapped_column(Integer)
    thinking_length: Mapped[int | None] = mapped_column(Integer)
    sha256: Mapped[str | None] = mapped_column(String(64))
    started_at: Mapped[datetime] = mapped_column(UTCDateTime, default=now)
    fenced_at: Mapped[datetime | None] = mapped_column(UTCDateTime)
    upstream_closed_at: Mapped[datetime | None] = mapped_column(UTCDateTime)
    ended_at: Mapped[datetime | None] = mapped_column(UTCDateTime)
    published_at: Mapped[datetime | None] = mapped_column(UTCDateTime)

    __table_args__ = (
        _one_of("status", StreamStatus),
        _one_of("reason", TerminationReason),
        _one_of("stop_reason", TerminationReason),
        _one_of("phase", StreamPhase),
        _one_of("on_disconnect", OnDisconnect),
        CheckConstraint("(status = 'ACTIVE') = (ended_at IS NULL)", name="ended"),
        CheckConstraint("(status = 'ACTIVE') = (reason IS NULL)", name="has_reason"),
        Index("uq_stream_sessions_active_conversation", "conversation_id", unique=True, **_ACTIVE),
        # Two have the status, which all in them share: SQLite takes the index that more of a question's columns are in,
        # and would count among all that a user ever began, or the queue among all that is ACTIVE.
        Index("ix_stream_sessions_active_user", "user_id", "status", **_ACTIVE),
        Index("ix_stream_sessions_active_heartbeat", "heartbeat_at", **_ACTIVE),
        Index(
            "ix_stream_sessions_unclaimed",
            "requeue_at",
            "status",
            sqlite_where=_UNCLAIMED,
            postgresql_where=_UNCLAIMED,
        ),
        Index("ix_stream_sessions_active_due", "due_at", **_ACTIVE),
        Index("ix_stream_sessions_active_abandoned", "abandon_at", **_ACTIVE),
        Index(None, "ended_at"),
        Index("ix_stream_sessions_unpublished", "ended_at", sqlite_where=_UNPUBLISHED, postgresql_where=_UNPUBLISHED),
        Index(None, "conversation_id", "id"),
        Index(None, "user_id", "id"),
    )
