"""The database's own guards: what may not be is refused by SQLite and PostgreSQL themselves, whoever writes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import delete, func, select, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from tests.integration.world import WORLD_TEXT, World, make_settings, make_world
from tests.services import ValkeyServer
from webapp.models import (
    Base,
    Conversation,
    Member,
    Message,
    Role,
    SignInToken,
    StreamSession,
    User,
    db,
    new_id,
    now,
)
from webapp.streams.lifecycle import StreamStatus, TerminationReason


@pytest.fixture
def session_id(world: World) -> UUID:
    """An ACTIVE session."""
    return world.start().session_id


@pytest.fixture
def sqlite(tmp_path: Path, valkey: ValkeyServer) -> Iterator[World]:
    """A world over an SQLite file of its own."""
    world = make_world(make_settings(f"sqlite:///{tmp_path / 'own.db'}", valkey.url, tmp_path))
    db.metadata.create_all(world.database.engine)
    yield world
    world.close()
    world.database.engine.dispose()


def insert(world: World, row: Any) -> None:
    world.database.write(lambda s: s.add(row))


def another_session(world: World, session_id: UUID, **values: Any) -> StreamSession:
    """A row beside another, in the same conversation."""
    row = world.row(session_id)
    known = {
        "id": new_id(),
        "conversation_id": row.conversation_id,
        "message_id": row.message_id,
        "user_id": row.user_id,
        "model": "m",
    }
    return StreamSession(**(known | values))


ENDED: dict[str, Any] = {"status": "COMPLETED", "reason": "stop", "ended_at": datetime(2026, 1, 1, tzinfo=UTC)}


class TestOneActiveSession:
    def test_a_conversation_has_no_two(self, world: World, session_id: UUID) -> None:
        with pytest.raises(IntegrityError):
            insert(world, another_session(world, session_id))

    def test_one_that_has_ended_does_not_count(self, world: World, session_id: UUID) -> None:
        insert(world, another_session(world, session_id, **ENDED))
        world.change(session_id, **ENDED)
        insert(world, another_session(world, session_id))

    def test_one_that_has_ended_does_not_come_back_beside_another(self, world: World, session_id: UUID) -> None:
        world.change(session_id, **ENDED)
        insert(world, another_session(world, session_id))
        with pytest.raises(IntegrityError):
            world.change(session_id, status="ACTIVE", reason=None, ended_at=None)

    def test_another_conversation_has_its_own(self, world: World, session_id: UUID) -> None:
        assert world.start().conversation_id != world.row(session_id).conversation_id


class TestKnownWordsOnly:
    @pytest.mark.parametrize(
        ("column", "word"),
        [
            ("status", "PAUSED"),
            ("status", "active"),
            ("phase", "THINKING"),
            ("stop_reason", "because"),
            ("on_disconnect", "pause"),
        ],
    )
    def test_of_an_active_session(self, world: World, session_id: UUID, column: str, word: str) -> None:
        with pytest.raises(IntegrityError):
            world.change(session_id, **{column: word})

    def test_of_an_ending(self, world: World, session_id: UUID) -> None:
        with pytest.raises(IntegrityError):
            world.change(session_id, **(ENDED | {"reason": "because"}))

    @pytest.mark.parametrize(("column", "word"), [("role", "system"), ("status", "DONE"), ("reason", "because")])
    def test_of_a_message(self, world: World, session_id: UUID, column: str, word: str) -> None:
        where = Message.id == world.row(session_id).message_id
        with pytest.raises(IntegrityError):
            world.database.write(lambda s: s.execute(update(Message).where(where).values(**{column: word})))

    def test_of_a_member(self, world: World) -> None:
        with pytest.raises(IntegrityError):
            insert(world, Member(user_id=world.user(), conversation_id=world.conversation("bob"), role="admin"))

    def test_every_known_reason_is_taken(self, world: World, session_id: UUID) -> None:
        for reason in TerminationReason:
            world.change(session_id, **ENDED | {"status": reason.status.value, "reason": reason.value})
            world.change(session_id, stop_reason=reason.value)


class TestAnEndingIsWhole:
    MOMENT = ENDED["ended_at"]

    @pytest.mark.parametrize(
        "values",
        [
            pytest.param({"ended_at": MOMENT}, id="ACTIVE with a time of its end"),
            pytest.param({"reason": "stop"}, id="ACTIVE with a reason"),
            pytest.param({"status": "TERMINATED"}, id="ended without time and reason"),
            pytest.param({"status": "TERMINATED", "ended_at": MOMENT}, id="ended without a reason"),
            pytest.param({"status": "ERROR", "reason": "internal"}, id="ended without a time"),
        ],
    )
    def test_half_of_one_is_refused(self, world: World, session_id: UUID, values: dict[str, Any]) -> None:
        with pytest.raises(IntegrityError):
            world.change(session_id, **values)

    @pytest.mark.parametrize("status", [status for status in StreamStatus if status != StreamStatus.ACTIVE])
    def test_a_whole_one_is_taken(self, world: World, session_id: UUID, status: StreamStatus) -> None:
        world.change(session_id, **ENDED | {"status": status.value})


class TestNothingPointsNowhere:
    @pytest.mark.parametrize("column", ["conversation_id", "message_id", "user_id"])
    def test_a_session_that_would_is_refused(self, world: World, session_id: UUID, column: str) -> None:
        with pytest.raises(IntegrityError):
            world.change(session_id, **{column: new_id()})

    def test_a_message_that_would_is_refused(self, world: World) -> None:
        with pytest.raises(IntegrityError):
            insert(world, Message(conversation_id=new_id(), role="user"))
        with pytest.raises(IntegrityError):
            insert(world, Message(conversation_id=world.conversation(), role="user", replaced_by_id=new_id()))

    def test_a_member_or_a_sign_in_token_that_would_is_refused(self, world: World) -> None:
        conversation_id, user_id = world.conversation(), world.user()
        nowhere = [
            Member(user_id=new_id(), conversation_id=conversation_id, role=Role.OWNER),
            Member(user_id=user_id, conversation_id=new_id(), role=Role.OWNER),
            SignInToken(token_hash="x", user_id=new_id(), expires_at=now()),
        ]
        for row in nowhere:
            with pytest.raises(IntegrityError):
                insert(world, row)


class TestOnDelete:
    @pytest.fixture
    def remove(self, world: World) -> Callable[[type[Base], Any], None]:
        def remove(table: type[Base], where: Any) -> None:
            world.database.write(lambda s: s.execute(delete(table).where(where)))

        return remove

    def test_a_conversation_takes_everything_in_it_along(
        self, world: World, session_id: UUID, remove: Callable[..., None]
    ) -> None:
        other = world.start(user_id=world.user("bob"))
        remove(Conversation, Conversation.id == world.row(session_id).conversation_id)
        left = world.counts()
        assert (left["conversations"], left["conversation_members"], left["stream_sessions"]) == (1, 1, 1)
        assert left["messages"] == 2
        assert left["users"] == 2
        assert world.row(other.session_id).status == StreamStatus.ACTIVE

    def test_a_user_takes_memberships_sessions_and_sign_in_tokens_along(
        self, world: World, session_id: UUID, remove: Callable[..., None]
    ) -> None:
        world.services.accounts.make_sign_in_token("ada")
        remove(User, User.name == "ada")
        left = world.counts()
        assert (left["users"], left["conversation_members"], left["stream_sessions"]) == (0, 0, 0)
        assert left["sign_in_tokens"] == 0
        assert (left["conversations"], left["messages"]) == (1, 2)

    def test_a_message_takes_its_sessions_along(
        self, world: World, session_id: UUID, remove: Callable[..., None]
    ) -> None:
        remove(Message, Message.id == world.row(session_id).message_id)
        left = world.counts()
        assert (left["stream_sessions"], left["messages"]) == (0, 1)

    def test_a_session_leaves_its_message_which_goes_on_naming_it(
        self, world: World, session_id: UUID, remove: Callable[..., None]
    ) -> None:
        remove(StreamSession, StreamSession.id == session_id)
        named = world.database.read(lambda s: list(s.scalars(select(Message.session_id).order_by(Message.id))))
        assert named == [None, session_id]

    def test_a_new_answer_that_goes_lets_the_old_one_stand_again(
        self, world: World, remove: Callable[..., None]
    ) -> None:
        conversation_id = world.conversation()
        newer = Message(id=new_id(), conversation_id=conversation_id, role="assistant")
        older_id, newer_id = new_id(), newer.id
        insert(world, newer)
        insert(
            world,
            Message(id=older_id, conversation_id=conversation_id, role="assistant", replaced_by_id=newer_id),
        )
        remove(Message, Message.id == newer_id)
        older = world.database.read(lambda s: s.get_one(Message, older_id))
        assert older.replaced_by_id is None


class TestNames:
    def test_a_users_name_and_token_are_its_own(self, world: World) -> None:
        insert(world, User(name="ada", token_hash="1"))
        for twin in (User(name="ada", token_hash="2"), User(name="bob", token_hash="1")):
            with pytest.raises(IntegrityError):
                insert(world, twin)

    def test_somebody_is_a_member_once(self, world: World) -> None:
        conversation_id = world.conversation()
        with pytest.raises(IntegrityError):
            world.join(conversation_id, "ada", Role.VIEWER)


class TestValues:
    def test_a_moment_is_the_same_again_wherever_it_was_taken(self, world: World, session_id: UUID) -> None:
        moment = datetime(2026, 3, 29, 3, 30, 0, 123456, tzinfo=timezone(timedelta(hours=5, minutes=45)))
        world.change(session_id, requeue_at=moment)
        read = world.row(session_id).requeue_at
        assert read == moment
        assert read is not None
        assert read.utcoffset() == timedelta(0)

    def test_moments_compare_in_the_database_as_they_do_here(self, world: World, session_id: UUID) -> None:
        zones = [timezone(timedelta(hours=hours)) for hours in (-11, 0, 14)]
        for zone in zones:
            world.change(session_id, requeue_at=datetime(2026, 1, 1, 12, tzinfo=UTC).astimezone(zone))
            for other in zones:
                before = datetime(2026, 1, 1, 12, 0, 1, tzinfo=UTC).astimezone(other)
                assert self.requeued_before(world, before) == 1

    @staticmethod
    def requeued_before(world: World, moment: datetime) -> int | None:
        query = select(func.count()).where(StreamSession.requeue_at < moment)
        return world.database.read(lambda s: s.scalar(query))

    def test_any_text_comes_back_as_it_was(self, world: World, session_id: UUID) -> None:
        odd = WORLD_TEXT + "\r\n\t\x01\x7f\ufeff\ufffe\U0010ffff '\"\\%:name"
        world.change(session_id, checkpoint=odd, detail=odd)
        row = world.row(session_id)
        assert (row.checkpoint, row.detail) == (odd, odd)

    @pytest.mark.parametrize("think", [True, False, "high", None])
    def test_whether_to_think_comes_back_as_it_was(self, world: World, think: bool | str | None) -> None:
        assert world.row(world.start(think=think).session_id).think is think or think == "high"

    def test_ids_rise_with_time(self, world: World) -> None:
        ids = [new_id() for _ in range(1000)]
        assert ids == sorted(ids)
        assert {one.version for one in ids} == {7}
        for one in reversed(ids[:20]):
            insert(world, Conversation(id=one, title="t"))
        found = world.database.read(lambda s: list(s.scalars(select(Conversation.id).order_by(Conversation.id))))
        assert found == ids[:20]


class TestSQLite:
    @pytest.mark.parametrize(("pragma", "value"), [("journal_mode", "wal"), ("foreign_keys", 1), ("synchronous", 1)])
    def test_every_connection_has_its_pragmas(self, sqlite: World, pragma: str, value: Any) -> None:
        connections = [sqlite.database.engine.raw_connection() for _ in range(3)]
        for connection in connections:
            assert connection.cursor().execute(f"PRAGMA {pragma}").fetchone() == (value,)
        for connection in connections:
            connection.close()

    def test_readers_do_not_wait_for_a_writer(self, sqlite: World) -> None:
        with sqlite.database.engine.connect() as writer:
            writer.execute(text("INSERT INTO conversations (id, title, created_at) VALUES ('x', 't', 'now')"))
            assert sqlite.counts()["conversations"] == 0

    def test_those_who_read_and_then_write_lose_nothing(self, sqlite: World) -> None:
        session_id = sqlite.start().session_id

        def count(s: Session) -> None:
            s.get_one(StreamSession, session_id).attempt += 1

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: sqlite.database.write(count), range(40)))
        assert sqlite.row(session_id).attempt == 40
