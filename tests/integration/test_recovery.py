"""The reaper: what a crash leaves behind is found, and brought to its end or to another worker."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from uuid import UUID

import pytest
from sqlalchemy import delete

from tests.integration.conftest import MakeWorld
from tests.integration.world import CLOSED_REDIS, LATER, WORLD_TEXT, Worker, World
from webapp.errors import Unavailable
from webapp.models import StreamSession, now
from webapp.streams import recovery, rows
from webapp.streams.events import THINKING, done_position
from webapp.streams.keys import QUEUE_KEY, REAPER_KEY, state_key
from webapp.streams.lifecycle import StreamStatus, TerminationReason
from webapp.streams.log import Verdict
from webapp.streams.ports import Outcome
from webapp.streams.rows import Beat

LONG_AGO = timedelta(minutes=2)
NOTHING_DUE: dict[str, int] = {}
USER, STOP = TerminationReason.USER, TerminationReason.STOP


def silence_heartbeat(world: World, session_id: UUID) -> None:
    """The row has not heard of its worker for long."""
    world.change(session_id, heartbeat_at=now() - LONG_AGO)


def silence_lease(world: World, session_id: UUID) -> None:
    """Nor has Redis."""
    world.redis.hincrby(state_key(session_id), "lease_us", -int(LONG_AGO.total_seconds() * 1e6))


def lost(world: World, text: str = WORLD_TEXT) -> Worker:
    """A worker that has written something and was then killed."""
    worker = world.run()
    worker.say("hm ", THINKING)
    worker.say(text)
    world.log.renew([(worker.session_id, worker.epoch)])
    silence_heartbeat(world, worker.session_id)
    silence_lease(world, worker.session_id)
    return worker


class TestALostWorker:
    def test_its_session_is_released_and_queued(self, world: World) -> None:
        worker = lost(world)
        assert world.reaper.reap() == NOTHING_DUE | {"lost": 1}
        row = world.row(worker.session_id)
        assert (row.status, row.owner, row.epoch) == ("ACTIVE", None, 1)
        assert row.requeue_at is not None
        assert world.queue.enqueued == [worker.session_id] * 2

    def test_another_goes_on_in_the_same_log(self, world: World) -> None:
        old = lost(world, "one ")
        world.reaper.reap()
        new = world.run(old.session_id, owner="worker@two")
        assert (new.text, new.thinking_length) == ("hm one ", 3)
        new.say("two")
        assert new.end()
        assert world.message(old.session_id).content == "one two"
        assert old.say("ghost").verdict is Verdict.STALE

    def test_a_second_pass_finds_nothing(self, world: World) -> None:
        worker = lost(world)
        world.reaper.reap()
        assert world.reaper.reap() == NOTHING_DUE
        assert world.queue.enqueued == [worker.session_id] * 2

    def test_two_reapers_at_once_do_no_harm(self, world: World) -> None:
        workers = [lost(world) for _ in range(4)]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda _: world.reaper.reap(), range(2)))
        for worker in workers:
            assert world.queue.enqueued.count(worker.session_id) >= 2
            assert (world.row(worker.session_id).status, world.row(worker.session_id).epoch) == ("ACTIVE", 1)
            assert world.run(worker.session_id, owner="worker@two").epoch == 2

    def test_where_that_is_wanted_its_partial_is_kept(self, world_with: MakeWorld) -> None:
        world = world_with(on_worker_lost="keep")
        worker = lost(world)
        assert world.reaper.reap()["lost"] == 1
        row, message = world.row(worker.session_id), world.message(worker.session_id)
        assert (row.status, row.reason) == ("ERROR", "worker_lost")
        assert row.detail is not None
        assert "lost" in row.detail
        assert (message.thinking, message.content, message.status) == ("hm ", WORLD_TEXT, "ERROR")
        assert world.dones(worker.session_id)[0].position == done_position(3 + len(WORLD_TEXT))
        assert len(world.queue.enqueued) == 1

    def test_the_last_attempt_is_kept_too(self, world_with: MakeWorld) -> None:
        world = world_with(max_attempts=2)
        first = lost(world, "one ")
        world.reaper.reap()
        second = world.run(first.session_id, owner="worker@two")
        second.say("two")
        silence_heartbeat(world, first.session_id)
        silence_lease(world, first.session_id)
        world.reaper.reap()
        assert world.row(first.session_id).reason == "worker_lost"
        assert world.message(first.session_id).content == "one two"

    def test_hand_overs_are_no_losses(self, world_with: MakeWorld) -> None:
        """However often workers were restarted under it, a session may lose as many as any other, and no more."""
        world = world_with(max_attempts=2)
        session_id = world.start().session_id
        for epoch in range(1, 6):
            world.run(session_id, owner=f"worker@{epoch}").say(f"{epoch} ")
            world.manager.give_up(session_id, epoch)
        self.lose(world, session_id)
        row = world.row(session_id)
        assert (row.status, row.owner, row.attempt, row.losses) == ("ACTIVE", None, 6, 1)
        self.lose(world, session_id)
        row = world.row(session_id)
        assert (row.status, row.reason, row.attempt, row.losses) == ("ERROR", "worker_lost", 7, 1)
        assert world.message(session_id).content == "1 2 3 4 5 "

    def lose(self, world: World, session_id: UUID) -> None:
        """Another worker takes it, and is lost."""
        world.run(session_id)
        silence_heartbeat(world, session_id)
        silence_lease(world, session_id)
        assert world.reaper.reap()["lost"] == 1

    @pytest.mark.parametrize("patterns", ["a-model", "a-*", "*", "other,  a-mode? ,", "[ab]-model"])
    def test_a_model_that_is_not_gone_on_with(self, world_with: MakeWorld, patterns: str) -> None:
        world = world_with(on_worker_lost_keep_models=patterns)
        worker = lost(world)
        world.reaper.reap()
        assert world.row(worker.session_id).reason == "worker_lost"
        assert world.message(worker.session_id).content == WORLD_TEXT
        assert len(world.queue.enqueued) == 1

    @pytest.mark.parametrize("patterns", ["", ",", "a-mode", "A-MODEL", "a-model:latest", "another"])
    def test_a_model_that_is_not_named(self, world_with: MakeWorld, patterns: str) -> None:
        world = world_with(on_worker_lost_keep_models=patterns)
        worker = lost(world)
        world.reaper.reap()
        assert world.row(worker.session_id).status == StreamStatus.ACTIVE
        assert len(world.queue.enqueued) == 2

    def test_where_redis_was_emptied_as_well_the_checkpoint_is_kept(self, world_with: MakeWorld) -> None:
        world = world_with(on_worker_lost="keep")
        worker = lost(world)
        world.manager.beat([Beat(worker.session_id, 1, 0, "hm " + WORLD_TEXT[:5], 3, LATER)])
        silence_heartbeat(world, worker.session_id)
        world.forget(worker.session_id)
        world.reaper.reap()
        assert world.message(worker.session_id).content == WORLD_TEXT[:5]
        assert world.row(worker.session_id).thinking_length == 3


class TestAStopThatAWorkerDidNotLiveToSee:
    def test_the_fence_that_stands_is_the_ending(self, world: World) -> None:
        worker = lost(world)
        world.log.fence(worker.session_id, STOP)
        world.reaper.reap()
        assert world.row(worker.session_id).reason == "stop"
        assert world.message(worker.session_id).content == WORLD_TEXT
        assert len(world.queue.enqueued) == 1

    def test_the_stop_on_record_is_the_ending(self, world: World) -> None:
        worker = lost(world)
        world.database.write(lambda s: rows.record_stop(s, worker.session_id, USER, "ada", now()))
        world.reaper.reap()
        row = world.row(worker.session_id)
        assert (row.reason, row.stop_by, row.length) == ("user", "ada", len(WORLD_TEXT))
        assert world.queries.receipt(worker.session_id).already_ended is False

    def test_a_fence_comes_before_a_stop_on_record(self, world: World) -> None:
        worker = lost(world)
        worker.fence(STOP)
        world.database.write(lambda s: rows.record_stop(s, worker.session_id, USER, "ada", now()))
        world.reaper.reap()
        assert world.row(worker.session_id).reason == "stop"
        assert world.queries.view(worker.session_id).terminated_by is None

    def test_a_stop_of_what_nobody_owns_takes_effect_at_the_next_pass(self, world: World) -> None:
        session_id = world.start().session_id
        world.database.write(lambda s: rows.record_stop(s, session_id, USER, "ada", now()))
        world.reaper.reap()
        assert world.row(session_id).reason == "user"


class TestAWorkerThatIsNotLost:
    def test_one_that_beats_and_renews(self, world: World) -> None:
        worker = world.run()
        world.log.renew([(worker.session_id, 1)])
        assert world.reaper.reap() == NOTHING_DUE

    def test_one_whose_database_is_slow(self, world: World) -> None:
        worker = world.run()
        silence_heartbeat(world, worker.session_id)
        world.log.renew([(worker.session_id, 1)])
        assert world.reaper.reap() == NOTHING_DUE
        assert world.row(worker.session_id).owner == worker.owner

    def test_one_whose_redis_was_emptied(self, world: World) -> None:
        worker = lost(world)
        world.forget(worker.session_id)
        world.manager.beat([Beat(worker.session_id, 1, 0, "", 0, LATER)])
        assert world.reaper.reap() == NOTHING_DUE

    def test_while_redis_is_away_nobody_is(self, world: World, world_with: MakeWorld) -> None:
        worker = lost(world)
        assert world_with(redis_url=CLOSED_REDIS).reaper.reap()["lost"] == 0
        assert world.row(worker.session_id).owner == worker.owner

    def test_the_lease_is_as_long_as_it_is_set(self, world_with: MakeWorld) -> None:
        worker = lost(world_with())
        assert world_with(lease_seconds=600).reaper.reap()["lost"] == 0
        assert world_with(lease_seconds=60).reaper.reap()["lost"] == 1
        assert world_with().row(worker.session_id).owner is None

    @pytest.mark.parametrize("on_worker_lost", ["continue", "keep"])
    def test_one_that_is_heard_of_after_it_was_looked_at(
        self, world_with: MakeWorld, monkeypatch: pytest.MonkeyPatch, on_worker_lost: str
    ) -> None:
        world = world_with(on_worker_lost=on_worker_lost)
        worker = lost(world)
        looked_at = world.reaper._left_seconds

        def heard_of(row: StreamSession, moment: datetime) -> float:
            found = looked_at(row, moment)
            world.manager.beat([Beat(worker.session_id, 1, 0, "", 0, LATER)])
            return found

        monkeypatch.setattr(world.reaper, "_left_seconds", heard_of)
        world.reaper.reap()
        assert world.row(worker.session_id).owner == worker.owner

    def test_one_that_took_over_after_another_was_looked_at(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As when two reapers find the same."""
        old = lost(world)
        looked_at = world.reaper._left_seconds

        def taken_over(row: StreamSession, moment: datetime) -> float:
            found = looked_at(row, moment)
            world.manager.give_up(old.session_id, 1)
            world.run(old.session_id, owner="worker@two")
            return found

        monkeypatch.setattr(world.reaper, "_left_seconds", taken_over)
        world.reaper.reap()
        assert world.row(old.session_id).owner == "worker@two"

    def test_one_that_has_ended(self, world: World) -> None:
        worker = lost(world)
        worker.end()
        assert world.reaper.reap() == NOTHING_DUE


