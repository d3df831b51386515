"""The statements on `stream_sessions`: each names the state, and where it matters the epoch, from which it moves.

Every function takes the session of a transaction that the caller holds. CLAIM, RECORD and COMMIT
are the steps of that name in `docs/model/`.

What every start and stop executes is put to the table, and not to the mapped class: the unit of work, and its
way of returning what an UPDATE wrote, cost more than the statement. A row that is given out has the columns of
`StreamSession` and cannot be changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, Final, cast
from uuid import UUID

import orjson
from sqlalchemy import (
    ColumnElement,
    CursorResult,
    Insert,
    Result,
    Table,
    Update,
    bindparam,
    case,
    delete,
    func,
    select,
    text,
    update,
)
from sqlalchemy.orm import DeclarativeBase, Session
from sqlalchemy.sql.dml import ReturningUpdate

from webapp.models import Conversation, IdempotencyKey, Member, Message, MessageRole, StreamSession, User, UTCDateTime
from webapp.streams.lifecycle import StreamPhase, StreamStatus, TerminationReason, sources_of
from webapp.streams.ports import RequestKey
from webapp.streams.timing import Due

REQUEST_KEY_KEPT: Final = timedelta(hours=24)
ACTIVE = StreamStatus.ACTIVE.value
_SESSIONS: Final = cast(Table, StreamSession.__table__)
_MESSAGES: Final = cast(Table, Message.__table__)
_IS_ACTIVE: Final = (_SESSIONS.c.id == bindparam("of_session")) & (_SESSIONS.c.status == ACTIVE)
_IS_QUEUED: Final = (_SESSIONS.c.status == ACTIVE) & _SESSIONS.c.owner.is_(None)
_ENDING_COLUMNS: Final = (
    "status",
    "reason",
    "detail",
    "length",
    "thinking_length",
    "sha256",
    "fenced_at",
    "upstream_closed_at",
    "ended_at",
)
_SAID_COLUMNS: Final = ("content", "thinking", "status", "reason", "stats")
_GET: Final = select(_SESSIONS).where(_SESSIONS.c.id == bindparam("of_session"))
_GET_WITH_TEXT: Final = (
    select(_SESSIONS, _MESSAGES.c.thinking, _MESSAGES.c.content)
    .join(_MESSAGES, _MESSAGES.c.id == _SESSIONS.c.message_id)
    .where(_SESSIONS.c.id == bindparam("of_session"))
)
_GET_AS_SEEN: Final = (
    select(_SESSIONS, case((Conversation.deleted_at.is_(None), Member.role)).label("role"))
    .join(Conversation, Conversation.id == _SESSIONS.c.conversation_id)
    .outerjoin(Member, (Member.conversation_id == Conversation.id) & (Member.user_id == bindparam("of_user")))
    .where(_SESSIONS.c.id == bindparam("of_session"))
)
_STATS: Final = (
    select(_MESSAGES.c.stats).where(_MESSAGES.c.id == _SESSIONS.c.message_id).correlate(_SESSIONS).scalar_subquery()
)


@dataclass(frozen=True, slots=True)
class Ending:
    """What COMMIT writes: the outcome that the fence decided, and the final text. `detail` is for a person."""

    reason: TerminationReason
    text: str
    thinking_length: int
    sha256: str
    fenced_at: datetime
    ended_at: datetime
    upstream_closed_at: datetime | None = None
    phase: StreamPhase | None = None
    detail: str | None = None
    stats: dict[str, Any] | None = None

    @property
    def thinking(self) -> str:
        return self.text[: self.thinking_length]

    @property
    def content(self) -> str:
        return self.text[self.thinking_length :]


@dataclass(frozen=True, slots=True)
class Beat:
    """A heartbeat of one session, with the text since its last checkpoint: the code points from `start` on; and
    when the worker is going to end it by itself, which another does where that worker is lost.

    `owner` takes back what it was taken for lost with, where nobody has claimed that since.
    """

    session_id: UUID
    epoch: int
    start: int
    delta: str
    thinking_length: int
    due: Due
    owner: str = ""


@dataclass(frozen=True, slots=True)
class BeatAnswer:
    """What the row said: how far it has the text, and a recorded stop request."""

    session_id: UUID
    checkpoint_length: int
    stop_reason: TerminationReason | None


def request_key(s: Session, request: RequestKey, session_id: UUID, at: datetime) -> IdempotencyKey:
    """What keeps a request's key with the session that it began, to be put; one too old to count gives way."""
    old = (IdempotencyKey.created_at < at - REQUEST_KEY_KEPT) & (IdempotencyKey.user_id == request.user_id)
    s.execute(delete(IdempotencyKey).where(old))
    return IdempotencyKey(
        user_id=request.user_id,
        key=request.key,
        body_sha256=request.body_sha256,
        session_id=session_id,
        created_at=at,
    )


