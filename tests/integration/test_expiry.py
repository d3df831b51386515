"""What is over by itself: time-outs, also of a lost worker; what nobody watches; what is too old to be kept."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from sqlalchemy import func, select, update

from tests.integration.conftest import MakeWorld
from tests.integration.test_recovery import lost, silence_heartbeat
from tests.integration.world import WORLD_TEXT, World
from tests.services import wait_until
from webapp.errors import Unavailable
from webapp.models import Conversation, IdempotencyKey, Message, OnDisconnect, SignInToken, StreamSession, db, now
from webapp.streams import retention
from webapp.streams.lifecycle import TerminationReason
from webapp.streams.rows import Beat
from webapp.streams.timing import Due, Timeouts

IDLE = TerminationReason.IDLE_TIMEOUT
WORKER_REASONS = [IDLE, TerminationReason.FIRST_TOKEN_TIMEOUT, TerminationReason.MAX_DURATION]


def ago(seconds: float = 1) -> datetime:
    return now() - timedelta(seconds=seconds)


class TestTimeouts:
    def test_a_new_session_is_due_when_its_time_in_the_queue_is_up(self, world: World) -> None:
        row = world.row(world.start().session_id)
        assert row.due_reason == "queue_timeout"
        assert row.due_at == row.started_at + timedelta(seconds=600)

    def test_a_claimed_one_when_the_model_should_have_spoken(self, world: World) -> None:
        row = world.row(world.run().session_id)
        assert row.claimed_at is not None
        assert (row.due_reason, row.due_at) == ("first_token_timeout", row.claimed_at + timedelta(seconds=300))

    def test_its_own_time_outs_go_before_the_settings(self, world: World) -> None:
        own = Timeouts(queue_seconds=1, first_token_seconds=2, idle_seconds=3, max_duration_seconds=4)
        view = world.start(timeouts=own)
        row = world.row(view.session_id)
        assert row.due_at == row.started_at + timedelta(seconds=1)
        assignment = world.manager.claim(view.session_id, "worker@one")
        assert assignment is not None
        assert assignment.timeouts == own
        assert world.row(view.session_id).due_at == assignment.claimed_at + timedelta(seconds=2)

    def test_the_longest_duration_comes_first_where_it_is_shorter(self) -> None:
        own = Timeouts(queue_seconds=9, first_token_seconds=9, idle_seconds=9, max_duration_seconds=5)
        moment = now()
        expected = Due(moment + timedelta(seconds=5), TerminationReason.MAX_DURATION)
        assert own.due_without_token(moment, moment) == own.due_after_token(moment, moment) == expected

    def test_a_heartbeat_says_when_its_worker_will_end_it(self, world: World) -> None:
        worker, due = world.run(), Due(now() + timedelta(seconds=77), IDLE)
        world.manager.beat([Beat(worker.session_id, worker.epoch, 0, "", 0, due)])
        row = world.row(worker.session_id)
        assert (row.due_at, row.due_reason) == (due.at, "idle_timeout")

    @pytest.mark.parametrize("reason", WORKER_REASONS)
    def test_a_lost_workers_session_ends_when_it_would_have(self, world: World, reason: TerminationReason) -> None:
        worker = lost(world)
        world.change(worker.session_id, due_at=ago(), due_reason=reason.value)
        assert world.reaper.reap() == {"lost": 1}
        row = world.row(worker.session_id)
        assert (row.status, row.reason) == ("TERMINATED", reason.value)
        assert world.message(worker.session_id).content == WORLD_TEXT

    def test_also_while_it_waits_for_another_worker(self, world: World) -> None:
        worker = lost(world)
        world.reaper.reap()
        world.change(worker.session_id, due_at=ago(), due_reason="idle_timeout")
        assert world.reaper.reap() == {"due": 1}
        assert world.row(worker.session_id).reason == "idle_timeout"
        assert world.message(worker.session_id).content == WORLD_TEXT

    def test_a_live_worker_gets_a_leases_time_to_end_it_itself(self, world: World) -> None:
        worker = world.run()
        world.change(worker.session_id, due_at=ago(9), due_reason="idle_timeout")
        assert world.reaper.reap() == {}

    def test_and_is_told_to_if_it_does_not(self, world: World) -> None:
        worker = world.run()
        worker.obey()
        worker.say(WORLD_TEXT)
        world.change(worker.session_id, due_at=ago(11), due_reason="idle_timeout")
        assert world.reaper.reap() == {"due": 1}
        assert [one[0] for one in world.queue.nudged] == [worker.session_id]
        row = world.row(worker.session_id)
        assert (row.reason, row.length, row.stop_by) == ("idle_timeout", len(WORLD_TEXT), None)

    def test_one_whose_heartbeat_is_late_is_not_judged_by_what_it_said_long_ago(self, world: World) -> None:
        worker = world.run()
        world.log.renew([(worker.session_id, worker.epoch)])
        silence_heartbeat(world, worker.session_id)
        world.change(worker.session_id, due_at=ago(60), due_reason="idle_timeout")
        assert world.reaper.reap() == {}

    def test_what_came_first_stays(self, world: World) -> None:
        session_id = world.start().session_id
        world.change(session_id, due_at=ago(), stop_reason="user", stop_by="ada", stop_requested_at=ago())
        world.reaper.reap()
        assert world.row(session_id).reason == "user"


class TestAbandonment:
    def watched(self, world: World, **more: Any) -> UUID:
        """A session that ends when nobody watches."""
        return world.run(world.start(on_disconnect=OnDisconnect.TERMINATE, **more).session_id).session_id

    def test_one_that_goes_on_is_never_abandoned(self, world: World) -> None:
        assert world.row(world.start().session_id).abandon_at is None

    def test_nobody_has_come_in_the_grace(self, world: World) -> None:
        session_id = self.watched(world)
        row = world.row(session_id)
        assert row.abandon_at == row.started_at + timedelta(seconds=30)
        assert world.reaper.reap() == {}
        world.change(session_id, abandon_at=ago())
        world.change(session_id, owner=None)
        assert world.reaper.reap()["abandoned"] == 1
        row = world.row(session_id)
        assert (row.status, row.reason) == ("TERMINATED", "abandoned")

    def test_a_report_puts_it_off_and_never_brings_it_nearer(self, world: World) -> None:
        session_id = self.watched(world)
        late, later = now() + timedelta(seconds=60), now() + timedelta(seconds=90)
        for until in (later, late):
            world.manager.watched([session_id], until)
        assert world.row(session_id).abandon_at == later

    def test_a_report_of_one_that_goes_on_changes_nothing(self, world: World) -> None:
        session_id = world.run().session_id
        world.manager.watched([session_id], now())
        assert world.row(session_id).abandon_at is None

    def test_whoever_is_there_counts_also_where_that_was_not_written_down(self, world: World) -> None:
        session_id = self.watched(world)
        world.services.hub.arrive(session_id, abandonable=False)
        wait_until(lambda: world.queries.view(session_id).viewers == 1)
        world.change(session_id, abandon_at=ago())
        world.reaper.reap()
        row = world.row(session_id)
        assert row.status == "ACTIVE"
        assert row.abandon_at is not None
        assert row.abandon_at > now()

    def test_who_is_there_is_told_to_redis_also_while_the_database_is_away(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Or whoever watched all the time would count as nobody, once the database is back."""

        def away(_: object) -> None:
            raise Unavailable

        session_id, hub = self.watched(world), world.services.hub
        monkeypatch.setattr(hub, "watched", away)
        hub.arrive(session_id, abandonable=True)
        wait_until(lambda: world.queries.view(session_id).viewers == 1)
        world.change(session_id, abandon_at=ago())
        world.reaper.reap()
        assert world.row(session_id).status == "ACTIVE"
        hub.leave(session_id)
        wait_until(lambda: world.queries.view(session_id).viewers == 0)

    def test_where_redis_cannot_say_who_is_there_it_waits(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        session_id = self.watched(world)

        def away(_: object) -> list[int]:
            raise RedisConnectionError

        monkeypatch.setattr(world.queries, "count_viewers", away)
        world.change(session_id, abandon_at=ago())
        world.reaper.reap()
        assert world.row(session_id).stop_reason is None

    def test_the_hub_reports_who_comes_and_goes_at_once(self, world: World) -> None:
        session_id, hub = self.watched(world), world.services.hub
        before = world.row(session_id).abandon_at
        assert before is not None
        hub.arrive(session_id, abandonable=True)
        hub.arrive(session_id, abandonable=True)
        wait_until(lambda: world.queries.view(session_id).viewers == 2, 1)
        wait_until(lambda: (world.row(session_id).abandon_at or before) > before, 1)
        hub.leave(session_id)
        wait_until(lambda: world.queries.view(session_id).viewers == 1, 1)
        hub.leave(session_id)
        wait_until(lambda: world.queries.view(session_id).viewers == 0, 1)


class TestRetention:
    def count(self, world: World, table: type[db.Model]) -> int:  # type: ignore[name-defined]
        return world.database.read(lambda s: s.scalar(select(func.count()).select_from(table)) or 0)

    def ended(self, world: World, days: float, **more: Any) -> UUID:
        """A session that ended so many days ago."""
        worker = world.run(world.start(**more).session_id)
        worker.say(WORLD_TEXT)
        worker.end()
        world.change(worker.session_id, ended_at=ago(days * 86400))
        return worker.session_id

    def test_an_old_session_goes_and_its_message_stays(self, world: World) -> None:
        message_id = world.row(self.ended(world, 30.1)).message_id
        young = self.ended(world, 29.9)
        assert world.reaper.reap() == {"old_sessions": 1}
        assert self.count(world, StreamSession) == 1
        assert world.row(young).status == "COMPLETED"
        assert world.database.read(lambda s: s.get_one(Message, message_id)).content == WORLD_TEXT

    def test_an_active_one_stays_however_old(self, world: World) -> None:
        session_id = world.run().session_id
        world.change(session_id, started_at=ago(90 * 86400))
        world.reaper.reap()
        assert world.row(session_id).status == "ACTIVE"

    def test_in_bounded_batches(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(retention, "BATCH", 2)
        for _ in range(5):
            self.ended(world, 31)
        assert [world.reaper.reap()["old_sessions"] for _ in range(4)] == [2, 2, 1, 0]

    def test_a_deleted_conversation_goes_with_all_that_it_has(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(retention, "BATCH", 3)
        first = self.ended(world, 0)
        conversation_id = world.row(first).conversation_id
        for _ in range(3):
            self.ended(world, 0, conversation_id=conversation_id)
        kept = world.row(self.ended(world, 0)).conversation_id
        world.services.conversations.hide(conversation_id)
        assert world.reaper.reap() == {}
        where = Conversation.id == conversation_id
        week = ago(7.1 * 86400)
        world.database.write(lambda s: s.execute(update(Conversation).where(where).values(deleted_at=week)))
        assert [world.reaper.reap()["deleted_conversations"] for _ in range(4)] == [0, 0, 1, 0]
        assert self.count(world, Message) == 2
        assert self.count(world, StreamSession) == 1
        assert world.database.read(lambda s: list(s.scalars(select(Conversation.id)))) == [kept]

    def test_keys_and_tokens_that_count_no_more(self, world: World) -> None:
        user_id = world.user()
        world.services.accounts.make_sign_in_token("ada")
        for hours in (25, 23):
            made = IdempotencyKey(
                user_id=user_id, key=str(hours), body_sha256="", session_id=user_id, created_at=ago(hours * 3600)
            )
            world.database.write(lambda s, made=made: s.add(made))
        assert world.reaper.reap() == {"old_request_keys": 1}
        world.database.write(lambda s: s.execute(update(SignInToken).values(expires_at=ago())))
        assert world.reaper.reap() == {"old_sign_in_tokens": 1}
        assert self.count(world, IdempotencyKey) == 1

    def test_the_time_is_a_setting(self, world_with: MakeWorld) -> None:
        world = world_with(session_retention_days=1)
        self.ended(world, 1.1)
        assert world.reaper.reap() == {"old_sessions": 1}
