"""The hub and its followers, with plain threads on a real Valkey: every reader gets all of it, once, in order."""

from __future__ import annotations

import contextlib
import json
import random
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import redis
from structlog.testing import capture_logs

from tests.integration.conftest import MakeWorld
from tests.integration.world import CLOSED_REDIS, LATER, WORLD_TEXT, Worker, World, make_settings, make_world
from tests.services import ValkeyServer, valkey_server, wait_until
from webapp.database import Database
from webapp.errors import InvalidCursor
from webapp.models import new_id, now
from webapp.streams import rows
from webapp.streams.events import DONE_SEQ, MESSAGE, START, THINKING, LogEntry, Position, done_position
from webapp.streams.follow import Follower, check_cursor
from webapp.streams.hub import Delivery, Signal, StreamHub, Subscription
from webapp.streams.keys import log_key, viewers_key
from webapp.streams.lifecycle import StreamPhase, TerminationReason
from webapp.streams.log import Append
from webapp.streams.rows import Beat

STOP, USER = TerminationReason.STOP, TerminationReason.USER
# What is tried here is Redis; where the database plays a part, both are.
sqlite_alone = pytest.mark.parametrize("session_database", ["sqlite"], indirect=True)


@dataclass
class Event:
    """One server-sent event, parsed."""

    name: str
    data: dict[str, Any]
    position: Position | None


@dataclass
class Reader:
    """A thread that reads a follower to its end. With a closed `gate` it stops before its next piece."""

    follower: Follower
    events: list[Event] = field(default_factory=list)
    comments: int = 0
    error: BaseException | None = None
    gate: threading.Event = field(default_factory=threading.Event)

    def start(self, *, slow: bool = False) -> Reader:
        if not slow:
            self.gate.set()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        return self

    def _read(self) -> None:
        try:
            for piece in self.follower.events():
                for block in piece.split(b"\n\n")[:-1]:
                    self._take(block.decode())
                self.gate.wait()
        except BaseException as error:
            self.error = error

    def _take(self, block: str) -> None:
        if block.startswith(":"):
            self.comments += 1
            return
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        position = Position.parse(fields["id"]) if "id" in fields else None
        self.events.append(Event(fields.get("event", "message"), json.loads(fields["data"]), position))

    @property
    def reading(self) -> bool:
        return self._thread.is_alive()

    def finish(self, timeout_seconds: float = 10) -> Reader:
        """Wait for its end; what it read is checked for what holds of every stream."""
        self._thread.join(timeout_seconds)
        assert not self.reading, "the reader did not come to an end"
        assert self.error is None, repr(self.error)
        positions = [event.position for event in self.events if event.position is not None]
        assert positions == sorted(set(positions)), "ids only ever rise"
        assert self.events[0].name == "session"
        assert [event.name for event in self.events].count("session") == 1
        return self

    def _text(self, name: str) -> str:
        return "".join(event.data["content"] for event in self.events if event.name == name)

    @property
    def content(self) -> str:
        return self._text("message")

    @property
    def thinking(self) -> str:
        return self._text("thinking")

    @property
    def text(self) -> str:
        return self.thinking + self.content

    @property
    def done(self) -> dict[str, Any] | None:
        """The data of `done`, which is the last event, and there once."""
        found = [event for event in self.events if event.name == "done"]
        assert len(found) <= 1
        assert not found or self.events[-1] is found[0]
        return found[0].data if found else None


class Readers:
    """Makes readers of a world, and sees to it that none is left."""

    def __init__(self) -> None:
        self._all: list[Reader] = []

    def __call__(self, world: World, session_id: UUID, cursor: Position = START, *, slow: bool = False) -> Reader:
        follower = Follower(
            world.queries.view(session_id),
            cursor,
            queries=world.queries,
            token_log=world.log,
            hub=world.services.hub,
            settings=world.settings,
        )
        self._all.append(Reader(follower).start(slow=slow))
        return self._all[-1]

    def close(self) -> None:
        for reader in self._all:
            reader.follower.close()
            reader.gate.set()
        for reader in self._all:
            with contextlib.suppress(AssertionError):
                reader.finish(5)


@pytest.fixture
def read(world_with: MakeWorld) -> Iterator[Readers]:
    """Starts a reader of a session; all are closed before the worlds are."""
    readers = Readers()
    yield readers
    readers.close()


def follows(world: World, count: int = 1) -> None:
    """Wait until the hub follows so many logs."""
    wait_until(lambda: world.services.hub.followed == count, what=f"{count} logs are followed")


def have(readers: Sequence[Reader], text: str) -> None:
    """Wait until all have read so much of an answer."""
    wait_until(lambda: all(reader.content == text for reader in readers), what="all have read it")