def remembered_request(s: Session, request: RequestKey, at: datetime) -> IdempotencyKey | None:
    """What is kept of an earlier request with this key."""
    found = s.get(IdempotencyKey, (request.user_id, request.key))
    return found if found is not None and found.created_at >= at - REQUEST_KEY_KEPT else None


def get(s: Session, session_id: UUID) -> StreamSession | None:
    """The row as it is now."""
    return _one(s.execute(_GET, {"of_session": session_id}))


def get_with_text(s: Session, session_id: UUID) -> tuple[StreamSession, str, str] | None:
    """The row, and its message's thinking and content."""
    found = s.execute(_GET_WITH_TEXT, {"of_session": session_id}).one_or_none()
    return None if found is None else (cast(StreamSession, found), found.thinking, found.content)


def get_as_seen(s: Session, session_id: UUID, user_id: UUID) -> tuple[StreamSession, str | None] | None:
    """The row, and the user's role in its conversation; None where that is deleted, or the user is no member."""
    found = s.execute(_GET_AS_SEEN, {"of_session": session_id, "of_user": user_id}).one_or_none()
    return None if found is None else (cast(StreamSession, found), found.role)


def _one(found: Result[Any]) -> StreamSession | None:
    return cast(StreamSession | None, found.one_or_none())


def put(s: Session, *objects: DeclarativeBase) -> None:
    """Insert what was made, with its columns' defaults, which it has then too: in one statement on PostgreSQL, which
    looks at foreign keys when that is over; one after the other elsewhere."""
    made = [(cast(Table, one.__table__), _values_of(one)) for one in objects]
    if s.get_bind().dialect.name == "postgresql":
        statement = _inserting(tuple((table, tuple(values)) for table, values in made))
        s.execute(statement, {_name(at, key): said for at, (_, of) in enumerate(made) for key, said in of.items()})
    else:
        for table, values in made:
            s.execute(table.insert(), values)


def _values_of(made: DeclarativeBase) -> dict[str, Any]:
    table = cast(Table, made.__table__)
    for column in table.c:
        default: Any = column.default
        if default is not None and column.key not in made.__dict__:
            setattr(made, column.key, default.arg(None) if default.is_callable else default.arg)
    return {column.key: made.__dict__[column.key] for column in table.c if column.key in made.__dict__}


@lru_cache(maxsize=64)  # a statement that is made anew would be compiled anew
def _inserting(made: tuple[tuple[Table, tuple[str, ...]], ...]) -> Insert:
    *others, last = [
        table.insert().values({key: bindparam(_name(at, key)) for key in keys}) for at, (table, keys) in enumerate(made)
    ]
    return last.add_cte(*(other.cte(f"put_{at}") for at, other in enumerate(others)))


def _name(at: int, key: str) -> str:
    return f"put_{at}_{key}"


def is_active(session_id: UUID, epoch: int | None = None) -> ColumnElement[bool]:
    """The guard of a move: the session is ACTIVE and, where an epoch is named, still at it."""
    guard = (_SESSIONS.c.id == session_id) & (_SESSIONS.c.status == ACTIVE)
    return guard if epoch is None else guard & (_SESSIONS.c.epoch == epoch)


