"""Fills a database with a past: sessions that have ended, sessions that run and are well, and some that are due.

The past is written by the database itself, a million rows in one statement; what is alive goes through the models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import Connection, Engine, create_engine, text
from sqlalchemy.orm import Session

from webapp.models import (
    Conversation,
    IdempotencyKey,
    Member,
    Message,
    MessageRole,
    OnDisconnect,
    Role,
    SignInToken,
    StreamSession,
    User,
    db,
    new_id,
    now,
)
from webapp.streams.lifecycle import StreamPhase, TerminationReason

USERS: Final = 100
SESSIONS_PER_CONVERSATION: Final = 10
SMALL_ROWS: Final = 20_000
"""Rows of the tables that hold a day's worth: idempotency keys and sign-in tokens."""
PAST: Final = timedelta(days=29)
"""Over which the ended sessions are spread: a little less than the retention."""
LONG: Final = timedelta(days=60)
SOON: Final = timedelta(hours=1)


@dataclass(frozen=True)
class Words:
    """How a dialect says what the two say differently."""

    id: str  # the UUID of a number
    moment: str  # a moment, so many seconds after :since


_WORDS: Final[Mapping[str, Words]] = {
    "postgresql": Words(
        id="CAST(lpad(to_hex({n}), 32, '0') AS uuid)",
        moment="CAST(:since AS timestamptz) + ({seconds}) * interval '1 second'",
    ),
    "sqlite": Words(
        id="printf('%032x', {n})",
        moment="strftime('%Y-%m-%d %H:%M:%f', :since, '+' || ({seconds}) || ' seconds') || '000'",
    ),
}

_SERIES: Final = (
    "WITH RECURSIVE series (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM series WHERE n < {count}) SELECT {values} "
    "FROM series"
)
_EMPTY: Final = "'" + "e3b0c44298fc1c149afbf4c8996fb924" * 2 + "'"


Past = Callable[[Words, int], Iterator[tuple[str, int, dict[str, str]]]]
"""For so many ended sessions: table, number of rows, and the expression of each column, `n` being the row's number."""


def fill(database_url: str, ended: int, past: Past | None = None) -> None:
    """Make the tables, and a past of `ended` sessions with their messages, conversations, members and users."""
    engine = create_engine(database_url)
    db.metadata.create_all(engine)
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text("SET LOCAL session_replication_role = replica"))  # nothing points nowhere here
        for table, count, columns in (past or _past)(_WORDS[engine.dialect.name], ended):
            _insert(connection, table, count, columns, ended)
    analyse(engine)
    engine.dispose()


def analyse(engine: Engine) -> None:
    """Give PostgreSQL the statistics that its autovacuum would; nobody gives SQLite any."""
    if engine.dialect.name == "postgresql":
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("VACUUM ANALYZE"))


def _insert(connection: Connection, table: str, count: int, columns: Mapping[str, str], ended: int) -> None:
    series = _SERIES.format(count=count, values=", ".join(columns.values()))
    since = now() - PAST
    moment: Any = since if connection.dialect.name == "postgresql" else since.strftime("%Y-%m-%d %H:%M:%S")
    statement = text(f"INSERT INTO {table} ({', '.join(columns)}) {series}")
    values = {"since": moment, "step": PAST.total_seconds() / (ended + 1)}
    connection.execute(statement, {name: values[name] for name in values if f":{name}" in series})


