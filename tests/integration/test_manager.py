"""The manager on real databases and a real Valkey: who starts, claims, stops and ends a session, whoever races."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar
from unittest.mock import patch
from uuid import UUID

import orjson
import pytest
from sqlalchemy import update

from tests.integration.conftest import MakeWorld
from tests.integration.world import CLOSED_REDIS, LATER, WORLD_TEXT, Worker, World
from tests.upstream import MIXED
from webapp.errors import ConversationBusy, Invalid, NotFound, SluicegateError, TooManyStreams, Unavailable
from webapp.models import IdempotencyKey, Message, OnDisconnect, Role, new_id, now
from webapp.streams import manager as manager_module
from webapp.streams import rows
from webapp.streams.events import THINKING, done_position
from webapp.streams.lifecycle import StreamPhase, StreamStatus, TerminationReason
from webapp.streams.log import Answer, Verdict
from webapp.streams.ports import NewMessage, Outcome, RequestKey, Rerun
from webapp.streams.rows import Beat, BeatAnswer
from webapp.views import ReceiptView, SessionView

T = TypeVar("T")
STOP, USER, ADMIN = TerminationReason.STOP, TerminationReason.USER, TerminationReason.ADMIN
NOTHING_SHA256 = hashlib.sha256(b"").hexdigest()


def at_once(count: int, action: Callable[[int], T]) -> list[T | Exception]:
    """Do the same in many threads that begin together; what each returned or raised."""
    barrier = threading.Barrier(count)

    def one(number: int) -> T | Exception:
        barrier.wait()
        try:
            return action(number)
        except SluicegateError as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


class TestStart:
    def test_question_answer_and_session_are_written_and_queued(self, world: World) -> None:
        view = world.start("hello, you", options={"seed": 7}, think="low", on_disconnect=OnDisconnect.TERMINATE)
        assert (view.status, view.phase, view.length, view.attempt) == (StreamStatus.ACTIVE, StreamPhase.QUEUED, 0, 0)
        row = world.row(view.session_id)
        assert (row.epoch, row.owner, row.model, row.options, row.think) == (0, None, "a-model", {"seed": 7}, "low")
        assert row.on_disconnect == "terminate"
        assert row.requeue_at is not None
        assert world.queue.enqueued == [view.session_id]
        assert world.counts() == Counter(
            users=1, conversations=1, conversation_members=1, messages=2, stream_sessions=1, sign_in_tokens=0
        )

    def test_the_two_messages_are_in_order(self, world: World) -> None:
        view = world.start(WORLD_TEXT)
        question, answer = world.services.conversations.messages(view.conversation_id)
        assert (question.role, question.content, question.status) == ("user", WORLD_TEXT, None)
        assert (answer.role, answer.content, answer.status) == ("assistant", "", "ACTIVE")
        assert (answer.id, answer.session_id, answer.model) == (view.message_id, view.session_id, "a-model")

    def test_the_log_is_open_before_a_worker_comes(self, world: World) -> None:
        state = world.log.state(world.start().session_id)
        assert state is not None
        assert (state.epoch, state.end, state.fence) == (0, 0, None)

    def test_a_conversation_that_is_made_is_the_senders_and_has_a_title(self, world: World) -> None:
        view = world.start("  What\nis\tthis?  " + "x" * 100)
        made = world.services.conversations.get(world.user(), view.conversation_id)
        assert made.role == "owner"
        assert made.title == ("What is this? " + "x" * 100)[:60]

    def test_one_that_is_named_is_gone_on_with(self, world: World) -> None:
        conversation_id = world.conversation()
        view = world.start(conversation_id=conversation_id)
        assert view.conversation_id == conversation_id
        assert world.counts()["conversations"] == 1

    def test_without_redis_nothing_is_written(self, world: World, world_with: MakeWorld) -> None:
        world.user()
        before = world.counts()
        cut_off = world_with(redis_url=CLOSED_REDIS)
        with pytest.raises(Unavailable) as caught:
            cut_off.start()
        assert caught.value.retry_after_seconds
        assert world.counts() == before
        assert cut_off.queue.enqueued == []

    def test_without_a_broker_it_is_accepted_and_queued_later(self, world: World) -> None:
        world.queue.broken = True
        view = world.start()
        world.queue.broken = False
        assert view.active
        assert world.reaper.reap()["unclaimed"] == 1  # at once: it is known not to be in the queue
        assert world.queue.enqueued == [view.session_id]
        assert world.reaper.reap()["unclaimed"] == 0

    def test_a_conversation_with_an_active_stream_is_busy(self, world: World) -> None:
        first = world.start()
        before = world.counts()
        with pytest.raises(ConversationBusy) as caught:
            world.start(conversation_id=first.conversation_id)
        assert caught.value.extra == {"sessionId": str(first.session_id)}
        assert world.counts() == before
        assert world.queue.enqueued == [first.session_id]

    def test_it_is_free_again_after_the_end(self, world: World) -> None:
        worker = world.run()
        worker.say("text")
        worker.end()
        again = world.start(conversation_id=world.row(worker.session_id).conversation_id)
        assert again.active

    def test_of_many_at_once_one_is_accepted(self, world: World) -> None:
        conversation_id = world.conversation()
        new = NewMessage(world.user(), "hello", "m", conversation_id)
        outcomes = at_once(12, lambda _: world.manager.start(new))
        busy = [one for one in outcomes if isinstance(one, ConversationBusy)]
        assert len(busy) == 11
        assert world.counts()["stream_sessions"] == 1
        assert world.counts()["messages"] == 2
        assert len(world.queue.enqueued) == 1

    def test_a_user_at_the_cap_is_refused_and_another_is_not(self, world_with: MakeWorld) -> None:
        world = world_with(max_active_streams_per_user=2)
        first = world.start()
        world.start()
        before = world.counts()
        with pytest.raises(TooManyStreams) as caught:
            world.start()
        assert caught.value.retry_after_seconds
        assert world.counts() == before
        world.start(user_id=world.user("bob"))
        world.manager.terminate(first.session_id, USER)
        world.start()

    def test_the_cap_holds_for_many_at_once(self, world_with: MakeWorld) -> None:
        world = world_with(max_active_streams_per_user=3)
        new = NewMessage(world.user(), "hello", "m")
        outcomes = at_once(12, lambda _: world.manager.start(new))
        assert sum(isinstance(one, TooManyStreams) for one in outcomes) == 9
        assert world.counts()["stream_sessions"] == 3

    def test_no_cap_is_none(self, world_with: MakeWorld) -> None:
        world = world_with(max_active_streams_per_user=0)
        assert len({world.start().session_id for _ in range(21)}) == 21

    def test_a_full_queue_refuses_and_what_was_claimed_does_not_count(self, world_with: MakeWorld) -> None:
        world = world_with(max_queued_streams=2)
        first = world.start()
        world.start()
        before = world.counts()
        with pytest.raises(Unavailable, match="queue is full"):
            world.start()
        assert world.counts() == before
        world.run(first.session_id)
        world.start()


class TestARequestThatIsRepeated:
    def new(self, world: World, key: str = "k", body: str = "b", **more: Any) -> NewMessage:
        request = RequestKey(world.user(), key, hashlib.sha256(body.encode()).hexdigest())
        return NewMessage(world.user(), "hello", "m", request_key=request, **more)

    def test_it_is_remembered_by_its_key(self, world: World) -> None:
        new = self.new(world)
        assert new.request_key is not None
        assert world.manager.repeated(new.request_key) is None
        view = world.manager.start(new)
        found = world.manager.repeated(new.request_key)
        assert found is not None
        assert found.session_id == view.session_id

    def test_with_another_body_it_is_refused(self, world: World) -> None:
        world.manager.start(self.new(world))
        other = self.new(world, body="another").request_key
        assert other is not None
        with pytest.raises(Invalid):
            world.manager.repeated(other)

    def test_twins_at_once_begin_one_session(self, world: World) -> None:
        new = self.new(world)
        outcomes = at_once(8, lambda _: world.manager.start(new))
        assert len({one.session_id for one in outcomes if isinstance(one, SessionView)}) == 1
        assert all(isinstance(one, SessionView) for one in outcomes)
        assert world.counts()["stream_sessions"] == 1
        assert len(world.queue.enqueued) == 1

    def test_twins_in_a_conversation_begin_one_session(self, world: World) -> None:
        new = self.new(world, conversation_id=world.conversation())
        outcomes = at_once(8, lambda _: world.manager.start(new))
        assert all(isinstance(one, SessionView) for one in outcomes), outcomes

    @pytest.mark.parametrize("limits", [{"max_active_streams_per_user": 1}, {"max_queued_streams": 1}])
    def test_a_twin_that_comes_second_is_not_refused_for_what_the_first_has_filled(
        self, world_with: MakeWorld, limits: dict[str, int]
    ) -> None:
        world = world_with(**limits)
        new = self.new(world)
        outcomes = at_once(6, lambda _: world.manager.start(new))
        assert all(isinstance(one, SessionView) for one in outcomes), outcomes

    def test_a_key_is_forgotten_after_a_day(self, world: World) -> None:
        new = self.new(world)
        first = world.manager.start(new)
        long_ago = now() - timedelta(hours=25)
        world.database.write(lambda s: s.execute(update(IdempotencyKey).values(created_at=long_ago)))
        assert world.manager.start(new).session_id != first.session_id
        assert world.counts()["idempotency_keys"] == 1


class TestClaim:
    def test_it_makes_the_worker_the_owner(self, world: World) -> None:
        view = world.start(options={"seed": 7}, think=True, keep_alive="5m")
        assignment = world.manager.claim(view.session_id, "worker@one")
        assert assignment is not None
        assert (assignment.session_id, assignment.conversation_id) == (view.session_id, view.conversation_id)
        assert (assignment.epoch, assignment.attempt, assignment.model) == (1, 1, "a-model")
        assert (assignment.options, assignment.think, assignment.keep_alive) == ({"seed": 7}, True, "5m")
        assert (assignment.checkpoint, assignment.checkpoint_thinking_length) == ("", 0)
        assert assignment.messages == [{"role": "user", "content": "hello"}]
        row = world.row(view.session_id)
        assert (row.owner, row.epoch, row.attempt, row.phase) == ("worker@one", 1, 1, "LOADING")
        assert row.claimed_at == row.heartbeat_at
        assert row.heartbeat_at is not None

    def test_a_second_finds_nothing_to_do(self, world: World) -> None:
        worker = world.run()
        assert world.manager.claim(worker.session_id, "worker@two") is None
        assert world.manager.claim(worker.session_id, worker.owner) is None
        assert (world.row(worker.session_id).owner, world.row(worker.session_id).epoch) == (worker.owner, 1)

    def test_of_many_at_once_one_gets_it(self, world: World) -> None:
        session_id = world.start().session_id
        claims = at_once(16, lambda number: world.manager.claim(session_id, f"worker@{number}"))
        (winner,) = [number for number, claim in enumerate(claims) if claim is not None]
        assert world.row(session_id).owner == f"worker@{winner}"
        assert world.row(session_id).epoch == 1

    def test_what_has_ended_or_never_was_is_nothing_to_do(self, world: World) -> None:
        session_id = world.start().session_id
        world.manager.terminate(session_id, USER)
        assert world.manager.claim(session_id, "worker@one") is None
        assert world.manager.claim(new_id(), "worker@one") is None
        assert world.row(session_id).epoch == 0

    @pytest.mark.parametrize("reason", [USER, TerminationReason.SUPERSEDED])
    def test_what_was_to_be_stopped_is_ended_instead(self, world: World, reason: TerminationReason) -> None:
        session_id = world.start().session_id
        world.database.write(lambda s: rows.record_stop(s, session_id, reason, "ada", now()))
        assert world.manager.claim(session_id, "worker@one") is None
        row = world.row(session_id)
        assert (row.status, row.reason, row.owner, row.epoch) == ("TERMINATED", reason.value, None, 0)
        assert row.published_at is not None

    def test_the_next_epoch_gets_what_the_last_one_had_saved(self, world: World) -> None:
        worker = world.run()
        world.manager.beat([Beat(worker.session_id, 1, 0, "hm" + WORLD_TEXT, 2, LATER)])
        world.manager.give_up(worker.session_id, 1)
        assignment = world.manager.claim(worker.session_id, "worker@two")
        assert assignment is not None
        assert (assignment.epoch, assignment.attempt) == (2, 2)
        assert (assignment.checkpoint, assignment.checkpoint_thinking_length) == ("hm" + WORLD_TEXT, 2)

    def test_without_redis_it_is_claimed_all_the_same(self, world: World, world_with: MakeWorld) -> None:
        session_id = world.start().session_id
        assert world_with(redis_url=CLOSED_REDIS).manager.claim(session_id, "worker@one") is not None


class TestStatements:
    """Each names the state from which it moves, whoever looked before."""

    def claim(self, world: World, session_id: UUID, epoch: int) -> bool:
        return world.database.write(lambda s: rows.claim(s, session_id, epoch, "worker@two", now(), LATER))

    def test_claim_moves_only_what_is_active_unowned_and_at_the_epoch(self, world: World) -> None:
        session_id = world.start().session_id
        assert not self.claim(world, session_id, 1)
        assert self.claim(world, session_id, 0)
        assert not self.claim(world, session_id, 0)
        assert not self.claim(world, session_id, 1)
        world.manager.give_up(session_id, 1)
        assert not self.claim(world, session_id, 0)
        assert self.claim(world, session_id, 1)
        ended = world.start().session_id
        world.manager.terminate(ended, USER)
        assert not self.claim(world, ended, 0)

    def test_the_first_claim_is_the_one_from_which_a_duration_counts(self, world: World) -> None:
        session_id = world.start().session_id
        self.claim(world, session_id, 0)
        first = world.row(session_id).claimed_at
        world.manager.give_up(session_id, 1)
        assignment = world.manager.claim(session_id, "worker@three")
        assert assignment is not None
        assert assignment.claimed_at == world.row(session_id).claimed_at == first

    def test_the_first_stop_on_record_stays(self, world: World) -> None:
        session_id = world.start().session_id
        world.database.write(lambda s: rows.record_stop(s, session_id, ADMIN, "root", now()))
        world.database.write(lambda s: rows.record_stop(s, session_id, USER, "ada", now()))
        row = world.row(session_id)
        assert (row.stop_reason, row.stop_by) == ("admin", "root")

    def test_no_stop_is_recorded_of_what_has_ended(self, world: World) -> None:
        worker = world.run()
        worker.end()
        world.database.write(lambda s: rows.record_stop(s, worker.session_id, USER, "ada", now()))
        assert world.row(worker.session_id).stop_reason is None

    def test_only_what_has_ended_is_published(self, world: World) -> None:
        session_id = world.run().session_id
        world.database.write(lambda s: rows.published(s, session_id, now()))
        assert world.row(session_id).published_at is None


class TestHistory:
    def said(self, world: World, session_id: UUID) -> list[tuple[str, str]]:
        assignment = world.manager.claim(session_id, "worker@one")
        assert assignment is not None
        return [(one["role"], one["content"]) for one in assignment.messages]

    def ask(self, world: World, question: str, conversation_id: UUID | None, answer: str = "") -> UUID:
        """A turn that has ended; returns its conversation."""
        worker = world.run(world.start(question, conversation_id=conversation_id).session_id)
        worker.say("hm ", THINKING)
        worker.say(answer)
        worker.end()
        return world.row(worker.session_id).conversation_id

    def test_it_is_what_was_said_before_oldest_first_without_thinking(self, world: World) -> None:
        conversation_id = self.ask(world, "one?", None, "one")
        self.ask(world, "two?", conversation_id, WORLD_TEXT)
        last = world.start("three?", conversation_id=conversation_id)
        assert self.said(world, last.session_id) == [
            ("user", "one?"),
            ("assistant", "one"),
            ("user", "two?"),
            ("assistant", WORLD_TEXT),
            ("user", "three?"),
        ]

    def test_it_is_cut_at_the_limit_and_begins_with_a_question(self, world_with: MakeWorld) -> None:
        world = world_with(history_limit_characters=13)
        conversation_id = self.ask(world, "one?", None, "one")
        self.ask(world, "two?", conversation_id, "two")
        last = world.start("three?", conversation_id=conversation_id)
        assert self.said(world, last.session_id) == [("user", "two?"), ("assistant", "two"), ("user", "three?")]

    def test_it_does_not_begin_with_an_answer(self, world_with: MakeWorld) -> None:
        world = world_with(history_limit_characters=9)
        conversation_id = self.ask(world, "a long question?", None, "one")
        last = world.start("three?", conversation_id=conversation_id)
        assert self.said(world, last.session_id) == [("user", "three?")]

    def test_the_question_is_there_however_long(self, world_with: MakeWorld) -> None:
        world = world_with(history_limit_characters=0)
        assert self.said(world, world.start("a question").session_id) == [("user", "a question")]

    def test_an_answer_that_was_replaced_is_not_in_it(self, world: World) -> None:
        conversation_id = self.ask(world, "one?", None, "old")
        new = Message(id=new_id(), conversation_id=conversation_id, role="assistant", content="new")
        replacing = new.id

        def work(s: Any) -> None:
            s.add(new)
            s.flush()
            for message in s.query(Message).filter(Message.content == "old"):
                message.replaced_by_id = replacing

        world.database.write(work)
        last = world.start("two?", conversation_id=conversation_id)
        assert self.said(world, last.session_id) == [("user", "one?"), ("assistant", "new"), ("user", "two?")]

    def test_another_conversation_is_not_in_it(self, world: World) -> None:
        self.ask(world, "secret?", None, "secret")
        assert self.said(world, world.start("mine?").session_id) == [("user", "mine?")]


class TestFinish:
    def test_the_end_is_committed_and_then_published(self, world: World) -> None:
        worker = world.run()
        worker.say("hm ", THINKING)
        worker.say(WORLD_TEXT)
        closed_at = now()
        assert worker.end(stats={"eval_count": 3}, upstream_closed_at=closed_at)
        row, message = world.row(worker.session_id), world.message(worker.session_id)
        assert (row.status, row.reason, row.phase) == ("COMPLETED", "stop", "GENERATING")
        assert (row.length, row.thinking_length) == (len(WORLD_TEXT), 3)
        assert row.sha256 == hashlib.sha256(WORLD_TEXT.encode()).hexdigest()
        assert (row.upstream_closed_at, row.checkpoint) == (closed_at, "")
        assert row.fenced_at is not None
        assert row.ended_at is not None
        assert row.fenced_at <= row.ended_at
        assert row.published_at is not None
        assert (message.thinking, message.content) == ("hm ", WORLD_TEXT)
        assert (message.status, message.reason, message.stats) == ("COMPLETED", "stop", {"eval_count": 3})

    def test_done_says_what_the_row_says(self, world: World) -> None:
        worker = world.run()
        worker.say("hm ", THINKING)
        worker.say(WORLD_TEXT)
        worker.end()
        (done,) = world.dones(worker.session_id)
        row = world.row(worker.session_id)
        assert done.position == done_position(3 + len(WORLD_TEXT))
        assert orjson.loads(done.data) == {
            "status": "COMPLETED",
            "reason": "stop",
            "messageId": str(row.message_id),
            "length": len(WORLD_TEXT),
            "thinkingLength": 3,
            "sha256": row.sha256,
        }

    def test_a_second_time_changes_nothing(self, world: World) -> None:
        worker = world.run()
        worker.say("text")
        answer = worker.fence(STOP)
        assert worker.commit(answer)
        before = world.queries.receipt(worker.session_id)
        worker.text = "another text"
        assert not worker.commit(replace(answer, reason=USER, end=12))
        assert world.queries.receipt(worker.session_id) == before
        assert len(world.dones(worker.session_id)) == 1

    def test_of_many_at_once_one_ends_it(self, world: World) -> None:
        worker = world.run()
        worker.say("text")
        answer = worker.fence(STOP)
        assert sorted(map(str, at_once(8, lambda _: worker.commit(answer)))) == ["False"] * 7 + ["True"]
        assert len(world.dones(worker.session_id)) == 1

    def test_an_old_epoch_ends_nothing(self, world: World) -> None:
        old = world.run()
        old.say("text")
        world.manager.give_up(old.session_id, 1)
        new = world.run(old.session_id, owner="worker@two")
        fence = new.fence(STOP)
        assert not old.commit(fence)
        assert world.row(old.session_id).status == StreamStatus.ACTIVE
        assert world.message(old.session_id).content == ""
        assert world.dones(old.session_id) == []
        assert new.commit(fence)

    def test_an_epoch_that_changes_in_between_ends_nothing(self, world: World) -> None:
        """The guard is in the statement, not only in what was read before."""
        worker = world.run()
        row = world.row(worker.session_id)
        world.manager.give_up(worker.session_id, 1)
        world.run(worker.session_id, owner="worker@two")
        ending = rows.Ending(STOP, "text", 0, "0" * 64, now(), now())
        assert not world.database.write(lambda s: rows.commit(s, row.id, row.epoch, ending))
        assert world.row(worker.session_id).status == StreamStatus.ACTIVE
        assert world.message(worker.session_id).content == ""

    def test_every_reason_leads_to_its_status(self, world: World) -> None:
        for reason in TerminationReason:
            worker = world.run()
            worker.end(reason, detail="for a person")
            row = world.row(worker.session_id)
            assert (row.status, row.reason, row.detail) == (reason.status.value, reason.value, "for a person")
            assert world.message(worker.session_id).reason == reason.value

    def test_what_was_not_in_the_log_when_the_fence_fell_is_cut(self, world: World) -> None:
        worker = world.run()
        worker.say("hm ", THINKING)
        worker.say("e\u0301t")
        fence = world.log.fence(worker.session_id, USER)
        worker.text += "at, and more"
        assert worker.say("x").verdict is Verdict.FENCED
        assert worker.commit(fence)
        assert world.message(worker.session_id).content == "e\u0301t"
        assert world.log.text(worker.session_id) == ("hm e\u0301t", 3)

    def test_a_fence_in_the_thinking_leaves_no_content(self, world: World) -> None:
        worker = world.run()
        worker.say("hm ", THINKING)
        fence = world.log.fence(worker.session_id, USER)
        worker.text += "and then"
        worker.commit(fence)
        row = world.row(worker.session_id)
        assert (row.length, row.thinking_length, row.sha256) == (0, 3, NOTHING_SHA256)

    def test_a_checkpoint_is_not_lost_to_a_redis_that_was_emptied(self, world: World) -> None:
        """The fence fell in a log that was made anew and empty; the text that was checkpointed stays the text."""
        first = world.run()
        first.say("hm " + WORLD_TEXT)
        world.manager.beat([Beat(first.session_id, 1, 0, first.text, 3, LATER)])
        world.manager.give_up(first.session_id, 1)
        world.forget(first.session_id)
        world.log.open(first.session_id, 1)
        fence = world.log.fence(first.session_id, USER)
        second = world.run(first.session_id, owner="worker@two")
        assert second.text == first.text
        assert second.commit(fence)
        assert world.message(first.session_id).content == WORLD_TEXT
        assert world.row(first.session_id).thinking_length == 3

    def test_without_redis_it_is_committed_and_published_later(self, world: World, world_with: MakeWorld) -> None:
        worker = world.run()
        worker.say("text")
        cut_off = world_with(redis_url=CLOSED_REDIS)
        answer = Answer(Verdict.FENCED, 4, 0, STOP, 0)
        outcome = Outcome(answer, "text", 0, StreamPhase.GENERATING, None)
        assert cut_off.manager.finish(worker.session_id, 1, outcome)
        row = world.row(worker.session_id)
        assert (row.status, row.published_at) == ("COMPLETED", None)
        assert row.fenced_at == row.ended_at
        world.manager.publish(worker.session_id)
        assert len(world.dones(worker.session_id)) == 1


class TestSettle:
    def test_a_queued_session_ends_without_text(self, world: World) -> None:
        session_id = world.start().session_id
        world.manager.settle(session_id, TerminationReason.QUEUE_TIMEOUT, detail="too long")
        row = world.row(session_id)
        assert (row.status, row.reason, row.detail) == ("TERMINATED", "queue_timeout", "too long")
        assert (row.length, row.phase) == (0, "QUEUED")
        assert [entry.position for entry in world.dones(session_id)] == [done_position(0)]

    def test_the_log_is_the_text_where_it_is_longer(self, world: World) -> None:
        worker = world.run()
        worker.say("hm ", THINKING)
        worker.mark(StreamPhase.GENERATING)
        worker.say(WORLD_TEXT)
        world.manager.beat([Beat(worker.session_id, 1, 0, "hm " + WORLD_TEXT[:2], 3, LATER)])
        world.manager.settle(worker.session_id, TerminationReason.WORKER_LOST)
        row, message = world.row(worker.session_id), world.message(worker.session_id)
        assert (message.thinking, message.content) == ("hm ", WORLD_TEXT)
        assert (row.status, row.phase, row.upstream_closed_at) == ("ERROR", "GENERATING", None)

    def test_the_checkpoint_is_where_the_log_is_shorter(self, world: World) -> None:
        worker = world.run()
        worker.say("h", THINKING)
        world.manager.beat([Beat(worker.session_id, 1, 0, "hm " + WORLD_TEXT, 3, LATER)])
        world.manager.settle(worker.session_id, TerminationReason.WORKER_LOST)
        message = world.message(worker.session_id)
        assert (message.thinking, message.content) == ("hm ", WORLD_TEXT)
        assert world.dones(worker.session_id)[0].position == done_position(3 + len(WORLD_TEXT))

    def test_the_checkpoint_is_where_the_log_is_gone(self, world: World) -> None:
        worker = world.run()
        worker.say(WORLD_TEXT)
        world.manager.beat([Beat(worker.session_id, 1, 0, WORLD_TEXT, 0, LATER)])
        world.forget(worker.session_id)
        with pytest.raises(Unavailable):  # its worker lives, and has more than the checkpoint
            world.manager.settle(worker.session_id, USER)
        world.change(worker.session_id, heartbeat_at=now() - timedelta(minutes=1))
        world.manager.settle(worker.session_id, USER)
        assert world.message(worker.session_id).content == WORLD_TEXT
        assert world.row(worker.session_id).reason == "user"
        assert len(world.dones(worker.session_id)) == 1

    def test_a_state_of_an_older_epoch_is_not_the_sessions(self, world: World) -> None:
        """In an emptied Redis a web process's late OPEN has made an empty one; the worker has what was seen."""
        worker = world.run()
        worker.say(WORLD_TEXT)
        world.forget(worker.session_id)
        world.log.open(worker.session_id, 0)
        with pytest.raises(Unavailable):
            world.manager.settle(worker.session_id, USER)
        assert world.row(worker.session_id).status == StreamStatus.ACTIVE
        world.change(worker.session_id, heartbeat_at=now() - timedelta(minutes=1))
        world.manager.settle(worker.session_id, USER)
        assert world.row(worker.session_id).reason == "user"

    def test_a_checkpoint_that_comes_in_between_is_not_lost(self, world: World) -> None:
        """Redis was emptied between the fence and the commit, and the worker has written down more than was read."""
        worker = world.run()
        worker.say("h")
        read_text = world.log.text

        def checkpoint_then_read(session_id: UUID) -> tuple[str, int]:
            world.manager.beat([Beat(worker.session_id, 1, 0, WORLD_TEXT, 0, LATER)])
            return read_text(session_id)

        with patch.object(world.log, "text", checkpoint_then_read):
            world.manager.settle(worker.session_id, USER)
        assert world.message(worker.session_id).content == WORLD_TEXT

    def test_the_fence_that_stands_is_the_reason(self, world: World) -> None:
        worker = world.run()
        worker.say("text")
        fence = worker.fence(STOP)
        world.manager.settle(worker.session_id, TerminationReason.WORKER_LOST, detail="the worker was lost")
        row = world.row(worker.session_id)
        assert (row.status, row.reason, row.detail) == ("COMPLETED", "stop", None)
        assert row.fenced_at is not None
        assert row.fenced_at.timestamp() == pytest.approx(fence.fenced_us / 1e6, abs=1e-5)

    def test_a_lost_worker_that_comes_back_changes_nothing(self, world: World) -> None:
        worker = world.run()
        worker.say("text")
        world.manager.settle(worker.session_id, TerminationReason.WORKER_LOST)
        before = world.queries.receipt(worker.session_id)
        assert worker.say("more").verdict is Verdict.FENCED
        assert not worker.end()
        assert world.queries.receipt(worker.session_id) == before

    def test_twice_and_at_once_is_once(self, world: World) -> None:
        session_id = world.run().session_id
        assert at_once(8, lambda _: world.manager.settle(session_id, ADMIN)) == [None] * 8
        world.manager.settle(session_id, USER)
        assert world.row(session_id).reason == "admin"
        assert len(world.dones(session_id)) == 1

    def test_without_redis_what_was_seen_is_not_known_so_it_stays(self, world: World, world_with: MakeWorld) -> None:
        session_id = world.run().session_id
        with pytest.raises(Unavailable):
            world_with(redis_url=CLOSED_REDIS).manager.settle(session_id, USER)
        assert world.row(session_id).status == StreamStatus.ACTIVE

    def test_nor_of_one_that_was_given_up(self, world: World, world_with: MakeWorld) -> None:
        """Nobody has it now, but who had it may have said more than the row has."""
        worker = world.run()
        worker.say("text")
        world.manager.give_up(worker.session_id, worker.epoch)
        with pytest.raises(Unavailable):
            world_with(redis_url=CLOSED_REDIS).manager.settle(worker.session_id, USER)
        assert world.row(worker.session_id).status == StreamStatus.ACTIVE

    def test_without_redis_one_that_nobody_has_had_has_the_text_of_its_row(
        self, world: World, world_with: MakeWorld
    ) -> None:
        worker = world.run()
        worker.say("hm ", THINKING)
        worker.say("text")
        worker.end(USER)
        rerun = Rerun(worker.session_id, world.row(worker.session_id).user_id)
        new, continued = world.start().session_id, world.manager.continue_(rerun).session_id
        for session_id, content, thinking in ((new, "", ""), (continued, "text", "hm ")):
            cut_off = world_with(redis_url=CLOSED_REDIS)
            receipt = cut_off.manager.terminate(session_id, USER)
            assert (receipt.reason, receipt.partial_response) == (USER, content)
            assert receipt.thinking_length == len(thinking)
            world.manager.publish(session_id)
            assert world.log.text(session_id) == (thinking + content, len(thinking))
            assert world.manager.claim(session_id, "worker@one") is None

    def test_an_unknown_one_is_not_found(self, world: World) -> None:
        with pytest.raises(NotFound):
            world.manager.settle(new_id(), USER)