def _changes(s: Session, move: Update) -> bool:
    """Whether the move found its row in the state that it names."""
    return cast(CursorResult[Any], s.execute(move)).rowcount == 1


def _returning(move: Update) -> ReturningUpdate[Any]:
    """A move that gives out the row as it left it, where it found it in the state that it names."""
    return move.returning(*_SESSIONS.c)


_CLAIM: Final = _returning(
    _SESSIONS.update()
    .where(_IS_ACTIVE, _SESSIONS.c.epoch == bindparam("at_epoch"), _SESSIONS.c.owner.is_(None))
    .values(
        epoch=_SESSIONS.c.epoch + 1,
        attempt=_SESSIONS.c.attempt + 1,
        owner=bindparam("by_owner"),
        phase=StreamPhase.LOADING.value,
        claimed_at=func.coalesce(_SESSIONS.c.claimed_at, bindparam("moment", type_=UTCDateTime)),
        heartbeat_at=bindparam("moment", type_=UTCDateTime),
        due_at=bindparam("is_due_at"),
        due_reason=bindparam("is_due_for"),
    )
)


def claim(s: Session, session_id: UUID, epoch: int, owner: str, at: datetime, due: Due) -> StreamSession | None:
    """CLAIM: from ACTIVE and unowned at `epoch` to owned at the next; the row as it is then, or None."""
    values = {"by_owner": owner, "moment": at, "is_due_at": due.at, "is_due_for": due.reason.value}
    return _one(s.execute(_CLAIM, {"of_session": session_id, "at_epoch": epoch} | values))


def is_claimed_by(row: StreamSession, owner: str, moments: Sequence[datetime]) -> bool:
    """Whether the last that happened to an ACTIVE row is a claim of `owner` at one of these moments."""
    return row.status == ACTIVE and row.owner == owner and row.heartbeat_at in moments


def release(s: Session, session_id: UUID, epoch: int, due: Due | None = None) -> bool:
    """From owned at `epoch` to nobody's, so that another may claim it at the next; `due` None: its worker was lost,
    which is counted, and it is due when it was."""
    owned = is_active(session_id, epoch) & _SESSIONS.c.owner.is_not(None)
    values: dict[str, Any] = {"owner": None, "requeue_at": None}
    if due is None:
        values |= {"losses": _SESSIONS.c.losses + 1}
    else:
        values |= {"due_at": due.at, "due_reason": due.reason.value}
    return _changes(s, _SESSIONS.update().where(owned).values(values))


_RECORD: Final = _returning(
    _SESSIONS.update()
    .where(_IS_ACTIVE, _SESSIONS.c.stop_reason.is_(None))
    .values(
        stop_reason=bindparam("wanted_reason"),
        stop_by=bindparam("wanted_by"),
        stop_requested_at=bindparam("moment"),
        requeue_at=bindparam("moment"),
    )
)


def record_stop(
    s: Session, session_id: UUID, reason: TerminationReason, by: str | None, at: datetime
) -> StreamSession | None:
    """RECORD who wants the session to stop, and why; the first stays. Returns the row as it is then."""
    values = {"of_session": session_id, "wanted_reason": reason.value, "wanted_by": by, "moment": at}
    return _one(s.execute(_RECORD, values)) or get(s, session_id)


_END: Final = _returning(
    _SESSIONS.update()
    .where(
        _SESSIONS.c.id == bindparam("of_session"),
        _SESSIONS.c.epoch == bindparam("at_epoch"),
        _SESSIONS.c.status.in_(bindparam("sources", expanding=True)),
        _SESSIONS.c.checkpoint_length <= bindparam("text_length"),
    )
    .values(
        {name: bindparam(f"ending_{name}") for name in _ENDING_COLUMNS}
        | {"phase": func.coalesce(bindparam("ending_phase"), _SESSIONS.c.phase), "checkpoint": ""}
    )
)
_SAY: Final = _MESSAGES.update().values({name: bindparam(f"said_{name}") for name in _SAID_COLUMNS})
_SAY_TO: Final = _SAY.where(_MESSAGES.c.id == bindparam("of_message"))
_ENDED: Final = _END.cte("ended")
_END_AND_SAY: Final = select(_ENDED).add_cte(_SAY.where(_MESSAGES.c.id == _ENDED.c.message_id).cte("said"))
"""Both as one statement, which PostgreSQL can, and which saves three round trips."""


