"""The product's core over a test's own database and the session's Valkey, with a queue that only records.

`World` holds the services; `Worker` takes the steps of a worker one by one, so that a test decides their order.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch
from uuid import UUID

import redis
from sqlalchemy import Engine, func, select, update

from webapp.app import Services, make_services
from webapp.calls import Calls
from webapp.config import Settings
from webapp.database import Database
from webapp.models import Member, Message, Role, StreamSession, User, db, now
from webapp.operations import Operations
from webapp.streams.events import DONE, MESSAGE, LogEntry
from webapp.streams.keys import log_key, state_key
from webapp.streams.lifecycle import StreamPhase, TerminationReason
from webapp.streams.log import Answer, Append, Mark, Verdict
from webapp.streams.manager import StreamSessionManager
from webapp.streams.ports import Assignment, NewMessage, Outcome
from webapp.streams.recovery import Reaper
from webapp.streams.timing import Due
from webapp.views import SessionView

CLOSED_REDIS = "redis://127.0.0.1:1/0"
"""A port on which nothing listens."""
LATER = Due(datetime(2100, 1, 1, tzinfo=UTC), TerminationReason.IDLE_TIMEOUT)
"""What a heartbeat says of a session that is not over by itself soon."""
# Combining marks, emoji joined by ZWJ, right-to-left text, an astral letter, a variation selector.
WORLD_TEXT = "e\u0301\u0323 👩‍👩‍👧‍👦 שָׁלוֹם 𝔘 ❤\ufe0f 漢字 "


class RecordingQueue:
    """A `TaskQueue` that notes what it is asked; `on_nudge` plays the worker's part, `broken` a broker that is down."""

    def __init__(self) -> None:
        self.enqueued: list[UUID] = []
        self.revoked: list[UUID] = []
        self.nudged: list[tuple[UUID, str, TerminationReason]] = []
        self.on_nudge: Callable[[UUID, TerminationReason], None] = lambda _, __: None
        self.broken = False

    def enqueue(self, session_id: UUID) -> None:
        self._require_broker()
        self.enqueued.append(session_id)

    def revoke(self, session_id: UUID) -> None:
        self._require_broker()
        self.revoked.append(session_id)

    def nudge(self, session_id: UUID, owner: str, reason: TerminationReason) -> None:
        self._require_broker()
        self.nudged.append((session_id, owner, reason))
        self.on_nudge(session_id, reason)

    def _require_broker(self) -> None:
        if self.broken:
            raise ConnectionError("the broker is down")


class World:
    """The services of one test, and short ways to what tests ask of them again and again."""

    def __init__(self, services: Services, queue: RecordingQueue) -> None:
        self.services = services
        self.queue = queue
        self.settings = services.settings
        self.database = services.database
        self.redis: redis.Redis = services.redis
        self.log = services.log
        self.manager = services.manager
        self.queries = services.queries
        self.reaper = services.reaper

    def close(self) -> None:
        """Let followers, threads and connections to Redis go."""
        self.services.hub.close()
        clients = (self.redis, self.services.hub._redis, self.services.limits._redis, self.services.views_log._redis)
        for client in clients:
            client.connection_pool.disconnect()

    # People and conversations

    def user(self, name: str = "ada") -> UUID:
        """The id of a user, made where there is none of that name."""
        self.services.accounts.ensure_user(name)
        return self.database.read(lambda s: s.scalars(select(User.id).where(User.name == name)).one())

    def conversation(self, owner: str = "ada") -> UUID:
        """A new conversation's id."""
        return self.services.conversations.create(self.user(owner), "A conversation").id

    def join(self, conversation_id: UUID, name: str, role: Role) -> None:
        """Make a user a member."""
        member = Member(user_id=self.user(name), conversation_id=conversation_id, role=role)
        self.database.write(lambda s: s.add(member))

    # Sessions

    def start(self, content: str = "hello", **more: Any) -> SessionView:
        """Send a message; by default to a new conversation, as `ada`."""
        more.setdefault("user_id", self.user())
        return self.manager.start(NewMessage(content=content, model="a-model", **more))

    def run(self, session_id: UUID | None = None, *, owner: str = "worker@one") -> Worker:
        """A worker that has claimed a session; a new one, where none is named."""
        worker = Worker(self, session_id or self.start().session_id, owner)
        assert worker.claim() is not None
        return worker

    def row(self, session_id: UUID) -> StreamSession:
        """The session's row as it is now."""
        return self.queries.row(session_id)

    def message(self, session_id: UUID) -> Message:
        """The answer's row as it is now."""
        message_id = self.row(session_id).message_id
        return self.database.read(lambda s: s.get_one(Message, message_id))

    def change(self, session_id: UUID, **values: Any) -> None:
        """Write into the row, as time or a crash would have."""
        where = StreamSession.id == session_id
        self.database.write(lambda s: s.execute(update(StreamSession).where(where).values(**values)))

    def forget(self, session_id: UUID) -> None:
        """Lose what Redis has of a session, as when it was emptied."""
        self.redis.delete(state_key(session_id), log_key(session_id))

    def entries(self, session_id: UUID) -> list[LogEntry]:
        """The whole log."""
        return list(self.log.read_all(session_id))

    def dones(self, session_id: UUID) -> list[LogEntry]:
        """The `done` entries of a log."""
        return [entry for entry in self.entries(session_id) if entry.kind == DONE]

    def counts(self) -> Counter[str]:
        """How many rows each table has."""
        return self.database.read(
            lambda s: Counter(
                {table.name: s.scalar(select(func.count()).select_from(table)) for table in db.metadata.sorted_tables}
            )
        )