class TestTerminateQueued:
    def test_the_receipt_of_a_session_that_nobody_ran(self, world: World) -> None:
        view = world.start()
        before = now()
        receipt = world.manager.terminate(view.session_id, USER, by="ada")
        assert receipt.session_id == view.session_id
        assert (receipt.conversation_id, receipt.message_id) == (view.conversation_id, view.message_id)
        assert (receipt.status, receipt.reason, receipt.already_ended) == (StreamStatus.TERMINATED, USER, False)
        assert (receipt.partial_response, receipt.length, receipt.thinking_length) == ("", 0, 0)
        assert receipt.sha256 == NOTHING_SHA256
        assert receipt.upstream_closed_at is None
        assert receipt.requested_at is not None
        assert receipt.fenced_at is not None
        assert before <= receipt.requested_at <= receipt.fenced_at <= receipt.committed_at <= now()

    def test_its_task_is_revoked_and_nobody_nudged(self, world: World) -> None:
        session_id = world.start().session_id
        world.manager.terminate(session_id, USER)
        assert world.queue.revoked == [session_id]
        assert world.queue.nudged == []

    def test_it_is_quick(self, world: World) -> None:
        session_id = world.start().session_id
        started = time.monotonic()
        world.manager.terminate(session_id, USER)
        assert time.monotonic() - started < 0.5

    def test_a_broker_that_is_down_does_not_keep_it_from_ending(self, world: World) -> None:
        session_id = world.start().session_id
        world.queue.broken = True
        assert world.manager.terminate(session_id, USER).status is StreamStatus.TERMINATED

    def test_the_view_says_who_did_it(self, world: World) -> None:
        session_id = world.start().session_id
        world.manager.terminate(session_id, ADMIN, by="root")
        view = world.queries.view(session_id)
        assert (view.terminated_by, view.reason, view.active) == ("root", ADMIN, False)
        assert view.ended_at is not None

    def test_an_unknown_one_is_not_found(self, world: World) -> None:
        with pytest.raises(NotFound):
            world.manager.terminate(new_id(), USER)

    def test_claiming_and_terminating_at_once_end_in_one_way(self, world: World) -> None:
        """Whoever is first: the claimer meets the fence, or finds nothing to claim."""

        def race(number: int) -> ReceiptView | None:
            if number % 2:
                return world.manager.terminate(session_id, USER)
            worker = Worker(world, session_id, f"worker@{number}")
            if worker.claim() is not None:
                answer = worker.say("text")
                worker.end(USER if answer.fenced else STOP)
            return None

        for _ in range(20):
            session_id = world.start().session_id
            said = at_once(6, race)
            receipts = [one for one in said if isinstance(one, ReceiptView)]
            assert len(receipts) == 3, said
            assert len(set(map(repr, receipts))) == 1
            assert len(world.dones(session_id)) == 1
            assert world.message(session_id).content == world.log.text(session_id)[0]