def commit(s: Session, session_id: UUID, epoch: int, ending: Ending) -> StreamSession | None:
    """COMMIT: from ACTIVE at `epoch` to its end, with the message, as one: on PostgreSQL in one statement, elsewhere in
    the caller's transaction.

    Returns the row as it is then; None, having written nothing, where the session has ended or moved to another epoch,
    or has a checkpoint that is longer than that text.
    """
    status = ending.reason.status
    where = {
        "of_session": session_id,
        "at_epoch": epoch,
        "sources": [source.value for source in sources_of(status)],
        "text_length": len(ending.text),
    }
    end = {
        "ending_status": status.value,
        "ending_reason": ending.reason.value,
        "ending_detail": ending.detail,
        "ending_phase": ending.phase and ending.phase.value,
        "ending_length": len(ending.content),
        "ending_thinking_length": ending.thinking_length,
        "ending_sha256": ending.sha256,
        "ending_fenced_at": ending.fenced_at,
        "ending_upstream_closed_at": ending.upstream_closed_at,
        "ending_ended_at": ending.ended_at,
    }
    say = {
        "said_content": ending.content,
        "said_thinking": ending.thinking,
        "said_status": status.value,
        "said_reason": ending.reason.value,
        "said_stats": ending.stats,
    }
    if s.get_bind().dialect.name == "postgresql":
        return _one(s.execute(_END_AND_SAY, where | end | say))
    ended = _one(s.execute(_END, where | end))
    if ended is not None:
        s.execute(_SAY_TO, say | {"of_message": ended.message_id})
    return ended


_PUBLISHED: Final = (
    _SESSIONS.update()
    .where(
        _SESSIONS.c.id == bindparam("of_session"),
        _SESSIONS.c.status != ACTIVE,
        _SESSIONS.c.published_at.is_(None),
    )
    .values(published_at=bindparam("moment"))
    .returning(*_SESSIONS.c, _STATS.label("stats"))
)


def published(s: Session, session_id: UUID, at: datetime) -> tuple[StreamSession, dict[str, Any]] | None:
    """Note that `done` is in the log, or that the log is gone and the database serves; once.

    Returns the row and the upstream's own figures to whoever was the one to note it.
    """
    noted = s.execute(_PUBLISHED, {"of_session": session_id, "moment": at}).one_or_none()
    return None if noted is None else (cast(StreamSession, noted), noted.stats or {})


def beat(s: Session, beats: Sequence[Beat], at: datetime) -> list[BeatAnswer]:
    """Heartbeats and checkpoints of many sessions in one statement.

    A delta is taken only where the checkpoint ends at its start, so a repeated one adds nothing.
    Sessions that have ended, or are at another epoch, do not answer.
    """
    statement, moment = _BEATS[s.get_bind().dialect.name]
    told = [
        {
            "id": one.session_id.hex,
            "epoch": one.epoch,
            "start": one.start,
            "delta": one.delta,
            "thinking": one.thinking_length,
            "due_at": f"{one.due.at.astimezone(UTC):{moment}}",
            "due_reason": one.due.reason.value,
            "owner": one.owner,
        }
        for one in beats
    ]
    answers = s.execute(statement, {"beats": orjson.dumps(told).decode(), "at": at}).all()
    return [
        BeatAnswer(one.session_id, by_id[1], TerminationReason(by_id[2]) if by_id[2] else None)
        for one, by_id in _matched(beats, answers)
    ]


