"""Continue and retry: one goes on with the same message, the other gives the same question another answer."""

from __future__ import annotations

from uuid import UUID

import pytest

from tests.integration.conftest import MakeWorld
from tests.integration.world import WORLD_TEXT, Worker, World
from webapp.errors import Conflict, ConversationBusy, NotFound, TooManyStreams, Unavailable
from webapp.models import Message
from webapp.streams.events import MESSAGE, THINKING
from webapp.streams.keys import log_key, state_key
from webapp.streams.lifecycle import StreamPhase, StreamStatus, TerminationReason
from webapp.streams.ports import RequestKey, Rerun
from webapp.views import SessionView

LENGTH, STOP, USER = TerminationReason.LENGTH, TerminationReason.STOP, TerminationReason.USER


def ended(world: World, reason: TerminationReason = USER, text: str = WORLD_TEXT, thinking: str = "hm ") -> Worker:
    """A worker whose session has said something and ended."""
    worker = world.run()
    if thinking:
        worker.say(thinking, THINKING)
    if text:
        worker.say(text)
    assert worker.end(reason)
    return worker


def continued(world: World, session_id: UUID, key: RequestKey | None = None) -> SessionView:
    return world.manager.continue_(Rerun(session_id, world.user(), key))


def retried(world: World, session_id: UUID, key: RequestKey | None = None) -> SessionView:
    return world.manager.retry(Rerun(session_id, world.user(), key))


def texts(world: World, session_id: UUID) -> list[tuple[str, str, int]]:
    """Kind, text and end of what the log holds."""
    return [(one.kind, one.text, one.position.offset) for one in world.entries(session_id) if one.is_text]


class TestContinue:
    def test_the_log_opens_with_the_partial(self, world: World) -> None:
        old = ended(world)
        view = continued(world, old.session_id)
        assert texts(world, view.session_id) == [
            (THINKING, "hm ", 3),
            (MESSAGE, WORLD_TEXT, 3 + len(WORLD_TEXT)),
        ]
        assert (view.status, view.phase) == (StreamStatus.ACTIVE, StreamPhase.QUEUED)
        assert (view.length, view.thinking_length) == (len(WORLD_TEXT), 3)
        assert world.queue.enqueued[-1] == view.session_id

    def test_it_is_the_same_message_and_another_session(self, world: World) -> None:
        old = ended(world)
        view = continued(world, old.session_id)
        assert view.session_id != old.session_id
        assert view.message_id == world.row(old.session_id).message_id
        message = world.message(view.session_id)
        assert (message.status, message.reason, message.session_id) == ("ACTIVE", None, view.session_id)
        assert message.content == WORLD_TEXT

    def test_the_worker_goes_on_where_it_ended(self, world: World) -> None:
        old = ended(world)
        worker = world.run(continued(world, old.session_id).session_id)
        worker.say("more")
        assert worker.end(STOP)
        message = world.message(worker.session_id)
        assert (message.thinking, message.content) == ("hm ", WORLD_TEXT + "more")
        assert world.row(worker.session_id).length == len(WORLD_TEXT) + 4

    def test_the_old_receipt_stays_true_of_its_own_length(self, world: World) -> None:
        old = ended(world)
        before = world.queries.receipt(old.session_id)
        worker = world.run(continued(world, old.session_id).session_id)
        worker.say("more")
        assert world.queries.receipt(old.session_id) == before
        worker.end(STOP)
        assert world.queries.receipt(old.session_id) == before
        assert world.queries.receipt(worker.session_id).partial_response == WORLD_TEXT + "more"
        assert world.queries.final_text(old.session_id)[2] == WORLD_TEXT

    def test_a_stop_before_any_worker_keeps_the_partial(self, world: World) -> None:
        old = ended(world)
        view = continued(world, old.session_id)
        receipt = world.manager.terminate(view.session_id, USER, by="ada")
        assert (receipt.partial_response, receipt.thinking_length) == (WORLD_TEXT, 3)
        assert world.message(view.session_id).content == WORLD_TEXT

    def test_a_stop_keeps_it_also_where_redis_lost_the_log(self, world: World) -> None:
        old = ended(world)
        view = continued(world, old.session_id)
        world.forget(view.session_id)
        assert world.manager.terminate(view.session_id, USER).partial_response == WORLD_TEXT

    @pytest.mark.parametrize("reason", [LENGTH, TerminationReason.UPSTREAM_ERROR, TerminationReason.IDLE_TIMEOUT])
    def test_whatever_cut_it_short(self, world: World, reason: TerminationReason) -> None:
        assert continued(world, ended(world, reason).session_id).length == len(WORLD_TEXT)

    def test_from_the_middle_of_the_thinking(self, world: World) -> None:
        worker = world.run(continued(world, ended(world, text="").session_id).session_id)
        worker.say("and so ", THINKING)
        worker.say("yes")
        worker.end(STOP)
        message = world.message(worker.session_id)
        assert (message.thinking, message.content) == ("hm and so ", "yes")

    def test_from_nothing(self, world: World) -> None:
        view = continued(world, ended(world, text="", thinking="").session_id)
        assert texts(world, view.session_id) == []
        worker = world.run(view.session_id)
        worker.say("yes")
        worker.end(STOP)
        assert world.message(view.session_id).content == "yes"

    def test_what_is_complete_is_not_gone_on_with(self, world: World) -> None:
        with pytest.raises(Conflict, match="complete"):
            continued(world, ended(world, STOP).session_id)

    def test_nor_what_runs(self, world: World) -> None:
        worker = world.run()
        with pytest.raises(ConversationBusy):
            continued(world, worker.session_id)

    def test_nor_what_was_gone_on_with(self, world: World) -> None:
        old = ended(world)
        worker = world.run(continued(world, old.session_id).session_id)
        worker.end(USER)
        with pytest.raises(Conflict, match="latest") as caught:
            continued(world, old.session_id)
        assert caught.value.extra["sessionId"] == str(worker.session_id)

    def test_nor_what_was_replaced(self, world: World) -> None:
        old = ended(world)
        world.run(retried(world, old.session_id).session_id).end(USER)
        with pytest.raises(Conflict, match="replaced"):
            continued(world, old.session_id)

    def test_nor_while_the_conversation_has_another(self, world: World) -> None:
        old = ended(world)
        active = world.start(conversation_id=world.row(old.session_id).conversation_id)
        counts = world.counts()
        for again in (continued, retried):
            with pytest.raises(ConversationBusy) as caught:
                again(world, old.session_id)
            assert caught.value.extra["sessionId"] == str(active.session_id)
        assert world.counts() == counts
        assert world.message(old.session_id).status == "TERMINATED"

    def test_nor_in_a_deleted_conversation(self, world: World) -> None:
        old = ended(world)
        world.services.conversations.hide(world.row(old.session_id).conversation_id)
        with pytest.raises(NotFound):
            continued(world, old.session_id)

    def test_nor_over_the_cap(self, world_with: MakeWorld) -> None:
        world = world_with(max_active_streams_per_user=1)
        old = ended(world)
        world.start()
        with pytest.raises(TooManyStreams):
            continued(world, old.session_id)

    def test_without_redis_nothing_is_changed(self, world: World, world_with: MakeWorld) -> None:
        old = ended(world)
        with pytest.raises(Unavailable):
            continued(world_with(redis_url="redis://127.0.0.1:1/0"), old.session_id)
        assert world.message(old.session_id).status == "TERMINATED"

    def test_the_same_key_gives_the_same_session(self, world: World) -> None:
        old = ended(world)
        key = RequestKey(world.user(), "again", "0" * 64)
        assert continued(world, old.session_id, key).session_id == continued(world, old.session_id, key).session_id

    def test_its_keys_live_as_long_as_its_own_time_outs_say(self, world: World) -> None:
        old = ended(world)
        timeouts = world.row(old.session_id).timeouts
        assert timeouts is not None
        world.change(old.session_id, timeouts=timeouts | {"max_duration_seconds": 50_000.0})
        view = continued(world, old.session_id)
        for key in (state_key(view.session_id), log_key(view.session_id)):
            assert 50_000 < world.redis.ttl(key) < 52_000