def _past(words: Words, ended: int) -> Iterator[tuple[str, int, dict[str, str]]]:
    """What the reaper passes over: a session, and its answer, in each row of two tables."""
    conversations = max(1, ended // SESSIONS_PER_CONVERSATION)
    conversation = words.id.format(n=f"(n - 1) / {SESSIONS_PER_CONVERSATION} % {conversations} + 1")
    user = words.id.format(n=f"(n - 1) / {SESSIONS_PER_CONVERSATION} % {conversations} % {USERS} + 1")
    own = words.id.format(n="n")
    began = words.moment.format(seconds="n * :step")
    recent = words.moment.format(seconds=str(int(PAST.total_seconds())))
    yield "users", USERS, {"id": own, "name": "'user' || n", "token_hash": "'hash' || n", "created_at": recent}
    yield "conversations", conversations, {"id": own, "title": "'A conversation'", "created_at": recent}
    yield (
        "conversation_members",
        conversations,
        {"user_id": words.id.format(n=f"(n - 1) % {USERS} + 1"), "conversation_id": own, "role": "'owner'"},
    )
    yield (
        "messages",
        ended,
        {
            "id": own,
            "conversation_id": conversation,
            "role": "'assistant'",
            "content": "'An answer of no great length.'",
            "thinking": "''",
            "model": "'a-model'",
            "status": "'COMPLETED'",
            "reason": "'stop'",
            "session_id": own,
            "created_at": began,
        },
    )
    yield "stream_sessions", ended, ended_session(own, own, conversation, user, began)
    yield from small_tables(words, USERS)


def small_tables(words: Words, users: int) -> Iterator[tuple[str, int, dict[str, str]]]:
    """A day's idempotency keys and sign-in tokens, as many beside any past."""
    user, session = words.id.format(n=f"n % {users} + 1"), words.id.format(n="n")
    recent, later = (words.moment.format(seconds=str(int(past.total_seconds()))) for past in (PAST, 2 * PAST))
    key = {"key": "'key' || n", "body_sha256": _EMPTY, "session_id": session, "created_at": recent}
    yield "idempotency_keys", SMALL_ROWS, {"user_id": user, **key}
    yield "sign_in_tokens", SMALL_ROWS, {"token_hash": "'hash' || n", "user_id": user, "expires_at": later}


def ended_session(own: str, answer: str, conversation: str, user: str, moment: str) -> dict[str, str]:
    """The expressions of an ended session's columns, by those of its id, its answer's, and where and when it was."""
    moments = ("started_at", "claimed_at", "heartbeat_at", "due_at", "requeue_at", "fenced_at", "ended_at")
    return {
        "id": own,
        "conversation_id": conversation,
        "message_id": answer,
        "user_id": user,
        "model": "'a-model'",
        "on_disconnect": "'continue'",
        "status": "'COMPLETED'",
        "reason": "'stop'",
        "phase": "'GENERATING'",
        "epoch": "1",
        "attempt": "1",
        "owner": "'worker@one'",
        "due_reason": "'idle_timeout'",
        "checkpoint": "''",
        "checkpoint_length": "0",
        "checkpoint_thinking_length": "0",
        "length": "29",
        "thinking_length": "0",
        "sha256": _EMPTY,
        "published_at": moment,
        **dict.fromkeys(moments, moment),
    }


# What is alive


def add_healthy(s: Session, count: int) -> None:
    """ACTIVE sessions that are well: most run, every tenth waits for a worker, some end when nobody watches."""
    moment = now()
    watched = {"on_disconnect": OnDisconnect.TERMINATE.value, "abandon_at": moment + SOON}
    _add(
        s,
        _user(s),
        [
            (_active(moment) if number % 10 else _waiting(moment)) | ({} if number % 5 else watched)
            for number in range(count)
        ],
    )


def add_due(s: Session) -> dict[str, int]:
    """A hundred sessions, and ten small things, for the reaper. Returns what its pass must find of each kind."""
    user = _user(s)
    moment = now()
    ago = moment - timedelta(minutes=1)
    wanted: dict[str, tuple[int, dict[str, Any]]] = {
        "lost": (20, _active(moment) | {"heartbeat_at": ago}),
        "due": (20, _waiting(moment) | {"due_at": ago}),
        "abandoned": (20, _waiting(moment) | {"on_disconnect": OnDisconnect.TERMINATE.value, "abandon_at": ago}),
        "unclaimed": (10, _waiting(moment) | {"requeue_at": ago}),
        "unpublished": (10, _ended(ago) | {"published_at": None}),
        "old_sessions": (10, _ended(moment - LONG)),
    }
    _add(s, user, [row for count, row in wanted.values() for _ in range(count)])
    _add(s, user, [_ended(ago)] * 10, deleted_at=moment - LONG)
    for number in range(5):
        key = f"old {number} {new_id()}"
        s.add(IdempotencyKey(user_id=user, key=key, body_sha256="", session_id=new_id(), created_at=moment - LONG))
        s.add(SignInToken(token_hash=f"old {new_id()}", user_id=user, expires_at=ago))
    others = {"deleted_messages": 10, "deleted_conversations": 10, "old_request_keys": 5, "old_sign_in_tokens": 5}
    return {kind: count for kind, (count, _) in wanted.items()} | others


def _user(s: Session) -> Any:
    user = User(name=f"bench {new_id()}", token_hash=str(new_id()))
    s.add(user)
    s.flush()
    return user.id


def _active(moment: datetime) -> dict[str, Any]:
    """It runs, and was claimed after a wait longer than the moment at which the reaper was to look at it."""
    return {
        "owner": "worker@one",
        "epoch": 1,
        "attempt": 1,
        "phase": StreamPhase.GENERATING.value,
        "claimed_at": moment,
        "heartbeat_at": moment + SOON,
        "due_at": moment + SOON,
        "due_reason": TerminationReason.IDLE_TIMEOUT.value,
        "requeue_at": moment - SOON,
    }


def _waiting(moment: datetime) -> dict[str, Any]:
    return {
        "due_at": moment + SOON,
        "due_reason": TerminationReason.QUEUE_TIMEOUT.value,
        "requeue_at": moment + SOON,
    }


def _ended(moment: datetime) -> dict[str, Any]:
    return {
        "status": TerminationReason.STOP.status.value,
        "reason": TerminationReason.STOP.value,
        "length": 0,
        "thinking_length": 0,
        "sha256": _EMPTY.strip("'"),
        "ended_at": moment,
        "published_at": moment,
    }


def _add(s: Session, user: Any, sessions: Sequence[Mapping[str, Any]], deleted_at: datetime | None = None) -> None:
    """Each in a conversation of its own, with an empty answer."""
    conversations = [Conversation(id=new_id(), title="A conversation", deleted_at=deleted_at) for _ in sessions]
    s.add_all(conversations)
    s.flush()
    answers = [Message(id=new_id(), conversation_id=one.id, role=MessageRole.ASSISTANT.value) for one in conversations]
    s.add_all(Member(user_id=user, conversation_id=one.id, role=Role.OWNER.value) for one in conversations)
    s.add_all(answers)
    s.flush()
    for row, answer in zip(sessions, answers, strict=True):
        place = {"conversation_id": answer.conversation_id, "message_id": answer.id, "user_id": user}
        s.add(StreamSession(model="a-model", **place, **row))