# All sessions are one parameter: a statement with so many for each of them would be another for each number of
# sessions, compiled anew, and kept by SQLAlchemy for the next time.
_BEAT: Final = """
WITH beat AS ({told})
UPDATE stream_sessions SET
  heartbeat_at = :at,
  owner = COALESCE(stream_sessions.owner, NULLIF(beat.owner, '')),
  due_at = beat.due_at,
  due_reason = beat.due_reason,
  checkpoint = CASE WHEN checkpoint_length = beat.start THEN checkpoint || beat.delta ELSE checkpoint END,
  checkpoint_thinking_length =
    CASE WHEN checkpoint_length = beat.start THEN beat.thinking ELSE checkpoint_thinking_length END,
  checkpoint_length =
    CASE WHEN checkpoint_length = beat.start THEN checkpoint_length + length(beat.delta) ELSE checkpoint_length END
FROM beat
WHERE stream_sessions.id = beat.id AND stream_sessions.epoch = beat.epoch AND stream_sessions.status = 'ACTIVE'
RETURNING stream_sessions.id, stream_sessions.checkpoint_length, stream_sessions.stop_reason
"""
_TOLD_TO_POSTGRESQL: Final = """
SELECT * FROM json_to_recordset(CAST(:beats AS json)) AS told
  (id uuid, epoch int, start int, delta text, thinking int, due_at timestamptz, due_reason text, owner text)
"""
_TOLD_TO_SQLITE: Final = """
SELECT
  json_extract(value, '$.id') AS id,
  json_extract(value, '$.epoch') AS epoch,
  json_extract(value, '$.start') AS start,
  json_extract(value, '$.delta') AS delta,
  json_extract(value, '$.thinking') AS thinking,
  json_extract(value, '$.due_at') AS due_at,
  json_extract(value, '$.due_reason') AS due_reason,
  json_extract(value, '$.owner') AS owner
FROM json_each(:beats)
"""
_BEATS: Final = {
    dialect: (text(_BEAT.format(told=told)).bindparams(bindparam("at", type_=UTCDateTime)), moment)
    for dialect, told, moment in (
        ("postgresql", _TOLD_TO_POSTGRESQL, "%Y-%m-%d %H:%M:%S.%f+00"),
        ("sqlite", _TOLD_TO_SQLITE, "%Y-%m-%d %H:%M:%S.%f"),
    )
}
"""By dialect; and how a moment is written there, in UTC: SQLite keeps it as text."""


def _matched(beats: Sequence[Beat], rows: Sequence[Any]) -> list[tuple[Beat, Any]]:
    by_id = {UUID(str(row[0])): row for row in rows}
    return [(one, by_id[one.session_id]) for one in beats if one.session_id in by_id]


def lost(s: Session, before: datetime, limit: int) -> list[StreamSession]:
    """Owned sessions whose heartbeat is older than `before`."""
    where = (StreamSession.status == ACTIVE) & StreamSession.owner.is_not(None) & (StreamSession.heartbeat_at < before)
    return list(s.scalars(select(StreamSession).where(where).order_by(StreamSession.heartbeat_at).limit(limit)))


def unclaimed(s: Session, at: datetime, limit: int) -> list[UUID]:
    """Sessions without an owner that are to be looked at again by now."""
    due = StreamSession.requeue_at.is_(None) | (StreamSession.requeue_at <= at)
    where = (StreamSession.status == ACTIVE) & StreamSession.owner.is_(None) & due
    return list(
        s.scalars(select(StreamSession.id).where(where).order_by(StreamSession.requeue_at.nulls_first()).limit(limit))
    )


def due(s: Session, at: datetime, limit: int) -> list[StreamSession]:
    """Sessions that were to be over by themselves by `at`."""
    where = (StreamSession.status == ACTIVE) & (StreamSession.due_at <= at)
    return list(s.scalars(select(StreamSession).where(where).order_by(StreamSession.due_at).limit(limit)))


def abandoned(s: Session, at: datetime, limit: int) -> list[UUID]:
    """Sessions that nobody has watched for their grace."""
    where = (StreamSession.status == ACTIVE) & (StreamSession.abandon_at <= at)
    return list(s.scalars(select(StreamSession.id).where(where).order_by(StreamSession.abandon_at).limit(limit)))