class TestRetry:
    def test_another_answer_replaces_the_old(self, world: World) -> None:
        old = ended(world, STOP)
        view = retried(world, old.session_id)
        assert view.message_id != world.row(old.session_id).message_id
        assert world.message(old.session_id).replaced_by_id == view.message_id
        assert world.message(old.session_id).content == WORLD_TEXT
        worker = world.run(view.session_id)
        worker.say("another")
        worker.end(STOP)
        assert world.message(view.session_id).content == "another"

    def test_the_same_is_asked_and_the_old_answer_not_told(self, world: World) -> None:
        first = world.run(world.start("one").session_id)
        first.say("first answer")
        first.end(STOP)
        conversation_id = world.row(first.session_id).conversation_id
        second = world.run(world.start("two", conversation_id=conversation_id).session_id)
        second.say("second answer")
        second.end(STOP)
        assignment = Worker(world, retried(world, second.session_id).session_id).claim()
        assert assignment is not None
        assert [one["content"] for one in assignment.messages] == ["one", "first answer", "two"]

    def test_again_and_again(self, world: World) -> None:
        worker = ended(world)
        for _ in range(3):
            worker = world.run(retried(world, worker.session_id).session_id)
            worker.say("once more")
            worker.end(USER)
        answers = world.services.conversations.messages(world.row(worker.session_id).conversation_id)[1:]
        assert [one.replaced_by for one in answers] == [one.id for one in answers[1:]] + [None]

    def test_model_options_and_the_rest_stay(self, world: World) -> None:
        view = world.start(options={"seed": 7}, think="low", keep_alive="5m")
        worker = world.run(view.session_id)
        worker.end(USER)
        row = world.row(retried(world, view.session_id).session_id)
        assert (row.model, row.options, row.think, row.keep_alive) == ("a-model", {"seed": 7}, "low", "5m")

    def test_what_was_replaced_is_not_retried(self, world: World) -> None:
        old = ended(world)
        newer = world.run(retried(world, old.session_id).session_id)
        newer.end(USER)
        with pytest.raises(Conflict, match="replaced") as caught:
            retried(world, old.session_id)
        assert caught.value.extra["sessionId"] == str(newer.session_id)

    def test_nor_what_more_was_said_after(self, world: World) -> None:
        old = ended(world)
        conversation_id = world.row(old.session_id).conversation_id
        world.run(world.start("and?", conversation_id=conversation_id).session_id).end(STOP)
        with pytest.raises(Conflict, match="More was said"):
            retried(world, old.session_id)

    def test_nor_what_runs(self, world: World) -> None:
        with pytest.raises(ConversationBusy):
            retried(world, world.run().session_id)

    def test_nor_what_nobody_knows(self, world: World) -> None:
        with pytest.raises(NotFound):
            retried(world, UUID(int=7))

    def test_where_it_is_refused_the_old_is_not_marked(self, world: World) -> None:
        old = ended(world)
        world.start(conversation_id=world.row(old.session_id).conversation_id)
        with pytest.raises(Conflict):
            retried(world, old.session_id)
        message_id = world.row(old.session_id).message_id
        assert world.database.read(lambda s: s.get_one(Message, message_id)).replaced_by_id is None