class Worker:
    """A worker's steps for one session, taken when a test says so."""

    def __init__(self, world: World, session_id: UUID, owner: str = "worker@one") -> None:
        self.session_id = session_id
        self.owner = owner
        self.epoch = 0
        self.text = ""
        self.thinking_length = 0
        self._world = world
        self._nudged = threading.Event()

    def claim(self) -> Assignment | None:
        """CLAIM, and OPEN where it was won; the text goes on from what the log has."""
        assignment = self._world.manager.claim(self.session_id, self.owner)
        if assignment is not None:
            self.epoch = assignment.epoch
            self._world.log.open(self.session_id, self.epoch, self.owner)
            self.text, self.thinking_length = self._world.log.text(self.session_id)
            if len(assignment.checkpoint) > len(self.text):
                self.text, self.thinking_length = assignment.checkpoint, assignment.checkpoint_thinking_length
        return assignment

    def say(self, text: str, kind: str = MESSAGE) -> Answer:
        """APPEND at the end of what this worker has said."""
        answer = self._world.log.append(Append(self.session_id, self.epoch, len(self.text), kind, text))
        if answer.ok:
            self.text += text
            self.thinking_length = self.thinking_length if kind == MESSAGE else len(self.text)
        return answer

    def mark(self, phase: StreamPhase, attempt: int = 1) -> Answer:
        """A `phase` event."""
        return self._world.log.mark(Mark(self.session_id, self.epoch, phase, attempt))

    def fence(self, reason: TerminationReason) -> Answer:
        """FENCE as a worker takes it: at its epoch, and behind all of its text."""
        return self._world.log.fence(self.session_id, reason, epoch=self.epoch, expected_end=len(self.text))

    def commit(self, answer: Answer, **more: Any) -> bool:
        """COMMIT and FINISH what the fence says."""
        known: dict[str, Any] = {"phase": StreamPhase.GENERATING, "upstream_closed_at": now()} | more
        cut = min(self.thinking_length, answer.end)
        return self._world.manager.finish(
            self.session_id, self.epoch, Outcome(answer, self.text[: answer.end], cut, **known)
        )

    def end(self, reason: TerminationReason = TerminationReason.STOP, **more: Any) -> bool:
        """FENCE, COMMIT, FINISH; returns whether it was this worker that ended the session."""
        answer = self.fence(reason)
        assert answer.verdict in (Verdict.OK, Verdict.FENCED), answer
        return self.commit(answer, **more)

    def obey(self) -> None:
        """From now on, end when a nudge comes, in a thread of its own, as a worker's greenlet does."""

        def on_nudge(session_id: UUID, reason: TerminationReason) -> None:
            if session_id == self.session_id and not self._nudged.is_set():
                self._nudged.set()
                threading.Thread(target=self.end, args=(reason,)).start()

        self._world.queue.on_nudge = on_nudge


def make_world(settings: Settings, database: Database | None = None) -> World:
    """The services of `settings`, their manager over a recording queue.

    `database` is one that is open already: a new engine would compile every statement anew.
    """
    with patch("webapp.app.open_database", return_value=database) if database else nullcontext():
        made = make_services(settings)
    queue = RecordingQueue()
    manager = StreamSessionManager(made.database, made.log, queue, settings, made.queries)
    reaper = Reaper(made.database, made.log, manager, made.queries, settings)
    calls = Calls(settings, made.conversations, manager, made.queries, made.upstream, made.limits)
    operations = Operations(made.database, made.workers, made.queries, manager, made.metrics, settings)
    changed = dataclasses.replace(made, manager=manager, reaper=reaper, calls=calls, operations=operations)
    return World(changed, queue)


def make_settings(database_url: str, redis_url: str, data_dir: Path, **overrides: Any) -> Settings:
    """Settings that no environment and no file has a say in."""
    values: dict[str, Any] = {
        "database_url": database_url,
        "redis_url": redis_url,
        "celery_broker_url": "memory://",
        "data_dir": data_dir,
        "secret_key": "a secret of the tests",
        "default_model": "a-model",
        "log_level": "ERROR",
        "database_timeout_seconds": 20,  # on a busy machine; a test that is about it sets it
    }
    return Settings(_env_file=None, **(values | overrides))


def empty_tables(engine: Engine) -> None:
    """Delete every row, children first."""
    with engine.begin() as connection:
        for table in reversed(db.metadata.sorted_tables):
            connection.execute(table.delete())
