"""Retention: what is too old to be kept goes, in bounded batches, found by its index.

A batch is a transaction of its own, so that no writer waits long; what is left over waits for the next pass.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Final, cast

from sqlalchemy import CursorResult, Delete, delete, select, tuple_
from sqlalchemy.orm import Session

from webapp.config import Settings
from webapp.database import Database
from webapp.models import Conversation, IdempotencyKey, Message, SignInToken, StreamSession, now
from webapp.streams.rows import REQUEST_KEY_KEPT

BATCH: Final = 500
"""Rows that one transaction deletes."""
CONVERSATION_BATCH: Final = 20


class Retention:
    """Removes ended sessions, deleted conversations, and the keys and sign-in tokens that count no more."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._settings = settings

    def sweep(self) -> dict[str, int]:
        """One batch of each. Returns how many rows went.

        Raises:
            Unavailable: the database is down; what was deleted before stays deleted.
        """
        moment = now()
        ended_before = moment - timedelta(days=self._settings.session_retention_days)
        messages, conversations = self._conversations()
        return {
            "old_sessions": self._delete(self.old_sessions(ended_before)),
            "deleted_messages": messages,
            "deleted_conversations": conversations,
            "old_request_keys": self._delete(self.old_request_keys(moment - REQUEST_KEY_KEPT)),
            "old_sign_in_tokens": self._delete(self.old_sign_in_tokens(moment)),
        }

    def old_sessions(self, before: Any) -> Delete:
        """Ended sessions; their messages stay."""
        old = select(StreamSession.id).where(StreamSession.ended_at < before).order_by(StreamSession.ended_at)
        return delete(StreamSession).where(StreamSession.id.in_(_batch(old)))

    def old_request_keys(self, before: Any) -> Delete:
        """Idempotency keys that count no more."""
        key = (IdempotencyKey.user_id, IdempotencyKey.key)
        return delete(IdempotencyKey).where(
            tuple_(*key).in_(_batch(select(*key).where(IdempotencyKey.created_at < before)))
        )

    def old_sign_in_tokens(self, before: Any) -> Delete:
        """Sign-in tokens that nobody used in time."""
        old = select(SignInToken.token_hash).where(SignInToken.expires_at < before)
        return delete(SignInToken).where(SignInToken.token_hash.in_(_batch(old)))

    def _delete(self, statement: Delete) -> int:
        return self._database.write(lambda s: _rows(s, statement))

    def _conversations(self) -> tuple[int, int]:
        """The messages first, with their sessions, a batch a pass; a conversation once it has none left.

        Returns how many of both went.
        """
        before = now() - timedelta(days=self._settings.deleted_retention_days)
        old = select(Conversation.id).where(Conversation.deleted_at < before).order_by(Conversation.deleted_at)

        def work(s: Session) -> tuple[int, int]:
            ids = list(s.scalars(old.limit(CONVERSATION_BATCH)))
            if not ids:
                return 0, 0
            said = select(Message.id).where(Message.conversation_id.in_(ids))
            messages = _rows(s, delete(Message).where(Message.id.in_(_batch(said))))
            if messages == BATCH:
                return messages, 0
            return messages, _rows(s, delete(Conversation).where(Conversation.id.in_(ids)))

        return self._database.write(work)


def _batch(query: Any) -> Any:
    return query.limit(BATCH)


def _rows(s: Session, statement: Delete) -> int:
    options = {"synchronize_session": False}
    return cast(CursorResult[Any], s.execute(statement, execution_options=options)).rowcount