class TestAWorkerThatWillBeLostBeforeTheNextPass:
    SECONDS = 0.4

    def silent(self, world: World) -> Worker:
        """A worker whose lease, in Redis and in the row, has that much left."""
        worker = world.run()
        world.log.renew([(worker.session_id, 1)])
        ago_seconds = world.settings.lease_seconds - self.SECONDS
        world.change(worker.session_id, heartbeat_at=now() - timedelta(seconds=ago_seconds))
        world.redis.hincrby(state_key(worker.session_id), "lease_us", -int(ago_seconds * 1e6))
        return worker

    def test_it_is_waited_for(self, world: World) -> None:
        worker = self.silent(world)
        assert world.reaper.reap() == NOTHING_DUE
        assert world.reaper.reap_lapsing() == {"lost": 1}
        assert world.row(worker.session_id).owner is None
        assert world.queue.enqueued == [worker.session_id] * 2

    def test_and_each_at_its_time(self, world: World) -> None:
        first, second = self.silent(world), self.silent(world)
        later = world.row(second.session_id).heartbeat_at
        assert later is not None
        world.change(second.session_id, heartbeat_at=later + timedelta(seconds=0.4))
        assert world.reaper.reap_lapsing() == {"lost": 2}
        assert world.queue.enqueued[2:] == [first.session_id, second.session_id]

    @pytest.mark.parametrize("sign", ["lease", "heartbeat"])
    def test_one_that_is_heard_of_meanwhile_is_not_lost(
        self, world: World, monkeypatch: pytest.MonkeyPatch, sign: str
    ) -> None:
        worker = self.silent(world)

        def while_it_waits(seconds: float) -> None:
            assert 0 < seconds <= self.SECONDS
            if sign == "lease":
                world.log.renew([(worker.session_id, 1)])
            else:
                world.manager.beat([Beat(worker.session_id, 1, 0, "", 0, LATER)])
            threading.Event().wait(seconds)

        monkeypatch.setattr(recovery.time, "sleep", while_it_waits)
        assert world.reaper.reap_lapsing() == NOTHING_DUE
        assert world.row(worker.session_id).owner == worker.owner

    def test_where_all_are_heard_of_nothing_is_waited_for(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        world.log.renew([(world.run().session_id, 1)])
        monkeypatch.setattr(recovery.time, "sleep", lambda seconds: pytest.fail(f"slept {seconds} s"))
        assert world.reaper.reap_lapsing() == NOTHING_DUE


class TestWhatNobodyClaims:
    def test_one_whose_task_was_revoked_and_that_could_not_be_ended_then(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The database goes between the two. Workers drop its messages for hours: it is not queued again."""
        session_id = world.start().session_id

        def gone(*_: object) -> None:
            raise Unavailable("the database is gone")

        with monkeypatch.context() as patched:
            patched.setattr(world.manager, "_commit", gone)
            with pytest.raises(Unavailable):
                world.manager.terminate(session_id, USER, "ada")
        assert world.queue.revoked == [session_id]
        assert world.row(session_id).status == StreamStatus.ACTIVE
        world.reaper.reap()
        row = world.row(session_id)
        assert (row.status, row.reason, row.stop_by) == ("TERMINATED", "user", "ada")
        assert world.queue.enqueued == [session_id]

    def grown_old(self, world: World, seconds: float) -> UUID:
        """A session that was started so long ago, and of which nobody has heard since."""
        view = world.start()
        row = world.row(view.session_id)
        requeue_at, due_at = row.requeue_at, row.due_at
        assert requeue_at is not None
        assert due_at is not None
        age = timedelta(seconds=seconds)
        earlier = {"started_at": view.started_at - age, "requeue_at": requeue_at - age, "due_at": due_at - age}
        world.change(view.session_id, **earlier)
        return view.session_id

    def next_look_seconds(self, world: World, session_id: UUID) -> float:
        """From now until the reaper comes again."""
        requeue_at = world.row(session_id).requeue_at
        assert requeue_at is not None
        return (requeue_at - now()).total_seconds()

    def test_it_is_left_in_the_queue_for_a_while(self, world: World) -> None:
        self.grown_old(world, 10)
        assert world.reaper.reap() == NOTHING_DUE
        assert len(world.queue.enqueued) == 1

    def test_and_then_queued_again_and_left_again(self, world: World) -> None:
        session_id = self.grown_old(world, 16)
        assert world.reaper.reap() == NOTHING_DUE | {"unclaimed": 1}
        assert world.reaper.reap() == NOTHING_DUE
        assert world.queue.enqueued == [session_id] * 2

    @pytest.mark.parametrize(("age_seconds", "pause_seconds"), [(16, 16), (31, 31), (61, 61), (400, 200)])
    def test_each_time_for_twice_as_long(self, world: World, age_seconds: float, pause_seconds: float) -> None:
        """But never beyond its time in the queue, which is 600 s."""
        session_id = self.grown_old(world, age_seconds)
        world.reaper.reap()
        assert self.next_look_seconds(world, session_id) == pytest.approx(pause_seconds, abs=3)

    def test_what_was_never_queued_is_queued_at_once(self, world: World) -> None:
        session_id = world.start().session_id
        world.change(session_id, requeue_at=None)
        assert world.reaper.reap()["unclaimed"] == 1
        assert world.queue.enqueued == [session_id] * 2

    def test_an_emptied_redis_has_lost_the_queue(self, world: World) -> None:
        """What waits in it is queued again by the next pass, however long it was to be left there; and once."""
        session_id = self.grown_old(world, 31)
        world.reaper.reap()
        recovery.reap_alone(world.reaper, world.redis)  # the first that this Redis has seen
        world.redis.flushall()
        before = len(world.queue.enqueued)
        for _ in range(3):
            recovery.reap_alone(world.reaper, world.redis)
        assert world.queue.enqueued[before:] == [session_id]
        assert 0 < world.redis.ttl(QUEUE_KEY) <= recovery.QUEUE_TTL_SECONDS

    @pytest.mark.parametrize("at_start", [False, True])
    def test_a_pass_that_was_killed_is_waited_for_at_the_start_alone(self, world: World, at_start: bool) -> None:
        """Its lock lapses, and nobody else may come in the time; another of beat's comes soon enough."""
        session_id = world.start().session_id
        world.change(session_id, requeue_at=None)
        world.redis.set(REAPER_KEY, "somebody's", px=500)
        recovery.reap_alone(world.reaper, world.redis, at_start=at_start)
        assert len(world.queue.enqueued) == (2 if at_start else 1)

    def test_what_runs_is_not_queued_again_by_that(self, world: World) -> None:
        world.run().say("text")
        recovery.reap_alone(world.reaper, world.redis)
        assert len(world.queue.enqueued) == 1

    @pytest.mark.parametrize("limit_seconds", [2, 60])
    def test_its_time_in_the_queue_is_limited(self, world_with: MakeWorld, limit_seconds: float) -> None:
        world = world_with(queue_timeout_seconds=limit_seconds)
        late, in_time = self.grown_old(world, limit_seconds + 0.5), self.grown_old(world, limit_seconds - 1)
        world.reaper.reap()
        row = world.row(late)
        assert (row.status, row.reason, row.length) == ("TERMINATED", "queue_timeout", 0)
        assert world.dones(late)[0].position == done_position(0)
        assert world.row(in_time).status == StreamStatus.ACTIVE

    def test_to_be_queued_again_does_not_prolong_it(self, world_with: MakeWorld) -> None:
        world = world_with(queue_timeout_seconds=60)
        session_id = self.grown_old(world, 61)
        world.manager.requeue(session_id)
        world.reaper.reap()
        assert world.row(session_id).reason == "queue_timeout"

    def test_what_a_worker_had_begun_does_not_wait_from_when_it_was_sent(self, world_with: MakeWorld) -> None:
        world = world_with(queue_timeout_seconds=60, lease_seconds=5)
        worker = lost(world)
        world.change(worker.session_id, heartbeat_at=now() - timedelta(seconds=10))
        world.reaper.reap()
        world.change(worker.session_id, started_at=now() - timedelta(seconds=300), requeue_at=now())
        assert world.reaper.reap()["unclaimed"] == 1
        assert world.row(worker.session_id).status == StreamStatus.ACTIVE

    def test_what_a_worker_gave_up_waits_anew(self, world_with: MakeWorld) -> None:
        world = world_with(queue_timeout_seconds=60)
        worker = world.run()
        world.manager.give_up(worker.session_id, worker.epoch)
        row = world.row(worker.session_id)
        assert row.due_reason == "queue_timeout"
        assert row.due_at is not None
        assert (row.due_at - now()).total_seconds() == pytest.approx(60, abs=3)

    def test_but_never_beyond_its_longest_duration(self, world_with: MakeWorld) -> None:
        world = world_with(queue_timeout_seconds=60, max_duration_seconds=100)
        worker = world.run()
        world.change(worker.session_id, claimed_at=now() - timedelta(seconds=90))
        world.manager.give_up(worker.session_id, worker.epoch)
        row = world.row(worker.session_id)
        assert (row.due_reason, row.due_at) == ("max_duration", row.claimed_at + timedelta(seconds=100))


class TestAnEndingWithoutDone:
    @pytest.fixture
    def unpublished(self, world: World) -> UUID:
        """Committed long ago by somebody who died before `done`."""
        worker = world.run()
        worker.say(WORLD_TEXT)
        fence = worker.fence(STOP)
        outcome = Outcome(fence, worker.text, 0, world.queries.view(worker.session_id).phase, now())
        row = world.row(worker.session_id)
        ending = rows.Ending(STOP, outcome.text, 0, "0" * 64, now(), now() - LONG_AGO)
        assert world.database.write(lambda s: rows.commit(s, row.id, row.epoch, ending))
        assert world.dones(worker.session_id) == []
        return worker.session_id

    def test_done_is_put_in_the_log_and_noted(self, world: World, unpublished: UUID) -> None:
        assert world.reaper.reap() == NOTHING_DUE | {"unpublished": 1}
        assert world.row(unpublished).published_at is not None
        assert [done.position for done in world.dones(unpublished)] == [done_position(len(WORLD_TEXT))]
        assert 0 < world.redis.ttl(state_key(unpublished)) <= world.settings.log_retention_seconds
        assert world.reaper.reap() == NOTHING_DUE

    def test_done_that_was_there_and_not_noted_is_not_doubled(self, world: World, unpublished: UUID) -> None:
        world.manager.publish(unpublished)
        world.change(unpublished, published_at=None)
        assert world.reaper.reap()["unpublished"] == 1
        assert len(world.dones(unpublished)) == 1

    def test_where_the_log_is_gone_it_is_noted(self, world: World, unpublished: UUID) -> None:
        world.forget(unpublished)
        assert world.reaper.reap()["unpublished"] == 1
        assert world.row(unpublished).published_at is not None
        assert world.reaper.reap() == NOTHING_DUE

    def test_whoever_committed_gets_a_moment(self, world: World, unpublished: UUID) -> None:
        world.change(unpublished, ended_at=now())
        assert world.reaper.reap() == NOTHING_DUE

    def test_without_redis_it_stays_due(self, world: World, world_with: MakeWorld, unpublished: UUID) -> None:
        assert world_with(redis_url=CLOSED_REDIS).reaper.reap()["unpublished"] == 0
        assert world.reaper.reap()["unpublished"] == 1


class TestTheReaperItself:
    def test_with_nothing_due_it_writes_nothing(self, world: World) -> None:
        worker = world.run()
        world.start()
        before = world.redis.info("stats")["total_error_replies"]
        assert world.reaper.reap() == NOTHING_DUE
        assert world.redis.info("stats")["total_error_replies"] == before
        assert world.row(worker.session_id).status == StreamStatus.ACTIVE

    def test_one_sessions_trouble_is_its_own(self, world: World) -> None:
        workers = [lost(world) for _ in range(3)]
        broken, *others = sorted(workers, key=lambda worker: worker.session_id)
        world.redis.delete(state_key(broken.session_id))
        world.redis.set(state_key(broken.session_id), "not a hash")
        assert world.reaper.reap()["lost"] == 2
        assert all(world.row(worker.session_id).owner is None for worker in others)

    def test_a_state_that_this_version_cannot_read_is_its_own_sessions_trouble(self, world: World) -> None:
        unreadable, other = lost(world), lost(world)
        world.redis.hset(state_key(unreadable.session_id), "phase", "DREAMING")
        assert world.reaper.reap()["lost"] == 1
        assert world.row(other.session_id).owner is None

    def test_a_row_that_goes_meanwhile_is_nobody_elses_trouble(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        going, other = lost(world), lost(world)
        looked_at = world.reaper._left_seconds

        def gone(row: StreamSession, moment: datetime) -> float:
            found = looked_at(row, moment)
            world.database.write(lambda s: s.execute(delete(StreamSession).where(StreamSession.id == going.session_id)))
            return found

        monkeypatch.setattr(world.reaper, "_left_seconds", gone)
        assert world.reaper.reap()["lost"] == 1
        assert world.row(other.session_id).owner is None

    def test_a_broker_that_is_down_loses_nothing(self, world: World) -> None:
        worker = lost(world)
        world.queue.broken = True
        world.reaper.reap()
        world.queue.broken = False
        world.change(worker.session_id, requeue_at=now() - LONG_AGO)
        world.reaper.reap()
        assert world.queue.enqueued == [worker.session_id] * 2

    def test_one_kind_does_not_starve_another(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(recovery, "REAP_BATCH", 2)
        for _ in range(3):
            lost(world)
        queued = world.start().session_id
        world.change(queued, requeue_at=now() - LONG_AGO)
        assert world.reaper.reap() == {"lost": 2, "unclaimed": 1}
        assert world.reaper.reap()["lost"] == 1