def watched(s: Session, session_ids: Sequence[UUID], until: datetime) -> None:
    """Put off the moment at which these count as abandoned; never to an earlier one."""
    s.execute(
        update(StreamSession)
        .where(StreamSession.id.in_(session_ids), StreamSession.status == ACTIVE, StreamSession.abandon_at < until)
        .values(abandon_at=until)
    )


def unpublished(s: Session, before: datetime, limit: int) -> list[UUID]:
    """Sessions that ended before `before` and whose `done` is not known to be in the log."""
    where = (StreamSession.status != ACTIVE) & StreamSession.published_at.is_(None) & (StreamSession.ended_at < before)
    return list(s.scalars(select(StreamSession.id).where(where).order_by(StreamSession.ended_at).limit(limit)))


def look_again(s: Session, session_id: UUID, at: datetime) -> None:
    """Note when the reaper is to look at a session that nobody has claimed by then."""
    s.execute(_SESSIONS.update().where(is_active(session_id)).values(requeue_at=at))


def look_at_all(s: Session, at: datetime) -> int:
    """Have the reaper look now at all sessions that nobody has claimed; how many would have had to wait."""
    where = (StreamSession.status == ACTIVE) & StreamSession.owner.is_(None) & (StreamSession.requeue_at > at)
    found: Any = s.execute(update(StreamSession).where(where).values(requeue_at=at))
    return int(found.rowcount)


def lock_user(s: Session, user_id: UUID) -> None:
    """Let no other transaction count this user's sessions before this one ends; SQLite has one writer anyway."""
    s.execute(select(User.id).where(User.id == user_id).with_for_update(key_share=True))


def keep_visible(s: Session, conversation_id: UUID) -> bool:
    """Whether a conversation is not deleted; it cannot be before this transaction ends."""
    where = (Conversation.id == conversation_id) & Conversation.deleted_at.is_(None)
    return s.scalar(select(Conversation.id).where(where).with_for_update(read=True)) is not None


def active_in(s: Session, conversation_id: UUID) -> UUID | None:
    """The conversation's ACTIVE session."""
    where = (StreamSession.conversation_id == conversation_id) & (StreamSession.status == ACTIVE)
    return s.scalar(select(StreamSession.id).where(where))


_CROWD: Final = select(
    select(func.count())
    .select_from(_SESSIONS)
    .where(_SESSIONS.c.user_id == bindparam("of_user"), _SESSIONS.c.status == ACTIVE)
    .scalar_subquery(),
    select(func.count()).select_from(_SESSIONS).where(_IS_QUEUED).scalar_subquery(),
)


def crowd(s: Session, user_id: UUID) -> tuple[int, int]:
    """How many sessions of a user are ACTIVE; and how many of anybody's no worker has claimed."""
    active, queued = s.execute(_CROWD, {"of_user": user_id}).one()
    return active, queued


def queue_position(s: Session, session_id: UUID) -> int:
    """How many sessions that no worker has claimed are older than this one."""
    # Not in `where`: SQLite would go through all ids below it, instead of through the queue's own index.
    counted = func.count().filter(_SESSIONS.c.id < session_id)
    return s.scalar(select(counted).select_from(_SESSIONS).where(_IS_QUEUED)) or 0


def history(s: Session, row: StreamSession, limit_characters: int) -> list[dict[str, str]]:
    """What was said before this answer, oldest first, as the upstream wants it.

    Bounded by code points, newest first; the question itself is always there.
    """
    where = (
        (Message.conversation_id == row.conversation_id)
        & (Message.id < row.message_id)
        & Message.replaced_by_id.is_(None)
        & (Message.content != "")
    )
    said: list[dict[str, str]] = []
    for message in s.execute(
        select(Message.role, Message.content).where(where).order_by(Message.id.desc()).limit(1000)
    ):
        limit_characters -= len(message.content)
        if limit_characters < 0 and said:
            break
        said.append({"role": message.role, "content": message.content})
    while len(said) > 1 and said[-1]["role"] != MessageRole.USER:
        said.pop()  # a history that was cut begins with a question
    return said[::-1]