class TestTerminateRunning:
    def test_the_worker_is_nudged_once_and_its_commit_awaited(self, world: World) -> None:
        worker = world.run()
        worker.say("hm ", THINKING)
        worker.say(WORLD_TEXT)
        worker.obey()
        started = time.monotonic()
        receipt = world.manager.terminate(worker.session_id, USER, by="ada")
        assert time.monotonic() - started < 1
        assert world.queue.nudged == [(worker.session_id, worker.owner, USER)]
        assert world.queue.revoked == []
        assert (receipt.partial_response, receipt.length, receipt.thinking_length) == (WORLD_TEXT, len(WORLD_TEXT), 3)
        assert receipt.sha256 == hashlib.sha256(WORLD_TEXT.encode()).hexdigest()
        assert receipt.upstream_closed_at is not None
        assert receipt.already_ended is False

    def test_nothing_is_appended_after_it(self, world: World) -> None:
        worker = world.run()
        worker.say("text")
        worker.obey()
        world.manager.terminate(worker.session_id, USER)
        assert worker.say("more").verdict is Verdict.FENCED
        assert world.log.text(worker.session_id)[0] == "text"

    def test_a_worker_that_does_not_answer_is_not_waited_for_for_ever(self, world_with: MakeWorld) -> None:
        world = world_with(terminate_wait_seconds=0.15)
        worker = world.run()
        worker.say(WORLD_TEXT)
        started = time.monotonic()
        receipt = world.manager.terminate(worker.session_id, USER)
        assert 0.15 <= time.monotonic() - started < 1
        assert (receipt.reason, receipt.partial_response) == (USER, WORLD_TEXT)
        assert receipt.upstream_closed_at is None
        assert not worker.end(USER)
        assert world.queries.receipt(worker.session_id) == receipt

    def test_a_nudge_that_is_lost_costs_only_time(self, world_with: MakeWorld) -> None:
        world = world_with(terminate_wait_seconds=0.15)
        worker = world.run()
        world.queue.broken = True
        assert world.manager.terminate(worker.session_id, USER).reason is USER

    def test_without_redis_the_stop_is_recorded_for_the_worker_to_learn(
        self, world: World, world_with: MakeWorld, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        worker = world.run()
        monkeypatch.setattr(manager_module, "WITHOUT_REDIS_WAIT_SECONDS", 0.2)
        cut_off = world_with(redis_url=CLOSED_REDIS)
        with pytest.raises(Unavailable):
            cut_off.manager.terminate(worker.session_id, USER, by="ada")
        row = world.row(worker.session_id)
        assert (row.status, row.stop_reason, row.stop_by) == ("ACTIVE", "user", "ada")
        assert cut_off.queue.nudged == [(worker.session_id, worker.owner, USER)]
        answers = world.manager.beat([Beat(worker.session_id, 1, 0, "", 0, LATER)])
        assert answers == [BeatAnswer(worker.session_id, 0, USER)]

    def test_without_redis_a_worker_that_ends_it_is_enough(self, world: World, world_with: MakeWorld) -> None:
        worker = world.run()
        worker.say("text")
        cut_off = world_with(redis_url=CLOSED_REDIS)
        answer = Answer(Verdict.FENCED, 4, 0, USER, 0)
        outcome = Outcome(answer, "text", 0, StreamPhase.GENERATING, None)
        cut_off.queue.on_nudge = lambda session_id, _: threading.Thread(
            target=cut_off.manager.finish, args=(session_id, 1, outcome)
        ).start()
        receipt = cut_off.manager.terminate(worker.session_id, USER)
        assert (receipt.reason, receipt.partial_response) == (USER, "text")

    def test_the_first_reason_stays(self, world_with: MakeWorld) -> None:
        world = world_with(terminate_wait_seconds=0.1)
        worker = world.run()
        world.database.write(lambda s: rows.record_stop(s, worker.session_id, ADMIN, "root", now()))
        receipt = world.manager.terminate(worker.session_id, USER, by="ada")
        assert receipt.reason is ADMIN
        assert world.queries.view(worker.session_id).terminated_by == "root"

    def test_the_ending_that_was_fenced_already_is_the_one(self, world: World) -> None:
        worker = world.run()
        worker.say("text")
        fence = worker.fence(STOP)
        finisher = threading.Timer(0.1, worker.commit, [fence])
        finisher.start()
        receipt = world.manager.terminate(worker.session_id, USER, by="ada")
        finisher.join()
        assert (receipt.status, receipt.reason) == (StreamStatus.COMPLETED, STOP)
        assert receipt.already_ended
        assert world.queries.view(worker.session_id).terminated_by is None


class TestTerminateEnded:
    def test_what_has_completed_had_ended_already(self, world: World) -> None:
        worker = world.run()
        worker.say(WORLD_TEXT)
        worker.end()
        receipt = world.manager.terminate(worker.session_id, USER, by="ada")
        assert (receipt.status, receipt.reason) == (StreamStatus.COMPLETED, STOP)
        assert receipt.already_ended
        assert (receipt.partial_response, receipt.requested_at) == (WORLD_TEXT, None)
        assert world.row(worker.session_id).stop_reason is None
        assert world.queue.nudged == world.queue.revoked == []

    def test_whether_it_had_ended_is_a_property_of_the_session(self, world: World) -> None:
        for reason in TerminationReason:
            session_id = world.start().session_id
            world.manager.settle(session_id, reason)
            receipt = world.manager.terminate(session_id, USER)
            assert receipt.already_ended == (reason not in (USER, ADMIN))

    def test_it_is_repeated_word_for_word(self, world: World) -> None:
        worker = world.run()
        worker.say(WORLD_TEXT)
        worker.obey()
        first = world.manager.terminate(worker.session_id, USER, by="ada")
        for reason, by in ((USER, "ada"), (ADMIN, "root"), (TerminationReason.SUPERSEDED, None)):
            assert world.manager.terminate(worker.session_id, reason, by) == first

    def test_it_needs_no_redis(self, world: World, world_with: MakeWorld) -> None:
        session_id = world.start().session_id
        first = world.manager.terminate(session_id, USER)
        assert world_with(redis_url=CLOSED_REDIS).manager.terminate(session_id, USER) == first


class TestFiftyTerminateAtOnce:
    CALLERS = 50

    def check(self, world: World, session_id: UUID, outcomes: Sequence[object]) -> ReceiptView:
        """All got one receipt, and it is what log and database say."""
        receipts = [one for one in outcomes if isinstance(one, ReceiptView)]
        assert len(receipts) == self.CALLERS
        assert all(one == receipts[0] for one in receipts)
        receipt = world.queries.receipt(session_id)
        assert receipt == receipts[0]
        row, message = world.row(session_id), world.message(session_id)
        text, thinking_length = world.log.text(session_id)
        assert (message.thinking, message.content) == (text[:thinking_length], text[thinking_length:])
        assert (row.length, row.thinking_length) == (len(message.content), thinking_length)
        (done,) = world.dones(session_id)
        assert done is not None
        assert world.entries(session_id)[-1] == done
        assert orjson.loads(done.data)["sha256"] == receipt.sha256
        assert orjson.loads(done.data)["reason"] == receipt.reason.value
        return receipt

    @pytest.mark.parametrize("natural_end_after", [0, 3, 1000])
    def test_all_get_one_receipt_whoever_wins(self, world: World, natural_end_after: int) -> None:
        """Beside a worker that writes on, obeys the nudge, and may come to its own end first."""
        worker = world.run()
        worker.say("hm ", THINKING)
        ended = threading.Event()

        def generate() -> None:
            for _ in range(natural_end_after):
                if worker.say(WORLD_TEXT).fenced:
                    break
            worker.end(STOP)
            ended.set()

        def act(number: int) -> object:
            if number == self.CALLERS:
                generate()
                return None
            return world.manager.terminate(worker.session_id, ADMIN if number % 2 else USER, by=f"user{number}")

        receipt = self.check(world, worker.session_id, at_once(self.CALLERS + 1, act))
        assert ended.is_set()
        assert receipt.reason in (STOP, USER, ADMIN)
        assert receipt.already_ended == (receipt.reason is STOP)

    def test_all_get_one_receipt_where_nobody_owns_it(self, world: World) -> None:
        session_id = world.start().session_id
        outcomes = at_once(self.CALLERS, lambda number: world.manager.terminate(session_id, USER, by=f"user{number}"))
        assert self.check(world, session_id, outcomes).length == 0

    def test_all_get_one_receipt_where_the_worker_is_dead(self, world_with: MakeWorld) -> None:
        world = world_with(terminate_wait_seconds=0.1)
        worker = world.run()
        worker.say(WORLD_TEXT)
        outcomes = at_once(self.CALLERS, lambda _: world.manager.terminate(worker.session_id, USER))
        assert self.check(world, worker.session_id, outcomes).partial_response == WORLD_TEXT


class TestPublish:
    def test_it_may_be_repeated(self, world: World) -> None:
        worker = world.run()
        worker.say("text")
        worker.end()
        before = world.row(worker.session_id).published_at
        world.manager.publish(worker.session_id)
        assert len(world.dones(worker.session_id)) == 1
        assert world.row(worker.session_id).published_at == before

    def test_a_log_that_is_gone_is_made_again(self, world: World) -> None:
        """Whoever still reads it has the rest, and the end, at once."""
        worker = world.run()
        worker.say("thought", THINKING)
        worker.say("said")
        worker.end()
        world.forget(worker.session_id)
        world.change(worker.session_id, published_at=None)
        world.manager.publish(worker.session_id)
        assert world.log.text(worker.session_id) == ("thoughtsaid", 7)
        assert len(world.dones(worker.session_id)) == 1
        assert world.row(worker.session_id).published_at is not None

    def test_without_redis_it_is_not_noted(self, world: World, world_with: MakeWorld) -> None:
        worker = world.run()
        worker.end()
        world.change(worker.session_id, published_at=None)
        with pytest.raises(Exception, match="refused"):
            world_with(redis_url=CLOSED_REDIS).manager.publish(worker.session_id)
        assert world.row(worker.session_id).published_at is None


class TestGivingUp:
    def test_it_goes_to_the_queue_and_on_at_the_next_epoch(self, world: World) -> None:
        old = world.run()
        old.say("one ")
        world.manager.give_up(old.session_id, old.epoch)
        assert world.queue.enqueued == [old.session_id] * 2
        assert world.row(old.session_id).owner is None
        new = world.run(old.session_id, owner="worker@two")
        assert (new.epoch, new.text) == (2, "one ")
        assert world.row(old.session_id).attempt == 2
        assert old.say("lost").verdict is Verdict.STALE
        assert old.mark(StreamPhase.GENERATING).verdict is Verdict.STALE
        assert old.fence(STOP).verdict is Verdict.STALE
        assert world.log.renew([(old.session_id, 1)])[0][1].verdict is Verdict.STALE
        assert world.manager.beat([Beat(old.session_id, 1, 0, "lost", 0, LATER)]) == []
        new.say("two")
        assert new.end()
        assert world.message(old.session_id).content == "one two"

    def test_only_the_owner_can(self, world: World) -> None:
        worker = world.run()
        world.manager.give_up(worker.session_id, 0)
        world.manager.give_up(worker.session_id, 2)
        assert world.row(worker.session_id).owner == worker.owner
        assert len(world.queue.enqueued) == 1

    def test_what_has_ended_is_not_queued_again(self, world: World) -> None:
        worker = world.run()
        worker.end()
        world.manager.give_up(worker.session_id, 1)
        assert len(world.queue.enqueued) == 1
        assert world.row(worker.session_id).owner == worker.owner

    def test_a_second_message_in_the_queue_is_harmless(self, world: World) -> None:
        worker = world.run()
        world.manager.requeue(worker.session_id)
        assert world.manager.claim(worker.session_id, "worker@two") is None
        assert worker.say("text").ok


class TestBeat:
    def beat(self, world: World, worker: Worker, start: int, delta: str, thinking: int = 0) -> BeatAnswer:
        (answer,) = world.manager.beat([Beat(worker.session_id, worker.epoch, start, delta, thinking, LATER)])
        return answer

    def saved(self, world: World, session_id: UUID) -> tuple[str, int, int]:
        row = world.row(session_id)
        return row.checkpoint, row.checkpoint_length, row.checkpoint_thinking_length

    def test_deltas_add_up(self, world: World) -> None:
        worker = world.run()
        assert self.beat(world, worker, 0, "hm ", 3).checkpoint_length == 3
        assert self.beat(world, worker, 3, WORLD_TEXT, 3).checkpoint_length == 3 + len(WORLD_TEXT)
        assert self.saved(world, worker.session_id) == ("hm " + WORLD_TEXT, 3 + len(WORLD_TEXT), 3)

    def test_it_is_one_statement_however_many_there_are(self, world: World) -> None:
        """SQLAlchemy keeps what it has compiled: with another for each number of sessions, a worker would grow."""
        beats = [Beat(world.run().session_id, 1, 0, "a 'quoted' \\ \"text\"\n\U0001f642", 0, LATER) for _ in range(6)]
        world.manager.beat(beats[:1])
        kept: Any = world.database.engine._compiled_cache
        before = len(kept)
        for count in range(2, len(beats) + 1):
            assert len(world.manager.beat(beats[:count])) == count
        assert len(kept) == before
        assert {world.row(one.session_id).checkpoint for one in beats} == {beats[0].delta}

    def test_lengths_are_code_points_in_every_database(self, world: World) -> None:
        for text in (*MIXED, "'; DROP TABLE users; --", "%s :at {x}"):
            worker = world.run()
            assert self.beat(world, worker, 0, text).checkpoint_length == len(text)
            assert self.beat(world, worker, len(text), text).checkpoint_length == 2 * len(text)
            assert self.saved(world, worker.session_id)[0] == 2 * text
            worker.end()

    def test_a_repeated_delta_adds_nothing(self, world: World) -> None:
        worker = world.run()
        for _ in range(3):
            assert self.beat(world, worker, 0, "text").checkpoint_length == 4
        assert self.saved(world, worker.session_id) == ("text", 4, 0)

    @pytest.mark.parametrize("start", [1, 3, 5, 100])
    def test_one_that_does_not_begin_at_the_end_adds_nothing(self, world: World, start: int) -> None:
        worker = world.run()
        self.beat(world, worker, 0, "text")
        assert self.beat(world, worker, start, "more", 9).checkpoint_length == 4
        assert self.saved(world, worker.session_id) == ("text", 4, 0)

    def test_every_beat_is_a_heartbeat(self, world: World) -> None:
        worker = world.run()
        long_ago = now() - timedelta(minutes=1)
        world.change(worker.session_id, heartbeat_at=long_ago)
        before = now()
        self.beat(world, worker, 0, "")
        heartbeat_at = world.row(worker.session_id).heartbeat_at
        assert heartbeat_at is not None
        assert before <= heartbeat_at <= now()

    def test_a_recorded_stop_is_told(self, world: World) -> None:
        worker = world.run()
        assert self.beat(world, worker, 0, "").stop_reason is None
        world.database.write(lambda s: rows.record_stop(s, worker.session_id, ADMIN, None, now()))
        assert self.beat(world, worker, 0, "").stop_reason is ADMIN

    def test_a_worker_that_was_taken_for_lost_has_its_session_back(self, world: World) -> None:
        """It was only slow, and nobody has claimed it since: the message that was queued for another finds it owned."""
        worker = world.run()
        world.manager.give_up(worker.session_id, 1, lost=True)
        assert world.row(worker.session_id).owner is None
        world.manager.beat([Beat(worker.session_id, 1, 0, "", 0, LATER)])
        assert world.row(worker.session_id).owner is None
        world.manager.beat([Beat(worker.session_id, 1, 0, "", 0, LATER, "worker@one")])
        assert world.row(worker.session_id).owner == "worker@one"
        assert world.manager.claim(worker.session_id, "worker@two") is None

    def test_but_not_what_another_has_claimed(self, world: World) -> None:
        worker = world.run()
        world.manager.give_up(worker.session_id, 1, lost=True)
        assert world.manager.claim(worker.session_id, "worker@two") is not None
        assert world.manager.beat([Beat(worker.session_id, 1, 0, "", 0, LATER, "worker@one")]) == []
        world.manager.beat([Beat(worker.session_id, 2, 0, "", 0, LATER, "worker@three")])
        assert world.row(worker.session_id).owner == "worker@two"

    def test_what_has_ended_does_not_answer_and_is_not_touched(self, world: World) -> None:
        worker = world.run()
        worker.end()
        before = world.row(worker.session_id).heartbeat_at
        assert world.manager.beat([Beat(worker.session_id, 1, 0, "late", 0, LATER)]) == []
        assert world.row(worker.session_id).heartbeat_at == before
        assert world.row(worker.session_id).checkpoint == ""

    @pytest.mark.parametrize("epoch", [0, 2])
    def test_another_epoch_does_not_answer(self, world: World, epoch: int) -> None:
        worker = world.run()
        assert world.manager.beat([Beat(worker.session_id, epoch, 0, "x", 0, LATER)]) == []
        assert self.saved(world, worker.session_id) == ("", 0, 0)

    def test_none_is_no_statement(self, world_with: MakeWorld) -> None:
        assert world_with().manager.beat([]) == []

    def test_many_sessions_go_in_one_statement(self, world_with: MakeWorld) -> None:
        world = world_with(max_active_streams_per_user=0)
        workers = [world.run() for _ in range(20)]
        ended, stale = workers[3], workers[5]
        ended.end()
        beats = [Beat(one.session_id, 1, 0, WORLD_TEXT * number, number, LATER) for number, one in enumerate(workers)]
        beats[5] = replace(beats[5], epoch=7)
        statements: list[str] = []
        answers = self.watched(world, statements, lambda: world.manager.beat(beats))
        assert len([one for one in statements if "UPDATE" in one]) == 1
        assert [one.session_id for one in answers] == [one.session_id for one in workers if one not in (ended, stale)]
        for answer in answers:
            number = [one.session_id for one in workers].index(answer.session_id)
            assert answer.checkpoint_length == len(WORLD_TEXT) * number
            assert self.saved(world, answer.session_id) == (WORLD_TEXT * number, len(WORLD_TEXT) * number, number)

    def test_hundreds_of_sessions_are_taken(self, world: World) -> None:
        worker = world.run()
        beats = [Beat(new_id(), 1, 0, "x", 0, LATER) for _ in range(500)]
        beats.append(Beat(worker.session_id, 1, 0, "text", 0, LATER))
        assert world.manager.beat(beats) == [BeatAnswer(worker.session_id, 4, None)]

    @staticmethod
    def watched(world: World, statements: list[str], action: Callable[[], T]) -> T:
        from sqlalchemy import event

        def note(_: Any, __: Any, statement: str, *___: Any) -> None:
            statements.append(statement)

        event.listen(world.database.engine, "before_cursor_execute", note)
        try:
            return action()
        finally:
            event.remove(world.database.engine, "before_cursor_execute", note)


class TestViews:
    def test_an_active_session_shows_how_far_the_log_has_come(self, world: World) -> None:
        worker = world.run()
        worker.mark(StreamPhase.GENERATING)
        worker.say("hm ", THINKING)
        worker.say("text")
        view = world.queries.view(worker.session_id)
        assert (view.phase, view.length, view.thinking_length) == (StreamPhase.GENERATING, 4, 3)

    def test_without_redis_it_shows_the_checkpoint(self, world: World, world_with: MakeWorld) -> None:
        worker = world.run()
        worker.say("hm text")
        world.manager.beat([Beat(worker.session_id, 1, 0, "hm te", 3, LATER)])
        view = world_with(redis_url=CLOSED_REDIS).queries.view(worker.session_id)
        assert (view.length, view.thinking_length) == (2, 3)

    def test_a_message_still_streaming_shows_its_checkpoint(self, world: World) -> None:
        worker = world.run()
        world.manager.beat([Beat(worker.session_id, 1, 0, "hm " + WORLD_TEXT, 3, LATER)])
        _, answer = world.services.conversations.messages(world.row(worker.session_id).conversation_id)
        assert (answer.thinking, answer.content, answer.length) == ("hm ", WORLD_TEXT, len(WORLD_TEXT))
        assert answer.status == "ACTIVE"

    def test_lists_show_ones_own_newest_first(self, world: World) -> None:
        mine = [world.start() for _ in range(3)]
        others = world.start(user_id=world.user("bob"))
        world.join(others.conversation_id, "ada", Role.VIEWER)
        stranger = world.start(user_id=world.user("eve"))
        world.manager.terminate(mine[0].session_id, USER)
        listed = world.queries.list_streams(user_id=world.user())
        assert [one.session_id for one in listed] == [
            others.session_id,
            *(one.session_id for one in reversed(mine)),
        ]
        active = world.queries.list_streams(user_id=world.user(), active_only=True)
        assert mine[0].session_id not in {one.session_id for one in active}
        assert len(active) == 3
        assert stranger.session_id not in {one.session_id for one in listed}
        assert [one.session_id for one in world.queries.list_streams(user_name="eve")] == [stranger.session_id]
        assert len(world.queries.list_streams(model="a-model", limit=2)) == 2

    def test_a_hidden_conversations_streams_are_hidden(self, world: World) -> None:
        view = world.start()
        world.manager.terminate(view.session_id, TerminationReason.CONVERSATION_DELETED)
        world.services.conversations.hide(view.conversation_id)
        assert world.queries.list_streams(user_id=world.user()) == []

    def test_the_place_in_the_queue_counts_who_came_before(self, world: World) -> None:
        first, second, third = (world.start() for _ in range(3))
        assert [world.queries.queue_position(one.session_id) for one in (first, second, third)] == [0, 1, 2]
        world.run(first.session_id)
        assert world.queries.queue_position(third.session_id) == 1

    def test_a_receipt_of_what_is_active_there_is_none(self, world: World) -> None:
        with pytest.raises(Unavailable):
            world.queries.receipt(world.start().session_id)