def write(worker: Worker, count: int, text: str = WORLD_TEXT) -> str:
    """So many entries; returns their text."""
    assert all(worker.say(f"{number}{text}").ok for number in range(count))
    return "".join(f"{number}{text}" for number in range(count))


def xreads(world: World) -> int:
    """How many XREADs the server has answered."""
    return int(world.redis.info("commandstats").get("cmdstat_xread", {}).get("calls", 0))


@sqlite_alone
class TestALiveStream:
    def test_everything_arrives_in_order_and_once(self, world: World, read: Readers) -> None:
        worker = world.run()
        reader = read(world, worker.session_id)
        follows(world)
        worker.mark(StreamPhase.LOADING)
        worker.mark(StreamPhase.GENERATING)
        worker.say("hm ", THINKING)
        text = write(worker, 50)
        worker.end()
        reader.finish()
        assert (reader.thinking, reader.content) == ("hm ", text)
        assert [event.name for event in reader.events[:4]] == ["session", "phase", "phase", "thinking"]
        assert reader.done is not None
        assert reader.done["status"] == "COMPLETED"
        assert reader.events[-1].position == done_position(len("hm " + text))

    def test_the_first_event_says_which_stream_it_is_and_moves_no_cursor(self, world: World, read: Readers) -> None:
        worker = world.run()
        reader = read(world, worker.session_id)
        worker.end()
        first = reader.finish().events[0]
        row = world.row(worker.session_id)
        assert first.position is None
        assert first.data == {
            "sessionId": str(row.id),
            "conversationId": str(row.conversation_id),
            "messageId": str(row.message_id),
            "model": "a-model",
        }

    def test_a_queued_one_says_its_place(self, world: World, read: Readers) -> None:
        world.start()
        second = world.start().session_id
        reader = read(world, second)
        wait_until(lambda: len(reader.events) == 2)
        assert reader.events[1] == Event("phase", {"phase": "QUEUED", "attempt": 1, "position": 1}, None)
        resumed = read(world, second, Position(0, 1))
        follows(world)
        world.manager.terminate(second, USER)
        assert reader.finish().done == resumed.finish().done
        assert [event.name for event in resumed.events] == ["session", "done"]

    def test_its_place_is_told_again_while_it_waits(self, world_with: MakeWorld, read: Readers) -> None:
        world = world_with(keepalive_seconds=0.05)
        first, second = world.start().session_id, world.start().session_id
        reader = read(world, second)
        wait_until(lambda: len(reader.events) > 2)
        assert {event.data.get("position") for event in reader.events[1:]} == {1}
        world.manager.terminate(first, USER)
        wait_until(lambda: reader.events[-1].data.get("position") == 0)
        world.manager.terminate(second, USER)
        assert [event.position for event in reader.finish().events[:-1]] == [None] * (len(reader.events) - 1)

    def test_whoever_joins_late_gets_what_was_and_what_comes(self, world: World, read: Readers) -> None:
        worker = world.run()
        text = write(worker, 30)
        early = read(world, worker.session_id)
        wait_until(lambda: early.content == text)
        late = read(world, worker.session_id)
        text += write(worker, 30)
        later = read(world, worker.session_id)
        text += write(worker, 30)
        worker.end()
        assert early.finish().content == late.finish().content == later.finish().content == text

    def test_whoever_joins_while_it_is_written_misses_nothing(self, world: World, read: Readers) -> None:
        worker = world.run()
        texts: list[str] = []
        writer = threading.Thread(target=lambda: texts.append(write(worker, 400)))
        writer.start()
        readers = [read(world, worker.session_id) for _ in range(8)]
        writer.join()
        worker.end()
        for reader in readers:
            assert reader.finish().content == texts[0]

    def test_what_came_between_reading_the_log_and_following_is_not_missed(
        self, world: World, read: Readers, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        worker = world.run()
        first = read(world, worker.session_id)
        worker.say("one ")
        have([first], "one ")
        follows(world)
        attach = world.services.hub.attach

        def attach_late(*args: Any) -> tuple[Subscription, Position]:
            worker.say("two ")
            have([first], "one two ")
            return attach(*args)

        monkeypatch.setattr(world.services.hub, "attach", attach_late)
        second = read(world, worker.session_id)
        have([second], "one two ")
        monkeypatch.undo()
        worker.say("three")
        have([first, second], "one two three")
        worker.end()
        assert first.finish().done == second.finish().done

    def test_silence_is_filled_with_comments(self, world_with: MakeWorld, read: Readers) -> None:
        world = world_with(keepalive_seconds=0.02)
        worker = world.run()
        reader = read(world, worker.session_id)
        wait_until(lambda: reader.comments >= 3)
        worker.say("text")
        worker.end()
        assert reader.finish().content == "text"

    def test_a_reader_that_leaves_in_a_silence_is_let_go_at_once(self, world: World, read: Readers) -> None:
        session_id = world.run().session_id
        reader, other = read(world, session_id), read(world, session_id)
        follows(world)
        reader.follower.close()
        wait_until(lambda: not reader.reading, 1)
        assert other.reading
        other.follower.close()
        wait_until(lambda: not other.reading, 1)
        follows(world, 0)
        assert reader.done is None

    def test_a_reader_that_left_before_it_began_gets_nothing(self, world: World, read: Readers) -> None:
        reader = read(world, world.run().session_id, slow=True)
        reader.follower.close()
        reader.gate.set()
        assert [event.name for event in reader.finish().events] == ["session"]


@sqlite_alone
class TestResuming:
    CURSORS = 12

    def cursors(self, text: str) -> list[int]:
        chosen = random.Random(7).sample(range(1, len(text)), self.CURSORS)
        return [0, *chosen, len(text)]

    @pytest.fixture
    def stream(self, world: World) -> tuple[Worker, str]:
        worker = world.run()
        worker.mark(StreamPhase.LOADING)
        worker.say("I think " + WORLD_TEXT, THINKING)
        worker.mark(StreamPhase.GENERATING)
        write(worker, 6)
        return worker, worker.text

    def test_the_rest_comes_whatever_the_cursor(self, world: World, read: Readers, stream: tuple[Worker, str]) -> None:
        """Also one in the middle of an entry, or of what looks like one character."""
        worker, text = stream
        cursors = self.cursors(text)
        readers = [read(world, worker.session_id, Position(cursor, 0)) for cursor in cursors]
        text += write(worker, 3)
        worker.end()
        for cursor, reader in zip(cursors, readers, strict=True):
            assert reader.finish().text == text[cursor:]
            assert reader.done is not None

    @pytest.mark.parametrize("source", ["log", "database"])
    def test_and_after_the_end(self, world: World, read: Readers, stream: tuple[Worker, str], source: str) -> None:
        worker, text = stream
        worker.end()
        if source == "database":
            world.forget(worker.session_id)
        readers = {cursor: read(world, worker.session_id, Position(cursor, 0)) for cursor in self.cursors(text)}
        dones = {json.dumps(reader.finish().done) for reader in readers.values()}
        assert len(dones) == 1
        for cursor, reader in readers.items():
            assert reader.text == text[cursor:]

    def test_it_may_be_cut_off_at_every_event_and_come_back(
        self, world: World, read: Readers, stream: tuple[Worker, str]
    ) -> None:
        worker, text = stream
        whole = read(world, worker.session_id)
        worker.end()
        positions = [event.position for event in whole.finish().events if event.position is not None]
        for number, position in enumerate(positions[:-1]):
            rest = read(world, worker.session_id, position).finish()
            assert [event.position for event in rest.events[1:]][-1] == positions[-1]
            assert rest.text == text[position.offset :]
            assert len(rest.events) <= len(positions) - number

    def test_whoever_follows_already_does_not_move_another(
        self, world: World, read: Readers, stream: tuple[Worker, str]
    ) -> None:
        worker, text = stream
        far = read(world, worker.session_id, Position(len(text), 5))
        follows(world)
        near = read(world, worker.session_id, Position(3, 0))
        text += write(worker, 2)
        worker.end()
        assert far.finish().text == text[len(stream[1]) :]
        assert near.finish().text == text[3:]


class TestCheckCursor:
    @pytest.fixture
    def total(self, world: World) -> int:
        return 3 + len(WORLD_TEXT)

    @pytest.fixture
    def worker(self, world: World) -> Worker:
        worker = world.run()
        worker.say("hm ", THINKING)
        worker.say(WORLD_TEXT)
        return worker

    @sqlite_alone
    def test_while_it_lives_there_is_always_something_to_come(self, world: World, worker: Worker, total: int) -> None:
        view = world.queries.view(worker.session_id)
        assert all(check_cursor(one, view) for one in (START, Position(total, 0), Position(10**9, 0)))

    @sqlite_alone
    def test_whoever_had_done_had_everything(self, world: World, worker: Worker, total: int) -> None:
        worker.end()
        view = world.queries.view(worker.session_id)
        assert not check_cursor(done_position(total), view)
        for cursor in (START, Position(3, 1), Position(total, 0), Position(total, DONE_SEQ - 1)):
            assert check_cursor(cursor, view)

    @sqlite_alone
    def test_beyond_the_end_there_is_nothing(self, world: World, worker: Worker, total: int) -> None:
        worker.end()
        for cursor in (Position(total + 1, 0), done_position(total + 1), Position(10**15 - 1, 0)):
            with pytest.raises(InvalidCursor):
                check_cursor(cursor, world.queries.view(worker.session_id))


@sqlite_alone
class TestOneReadForAll:
    def test_many_readers_cost_one_blocking_read(self, world: World, read: Readers) -> None:
        workers = [world.run() for _ in range(4)]
        readers = [read(world, worker.session_id) for worker in workers for _ in range(5)]
        follows(world, 4)
        wait_until(lambda: world.redis.info("clients")["blocked_clients"] == 1)
        time.sleep(0.05)
        assert world.redis.info("clients")["blocked_clients"] == 1
        for worker in workers:
            worker.end()
        for reader in readers:
            assert reader.finish().done

    def test_a_second_reader_adds_no_read(self, world: World, read: Readers) -> None:
        costs = []
        for count in (1, 6):
            worker = world.run()
            readers = [read(world, worker.session_id) for _ in range(count)]
            follows(world)
            before = xreads(world)
            for number in range(10):
                worker.say(f"{number} ")
                have(readers, worker.text)
            costs.append(xreads(world) - before)
            worker.end()
            for reader in readers:
                reader.finish()
            follows(world, 0)
        assert costs[1] <= costs[0] + 2
        assert costs[0] <= 14

    def test_a_log_that_nobody_follows_is_not_read(self, world: World, read: Readers) -> None:
        worker = world.run()
        reader = read(world, worker.session_id)
        follows(world)
        reader.follower.close()
        reader.finish()
        follows(world, 0)
        other = world.run()
        keeping = read(world, other.session_id)
        follows(world)
        before = xreads(world)
        write(worker, 20)
        assert xreads(world) - before <= 2
        assert keeping.reading


@sqlite_alone
class TestASlowReader:
    BUFFER_BYTES = 4096

    def test_it_is_let_go_and_then_gets_everything(self, world_with: MakeWorld, read: Readers) -> None:
        world = world_with(reader_buffer_bytes=self.BUFFER_BYTES)
        worker = world.run()
        slow = read(world, worker.session_id, slow=True)
        fast = read(world, worker.session_id)
        follows(world)
        text = write(worker, 300)
        wait_until(lambda: fast.content == text, what="the fast one has all, while the slow one reads nothing")
        assert slow.content == ""
        slow.gate.set()
        wait_until(lambda: slow.content == text, what="the slow one has caught up")
        text += write(worker, 3)
        worker.end()
        assert slow.finish().content == fast.finish().content == text

    def test_one_that_falls_behind_again_and_again_misses_nothing(self, world_with: MakeWorld, read: Readers) -> None:
        world = world_with(reader_buffer_bytes=self.BUFFER_BYTES)
        worker = world.run()
        slow = read(world, worker.session_id, slow=True)
        for _ in range(4):
            write(worker, 120)
            self.read_a_little(slow)
        slow.gate.set()
        worker.end()
        assert slow.finish().content == worker.text

    @staticmethod
    def read_a_little(slow: Reader) -> None:
        seen = len(slow.events)
        slow.gate.set()
        wait_until(lambda: len(slow.events) > seen)
        slow.gate.clear()

    def test_an_entry_that_is_larger_than_the_buffer_arrives_all_the_same(
        self, world_with: MakeWorld, read: Readers
    ) -> None:
        world = world_with(reader_buffer_bytes=self.BUFFER_BYTES)
        worker = world.run()
        reader = read(world, worker.session_id)
        follows(world)
        text = WORLD_TEXT * 500
        worker.say(text)
        wait_until(lambda: reader.content == text)
        worker.end()
        assert reader.finish().content == text


def delivery(number: int, text: str = "x") -> Delivery:
    entry = LogEntry(Position(number + 1, 0), MESSAGE, text=text)
    return Delivery(entry, entry.encode())


class TestASubscription:
    def test_it_gives_what_was_put_in_order(self) -> None:
        subscription = Subscription(10_000)
        for number in range(5):
            subscription.put(delivery(number))
        items, signal = subscription.take(0)
        assert [item.entry.position.offset for item in items] == [1, 2, 3, 4, 5]
        assert signal is None
        assert subscription.take(0) == ([], None)

    def test_what_is_held_is_bounded(self) -> None:
        subscription = Subscription(4096)
        most = 0
        for number in range(1000):
            subscription.put(delivery(number, "x" * 90))
            held = sum(len(item.encoded) for item in subscription._items)
            most = max(most, held)
        assert 0 < most <= 4096
        assert subscription.take(0) == ([], Signal.BEHIND)

    def test_taking_makes_room(self) -> None:
        subscription = Subscription(100)
        for number in range(50):
            subscription.put(delivery(number))
            assert subscription.take(0)[1] is None

    def test_a_signal_comes_after_what_was_put_before(self) -> None:
        subscription = Subscription(10_000)
        subscription.put(delivery(0))
        subscription.signal(Signal.ENDED)
        items, signal = subscription.take(0)
        assert (len(items), signal) == (1, Signal.ENDED)

    def test_closed_is_final(self) -> None:
        subscription = Subscription(10_000)
        subscription.signal(Signal.CLOSED)
        subscription.signal(Signal.ENDED)
        subscription.signal(Signal.BEHIND)
        assert subscription.take(0)[1] is Signal.CLOSED

    def test_what_is_put_while_another_thread_takes_is_not_lost(self) -> None:
        """With real threads, which may be interrupted anywhere; under gevent only where they wait."""
        count, interval = 20_000, sys.getswitchinterval()
        subscription = Subscription(10**9)
        deliveries = [delivery(number) for number in range(count)]
        sys.setswitchinterval(1e-6)
        try:
            putter = threading.Thread(target=lambda: deque(map(subscription.put, deliveries), maxlen=0))
            putter.start()
            taken: list[int] = []
            while len(taken) < count:
                items, _ = subscription.take(0.2)
                taken += [item.entry.position.offset for item in items]
                if not items and not putter.is_alive():
                    break
            putter.join()
        finally:
            sys.setswitchinterval(interval)
        assert taken == [*range(1, count + 1)]


class TestOneReadersTrouble:
    def test_a_cursor_beyond_the_log_is_nobody_elses(self, world: World, read: Readers) -> None:
        """The hub reads one position a log: one reader's wild cursor must not become all readers'."""
        worker = world.run()
        worker.say("one ")
        read(world, worker.session_id, Position(1_000_000, 0))
        follows(world)
        other = read(world, worker.session_id)
        have([other], "one ")
        worker.say("two")
        have([other], "one two")
        began = time.monotonic()
        worker.end()
        assert other.finish().content == "one two"
        assert time.monotonic() - began < 1  # not when the database was asked

    def test_one_that_comes_between_a_loss_and_its_mending_misses_nothing(self, world: World, read: Readers) -> None:
        worker = world.run()
        worker.say("hm ", THINKING)
        worker.say("one ")
        early = read(world, worker.session_id)
        have([early], "one ")
        world.forget(worker.session_id)
        late = read(world, worker.session_id)
        wait_until(lambda: late.events, what="the late reader has begun")
        world.log.open(worker.session_id, worker.epoch, worker.owner)
        world.log.append(Append(worker.session_id, worker.epoch, 0, THINKING, "hm "))
        world.log.append(Append(worker.session_id, worker.epoch, 3, MESSAGE, "one "))
        worker.say("two ")
        have([early, late], "one two ")
        worker.say("three")
        worker.end()
        assert [reader.finish().content for reader in (early, late)] == ["one two three"] * 2
        assert late.thinking == "hm "


class TestTheDatabasesPart:
    def test_a_stream_that_has_ended_outlives_its_log(self, world: World, read: Readers) -> None:
        worker = world.run()
        worker.say("hm ", THINKING)
        text = write(worker, 500)
        worker.end()
        first = read(world, worker.session_id).finish()
        world.forget(worker.session_id)
        again = read(world, worker.session_id).finish()
        assert (again.thinking, again.content) == (first.thinking, first.content) == ("hm ", text)
        assert again.done == first.done
        assert again.events[-1].position == first.events[-1].position

    def test_it_needs_no_redis_at_all(self, world: World, world_with: MakeWorld, read: Readers) -> None:
        worker = world.run()
        text = write(worker, 3)
        worker.end()
        assert read(world_with(redis_url=CLOSED_REDIS), worker.session_id).finish().content == text

    def test_an_ending_whose_done_never_came_is_found(self, world_with: MakeWorld, read: Readers) -> None:
        world = world_with(database_check_seconds=0.05)
        worker = world.run()
        reader = read(world, worker.session_id)
        follows(world)
        text = write(worker, 3)
        commit_without_done(world, worker)
        assert reader.finish().content == text
        assert reader.done is not None
        assert reader.done["reason"] == "stop"
        follows(world, 0)

    def test_what_the_log_lost_comes_from_the_database(self, world: World, read: Readers) -> None:
        """Redis was emptied, nobody rebuilt the log, and the session ended with its checkpoint."""
        worker = world.run()
        reader = read(world, worker.session_id)
        worker.say(WORLD_TEXT)
        wait_until(lambda: reader.content == WORLD_TEXT)
        world.manager.beat([Beat(worker.session_id, 1, 0, WORLD_TEXT + "more", 0, LATER)])
        world.forget(worker.session_id)
        world.change(worker.session_id, heartbeat_at=now() - timedelta(minutes=1))
        world.manager.settle(worker.session_id, USER)
        assert reader.finish().content == WORLD_TEXT + "more"

    def test_a_reader_that_cannot_reach_redis_waits_and_gets_it_from_the_database(
        self, world: World, world_with: MakeWorld, read: Readers
    ) -> None:
        worker = world.run()
        reader = read(world_with(redis_url=CLOSED_REDIS, database_check_seconds=0.1), worker.session_id)
        wait_until(lambda: reader.comments)
        text = write(worker, 3)
        worker.end()
        assert reader.finish().content == text
        assert reader.done is not None

    def test_streams_that_are_silent_but_live_are_left_alone(self, world_with: MakeWorld, read: Readers) -> None:
        world = world_with(database_check_seconds=0.02)
        worker = world.run()
        reader = read(world, worker.session_id)
        follows(world)
        statements = world.redis.info("commandstats")
        wait_until(lambda: world.redis.hlen(viewers_key(worker.session_id)), what="a check was made")
        assert reader.reading
        assert statements
        worker.say("text")
        worker.end()
        assert reader.finish().content == "text"


def commit_without_done(world: World, worker: Worker) -> None:
    """What somebody leaves who dies between COMMIT and FINISH."""
    worker.fence(STOP)
    ending = rows.Ending(STOP, worker.text, worker.thinking_length, "0" * 64, now(), now())
    assert world.database.write(lambda s: rows.commit(s, worker.session_id, worker.epoch, ending))


@sqlite_alone
class TestALogThatWasRebuilt:
    def test_one_big_entry_repeats_nothing(self, world: World, read: Readers) -> None:
        worker = world.run()
        reader = read(world, worker.session_id)
        text = write(worker, 5)
        wait_until(lambda: reader.content == text)
        world.forget(worker.session_id)
        world.log.open(worker.session_id, worker.epoch, worker.owner)
        whole = text + "e\u0301 and more"
        world.log.append(Append(worker.session_id, worker.epoch, 0, MESSAGE, whole))
        worker.text = whole
        wait_until(lambda: reader.content == whole)
        worker.end()
        assert reader.finish().content == whole

    def test_a_reader_comes_back_to_it_with_a_cursor_of_the_old_one(self, world: World, read: Readers) -> None:
        worker = world.run()
        text = write(worker, 5)
        positions = [entry.position for entry in world.entries(worker.session_id)]
        world.forget(worker.session_id)
        world.log.open(worker.session_id, worker.epoch, worker.owner)
        world.log.append(Append(worker.session_id, worker.epoch, 0, MESSAGE, text))
        readers = {position: read(world, worker.session_id, position) for position in positions}
        worker.end()
        for position, reader in readers.items():
            assert reader.finish().content == text[position.offset :]

    def test_thinking_and_content_in_other_portions(self, world: World, read: Readers) -> None:
        worker = world.run()
        reader = read(world, worker.session_id)
        for piece in ("I ", "think "):
            worker.say(piece, THINKING)
        worker.say("so")
        wait_until(lambda: reader.text == "I think so")
        world.forget(worker.session_id)
        world.log.open(worker.session_id, worker.epoch, worker.owner)
        for start, kind, text in ((0, THINKING, "I think "), (8, MESSAGE, "so it is")):
            world.log.append(Append(worker.session_id, worker.epoch, start, kind, text))
        worker.text = "I think so it is"
        worker.end()
        reader.finish()
        assert (reader.thinking, reader.content) == ("I think ", "so it is")


@sqlite_alone
class TestOneStreamsTroubleIsItsOwn:
    def test_an_entry_that_cannot_be_read_stops_nobody_else(self, world: World, read: Readers) -> None:
        broken, *others = [world.run() for _ in range(4)]
        broken_reader = read(world, broken.session_id)
        readers = [read(world, worker.session_id) for worker in others]
        follows(world, 4)
        broken.say("one")
        wait_until(lambda: broken_reader.content == "one")
        world.redis.xadd(log_key(broken.session_id), {"x": b"\xff"}, id="4-0")
        for worker in others:
            write(worker, 20)
            worker.end()
        for worker, reader in zip(others, readers, strict=True):
            assert reader.finish(3).content == worker.text

    def test_its_own_reader_gets_the_rest_from_the_database(self, world_with: MakeWorld, read: Readers) -> None:
        world = world_with(database_check_seconds=0.05)
        worker = world.run()
        reader = read(world, worker.session_id)
        follows(world)
        worker.say("one")
        wait_until(lambda: reader.content == "one")
        world.redis.xadd(log_key(worker.session_id), {"x": b"\xff"}, id="3-1")
        worker.say(" two")
        worker.end()
        assert reader.finish().content == "one two"

    def test_an_error_of_the_database_check_does_not_end_it(
        self, world: World, read: Readers, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        failures = []

        def failing_at_first(ids: Any) -> list[UUID]:
            failures.append(ids)
            if len(failures) < 3:
                raise ValueError("the check failed")
            return world.queries.ended_among(ids)

        hub = StreamHub(world.redis, world.log, buffer_bytes=10_000, check_seconds=0.02, ended_among=failing_at_first)
        monkeypatch.setattr("webapp.streams.hub.RETRY_SECONDS", 0.02)
        worker = world.run()
        subscription, _ = hub.attach(worker.session_id, START)
        commit_without_done(world, worker)
        wait_until(lambda: subscription.take(0.05)[1] is Signal.ENDED)
        assert len(failures) >= 3
        hub.close()


@sqlite_alone
class TestClosing:
    def test_all_readers_are_let_go_at_once(self, world: World, read: Readers) -> None:
        sessions = [world.run().session_id for _ in range(3)]
        readers = [read(world, session_id) for session_id in sessions for _ in range(3)]
        follows(world, 3)
        started = time.monotonic()
        world.services.hub.close()
        for reader in readers:
            assert reader.finish(2).done is None
        assert time.monotonic() - started < 0.5
        follows(world, 0)

    def test_a_reader_that_comes_after_it_is_let_go_too(self, world: World, read: Readers) -> None:
        worker = world.run()
        worker.say("text")
        world.services.hub.close()
        reader = read(world, worker.session_id).finish(2)
        assert (reader.content, reader.done) == ("text", None)

    def test_its_threads_end(self, world: World, read: Readers, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("webapp.streams.hub.BLOCK_MS", 50)

        def hub_threads() -> int:
            return sum(thread.name.startswith("hub.") and thread not in before for thread in threading.enumerate())

        before = set(threading.enumerate())
        reader = read(world, world.run().session_id)
        follows(world)
        assert hub_threads() == 3
        world.services.hub.close()
        reader.finish()
        wait_until(lambda: hub_threads() == 0, 5)


@sqlite_alone
class TestWaitingForDone:
    def test_done_wakes_the_waiter(self, world: World) -> None:
        hub, worker = world.services.hub, world.run()
        answers: list[bool] = []
        waiter = threading.Thread(target=lambda: answers.append(hub.wait_done(worker.session_id, 10)))
        waiter.start()
        follows(world)
        worker.say("text")
        started = time.monotonic()
        worker.end()
        waiter.join(5)
        assert answers == [True]
        assert time.monotonic() - started < 1
        follows(world, 0)

    def test_done_that_is_there_is_not_waited_for(self, world: World) -> None:
        worker = world.run()
        worker.end()
        assert world.services.hub.wait_done(worker.session_id, 5)
        follows(world, 0)

    def test_it_gives_up_in_time(self, world: World) -> None:
        session_id = world.run().session_id
        started = time.monotonic()
        assert not world.services.hub.wait_done(session_id, 0.1)
        assert 0.1 <= time.monotonic() - started < 0.6
        follows(world, 0)

    def test_a_terminate_call_waits_by_it(self, world: World) -> None:
        world.manager.wait_done = world.services.hub.wait_done
        worker = world.run()
        worker.say("text")
        worker.obey()
        assert world.manager.terminate(worker.session_id, USER).partial_response == "text"


@sqlite_alone
class TestViewers:
    def test_all_processes_readers_are_counted(self, world_with: MakeWorld, read: Readers) -> None:
        one, other = world_with(database_check_seconds=0.02), world_with(database_check_seconds=0.02)
        session_id, unwatched = one.run().session_id, one.start().session_id
        readers = [read(one, session_id), read(one, session_id), read(other, session_id)]
        wait_until(lambda: one.services.hub.viewers([session_id, unwatched]) == [3, 0])
        assert one.queries.view(session_id).viewers == 3
        readers[0].follower.close()
        wait_until(lambda: one.services.hub.viewers([session_id]) == [2])

    def test_a_process_that_is_gone_does_not_count(self, world: World) -> None:
        session_id = world.run().session_id
        world.redis.hset(viewers_key(session_id), mapping={"dead": f"5:{time.time() - 60:.0f}"})
        assert world.services.hub.viewers([session_id]) == [0]

    def test_every_key_of_a_hub_expires(self, world_with: MakeWorld, read: Readers) -> None:
        world = world_with(database_check_seconds=0.02)
        session_id = world.run().session_id
        read(world, session_id)
        wait_until(lambda: world.redis.hlen(viewers_key(session_id)))
        wait_until(lambda: list(world.redis.scan_iter("sg:hub:*")))
        keys = list(world.redis.scan_iter("sg:*"))
        assert [key for key in keys if world.redis.ttl(key) == -1] == []


@sqlite_alone
class TestAValkeyThatFails:
    @pytest.fixture
    def own_valkey(self, tmp_path: Path) -> Iterator[ValkeyServer]:
        """One that keeps what it has acknowledged."""
        server = valkey_server(tmp_path / "valkey", append_only=True, name="own-valkey")
        yield server
        server.kill()

    @pytest.fixture
    def own_world(self, own_valkey: ValkeyServer, database: Database, tmp_path: Path) -> Iterator[World]:
        url = database.engine.url.render_as_string(hide_password=False)
        world = make_world(make_settings(url, own_valkey.url, tmp_path, database_check_seconds=0.2), database)
        yield world
        world.close()

    def patiently(self, worker: Worker, text: str) -> None:
        """APPEND as a worker does: again, from where the log ends, until it is there."""
        end = len(worker.text) + len(text)
        whole = worker.text + text

        def written() -> bool:
            answer = worker.say(whole[len(worker.text) : end])
            if answer.verdict == "BEHIND":
                worker.text = whole[: answer.end]
            return len(worker.text) == end

        wait_until(written, ignoring=(redis.RedisError,))

    def test_a_restart_in_the_middle_costs_a_pause(
        self, own_valkey: ValkeyServer, own_world: World, read: Readers
    ) -> None:
        worker = own_world.run()
        readers = [read(own_world, worker.session_id) for _ in range(3)]
        text = write(worker, 10)
        wait_until(lambda: all(reader.content == text for reader in readers))
        own_valkey.kill()
        late = read(own_world, worker.session_id)
        wait_until(lambda: late.comments, what="a reader without Redis is told that it is being served")
        own_valkey.start()
        own_valkey.await_ready()
        for number in range(10):
            self.patiently(worker, f"{number}{WORLD_TEXT}")
        wait_until(lambda: own_world.services.hub.healthy)
        worker.end()
        for reader in (*readers, late):
            assert reader.finish(15).content == 2 * text
            assert reader.done is not None

    def test_one_that_comes_back_empty_is_filled_again(
        self, own_valkey: ValkeyServer, own_world: World, read: Readers
    ) -> None:
        worker = own_world.run()
        reader = read(own_world, worker.session_id)
        text = write(worker, 10)
        wait_until(lambda: reader.content == text)
        own_valkey.restart()
        own_valkey.flush()
        own_world.log.open(worker.session_id, worker.epoch, worker.owner)
        own_world.log.append(Append(worker.session_id, worker.epoch, 0, MESSAGE, text))
        text += write(worker, 3)
        worker.end()
        assert reader.finish(15).content == text

    def test_an_ending_while_it_is_away_comes_from_the_database(
        self, own_valkey: ValkeyServer, own_world: World, read: Readers
    ) -> None:
        worker = own_world.run()
        reader = read(own_world, worker.session_id)
        follows(own_world)
        text = write(worker, 3)
        wait_until(lambda: reader.content == text)
        own_valkey.kill()
        wait_until(lambda: not own_world.services.hub.healthy)
        ending = rows.Ending(STOP, text + "more", 0, "0" * 64, now(), now())
        row = own_world.row(worker.session_id)
        assert own_world.database.write(lambda s: rows.commit(s, row.id, row.epoch, ending))
        assert reader.finish(15).content == text + "more"

    def test_one_that_says_nothing_is_asked_by_the_hub_alone(
        self, own_valkey: ValkeyServer, own_world: World, read: Readers
    ) -> None:
        """Each reader that comes meanwhile is told that it is served; what is said in the log is said once."""
        worker = own_world.run()
        reader = read(own_world, worker.session_id)
        text = write(worker, 3)
        wait_until(lambda: reader.content == text)
        with capture_logs() as logs:
            own_valkey.pause()
            wait_until(lambda: not own_world.services.hub.healthy)
            late = [read(own_world, worker.session_id) for _ in range(10)]
            wait_until(lambda: all(one.comments for one in late), 1)
            own_valkey.resume()
            wait_until(lambda: own_world.services.hub.healthy)
            wait_until(lambda: all(one.content == text for one in late), 2)
        worker.end()
        for one in (reader, *late):
            assert one.finish().content == text
        said = Counter(line["event"] for line in logs if line["log_level"] != "debug")
        assert said["hub.redis_found"] == 1
        assert said["hub.redis_lost"] <= 2  # reading, and reporting who watches
        assert said["reader.waits"] == 0


def test_a_hub_that_nobody_uses_connects_to_nothing() -> None:
    with redis.Redis.from_url(CLOSED_REDIS) as client:
        hub = StreamHub(client, None, buffer_bytes=1, check_seconds=1, ended_among=lambda _: ())  # type: ignore[arg-type]
        assert hub.followed == 0
        hub.close()
        assert hub.healthy
        assert new_id() not in hub._channels
