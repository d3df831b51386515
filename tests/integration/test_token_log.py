"""The token log's verbs on a real Valkey: every branch of each script, and that each may be repeated."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.integration.world import CLOSED_REDIS, WORLD_TEXT
from tests.services import ValkeyServer, wait_until
from tests.upstream import MIXED
from webapp.errors import Unavailable
from webapp.models import new_id
from webapp.streams import log as log_module
from webapp.streams.events import DONE, DONE_SEQ, MESSAGE, PHASE, START, THINKING, LogEntry, Position, done_position
from webapp.streams.keys import log_key, state_key
from webapp.streams.lifecycle import StreamPhase, TerminationReason
from webapp.streams.log import PAGE_ENTRIES, Answer, Append, LogState, Mark, TokenLog, Verdict, text_of

LIVE_SECONDS = 600
RETENTION_SECONDS = 60
USER, STOP, ADMIN = TerminationReason.USER, TerminationReason.STOP, TerminationReason.ADMIN


class Log:
    """One session of a token log, and short ways to its verbs."""

    def __init__(self, client: redis.Redis) -> None:
        self.redis = client
        self.verbs = TokenLog(client, live_seconds=LIVE_SECONDS, retention_seconds=RETENTION_SECONDS)
        self.id = new_id()

    def open(self, epoch: int = 1, owner: str = "worker@one") -> Answer:
        return self.verbs.open(self.id, epoch, owner)

    def append(self, start: int, text: str, kind: str = MESSAGE, epoch: int = 1) -> Answer:
        return self.verbs.append(self.piece(start, text, kind, epoch))

    def piece(self, start: int, text: str, kind: str = MESSAGE, epoch: int = 1) -> Append:
        return Append(self.id, epoch, start, kind, text)

    def mark(self, phase: StreamPhase = StreamPhase.LOADING, epoch: int = 1, attempt: int = 1) -> Answer:
        return self.verbs.mark(Mark(self.id, epoch, phase, attempt))

    def fence(self, reason: TerminationReason = USER, **expected: Any) -> Answer:
        return self.verbs.fence(self.id, reason, **expected)

    def finish(self, length: int, data: bytes = b"{}", reason: TerminationReason = USER) -> Answer:
        return self.verbs.finish(self.id, length, data, reason)

    def entries(self) -> list[LogEntry]:
        return list(self.verbs.read_all(self.id))

    def ids(self) -> list[str]:
        return [str(entry.position) for entry in self.entries()]

    def text(self) -> str:
        return self.verbs.text(self.id)[0]

    def state(self) -> LogState:
        state = self.verbs.state(self.id)
        assert state is not None
        return state

    def ttls(self) -> list[int]:
        """Seconds to live of state and log; -1: for ever, -2: it is not there."""
        return [self.redis.ttl(key) for key in (state_key(self.id), log_key(self.id))]

    def expire(self) -> None:
        self.redis.delete(state_key(self.id), log_key(self.id))


@pytest.fixture
def client(valkey: ValkeyServer) -> Iterator[redis.Redis]:
    """As the product makes it: answers are bytes."""
    valkey.flush()
    with redis.Redis.from_url(valkey.url, protocol=2) as client:
        yield client


@pytest.fixture
def fresh(client: redis.Redis) -> Log:
    """A session of which Redis knows nothing."""
    return Log(client)


@pytest.fixture
def log(fresh: Log) -> Log:
    """A session that is open at epoch 1."""
    assert fresh.open().ok
    return fresh


def test_a_session_that_redis_does_not_know_is_never_made_up(fresh: Log) -> None:
    absent = Answer(Verdict.ABSENT)
    assert fresh.append(0, "text") == absent
    assert fresh.mark() == absent
    assert fresh.fence() == absent
    assert fresh.fence(epoch=1, expected_end=0) == absent
    assert fresh.finish(0) == absent
    assert fresh.verbs.renew([(fresh.id, 1)]) == [(fresh.id, absent)]
    assert fresh.verbs.state(fresh.id) is None
    assert fresh.entries() == []
    assert fresh.verbs.text(fresh.id) == ("", 0)
    assert fresh.verbs.last_position(fresh.id) is None
    assert fresh.redis.dbsize() == 0


class TestOpen:
    def test_it_makes_an_empty_state(self, fresh: Log) -> None:
        assert fresh.open(3) == Answer(Verdict.OK, end=0, thinking_length=0)
        assert fresh.state() == LogState(3, 0, 0, StreamPhase.QUEUED, None, None, False)
        assert fresh.redis.hget(state_key(fresh.id), "owner") == b"worker@one"

    def test_it_may_be_repeated(self, log: Log) -> None:
        log.append(0, "hm", THINKING)
        log.append(2, "ok")
        assert log.open() == Answer(Verdict.OK, end=4, thinking_length=2)
        assert log.text() == "hmok"

    def test_it_raises_the_epoch_and_keeps_the_text(self, log: Log) -> None:
        log.append(0, "text")
        assert log.open(2, "worker@two") == Answer(Verdict.OK, end=4)
        assert log.state().epoch == 2
        assert log.redis.hget(state_key(log.id), "owner") == b"worker@two"
        assert log.append(4, "!", epoch=1).verdict is Verdict.STALE
        assert log.append(4, "!", epoch=2).ok
        assert log.text() == "text!"

    def test_an_old_epoch_is_stale_and_changes_nothing(self, log: Log) -> None:
        log.open(5, "worker@five")
        assert log.open(4, "worker@four") == Answer(Verdict.STALE)
        assert log.state().epoch == 5
        assert log.redis.hget(state_key(log.id), "owner") == b"worker@five"

    def test_epochs_are_compared_as_numbers(self, fresh: Log) -> None:
        fresh.open(9)
        assert fresh.open(10).ok
        assert fresh.open(9).verdict is Verdict.STALE

    def test_a_fence_is_told_and_stays(self, log: Log) -> None:
        log.append(0, "hm", THINKING)
        fence = log.fence()
        assert log.open(2) == Answer(Verdict.FENCED, 2, 2, USER, fence.fenced_us)
        assert log.append(2, "!", epoch=2).verdict is Verdict.FENCED

    def test_a_log_without_its_state_is_not_gone_on_with(self, log: Log) -> None:
        log.append(0, "text")
        log.redis.delete(state_key(log.id))
        assert log.open(2) == Answer(Verdict.OK)
        assert log.entries() == []
        assert log.append(0, "anew", epoch=2).ok


class TestAppend:
    def test_the_position_at_its_end_is_the_entrys_id(self, log: Log) -> None:
        assert log.append(0, "Hello") == Answer(Verdict.OK, end=5)
        assert log.append(5, ", you") == Answer(Verdict.OK, end=10)
        assert log.ids() == ["5-0", "10-0"]
        assert log.text() == "Hello, you"

    @pytest.mark.parametrize("text", [*MIXED, WORLD_TEXT])
    def test_it_is_counted_in_code_points(self, log: Log, text: str) -> None:
        assert log.append(0, text).end == len(text)
        assert log.append(len(text), text).end == 2 * len(text)
        assert log.ids() == [f"{len(text)}-0", f"{2 * len(text)}-0"]
        assert log.text() == 2 * text

    def test_thinking_is_counted_apart(self, log: Log) -> None:
        log.append(0, "hm ", THINKING)
        log.append(3, "so ", THINKING)
        log.append(6, "yes")
        state = log.state()
        assert (state.end, state.thinking_length) == (9, 6)
        assert log.verbs.text(log.id) == ("hm so yes", 6)
        assert [entry.kind for entry in log.entries()] == [THINKING, THINKING, MESSAGE]

    @pytest.mark.parametrize(("epoch", "verdict"), [(0, Verdict.STALE), (2, Verdict.ABSENT)])
    def test_another_epochs_is_refused(self, log: Log, epoch: int, verdict: Verdict) -> None:
        """An older one has been superseded; a newer one's own state was lost, and has to be opened again."""
        assert log.append(0, "text", epoch=epoch) == Answer(verdict)
        assert log.entries() == []

    def test_behind_a_fence_it_is_told_the_fence(self, log: Log) -> None:
        log.append(0, "hm", THINKING)
        fence = log.fence()
        assert log.append(2, "late") == Answer(Verdict.FENCED, 2, 2, USER, fence.fenced_us)
        assert log.text() == "hm"

    @pytest.mark.parametrize("start", [0, 3, 5, 100])
    def test_it_must_begin_where_the_log_ends(self, log: Log, start: int) -> None:
        log.append(0, "text")
        assert log.append(start, "more") == Answer(Verdict.BEHIND, end=4)
        assert log.text() == "text"

    def test_behind_tells_how_much_is_thinking(self, log: Log) -> None:
        log.append(0, "hm", THINKING)
        assert log.append(0, "hm", THINKING) == Answer(Verdict.BEHIND, end=2, thinking_length=2)

    def test_one_that_is_repeated_is_not_doubled(self, log: Log) -> None:
        piece = log.piece(0, WORLD_TEXT)
        assert log.verbs.append(piece).ok
        assert log.verbs.append(piece) == Answer(Verdict.BEHIND, end=len(WORLD_TEXT))
        assert log.text() == WORLD_TEXT

    def test_one_that_has_grown_meanwhile_is_not_doubled(self, log: Log) -> None:
        log.append(0, "one ")
        answer = log.append(0, "one two ")
        assert answer == Answer(Verdict.BEHIND, end=4)
        assert log.append(answer.end, "one two "[answer.end :]).ok
        assert log.text() == "one two "

    def test_stale_comes_before_fenced(self, log: Log) -> None:
        """Whoever lost the session learns that, and not an outcome that is not its own to commit."""
        log.fence()
        assert log.append(0, "x", epoch=0).verdict is Verdict.STALE
        assert log.mark(epoch=0).verdict is Verdict.STALE
        assert log.fence(epoch=0).verdict is Verdict.STALE


class TestRebuild:
    """A log that Redis has lost is made again by the worker that has its text."""

    WHOLE = "thoughtsaid"

    def rebuild(self, log: Log, epoch: int = 1) -> Answer:
        pieces = [log.piece(0, "thought", THINKING, epoch), log.piece(7, "said", MESSAGE, epoch)]
        return log.verbs.rebuild(log.id, epoch, "worker@one", pieces, live_seconds=LIVE_SECONDS)

    def test_all_text_is_there_at_once(self, fresh: Log) -> None:
        assert self.rebuild(fresh) == Answer(Verdict.OK, 11, 7)
        assert fresh.verbs.text(fresh.id) == (self.WHOLE, 7)
        assert fresh.redis.hget(state_key(fresh.id), "owner") == b"worker@one"

    def test_it_may_be_repeated(self, fresh: Log) -> None:
        self.rebuild(fresh)
        fresh.append(11, "and more")
        assert self.rebuild(fresh) == Answer(Verdict.OK, 19, 7)
        assert fresh.verbs.text(fresh.id) == (self.WHOLE + "and more", 7)

    def test_without_text_the_state_is_made(self, fresh: Log) -> None:
        assert fresh.verbs.rebuild(fresh.id, 1, "worker@one", [], live_seconds=LIVE_SECONDS) == Answer(Verdict.OK)
        assert fresh.append(0, "text").ok

    def test_a_state_that_was_opened_since_at_an_older_epoch_is_taken_over(self, fresh: Log) -> None:
        fresh.open(epoch=0, owner="")
        assert self.rebuild(fresh).ok
        assert fresh.verbs.text(fresh.id) == (self.WHOLE, 7)

    def test_one_of_a_newer_epoch_is_not(self, fresh: Log) -> None:
        fresh.open(epoch=2)
        assert self.rebuild(fresh).verdict is Verdict.STALE
        assert fresh.entries() == []

    def test_nor_does_a_fence_count_that_was_taken_in_an_older_one(self, fresh: Log) -> None:
        """It stands at an end that nobody has seen; who took it is on record in the row."""
        fresh.open(epoch=0, owner="")
        fresh.append(0, "part", epoch=0)
        fresh.fence(ADMIN)
        assert self.rebuild(fresh) == Answer(Verdict.OK, 11, 7)
        assert fresh.verbs.text(fresh.id) == (self.WHOLE, 7)
        state = fresh.verbs.state(fresh.id)
        assert state is not None
        assert (state.epoch, state.fence) == (1, None)

    def test_one_that_was_taken_at_this_epoch_stands(self, fresh: Log) -> None:
        """By somebody for whom no worker had it any more."""
        fresh.open()
        fresh.fence(ADMIN)
        assert (self.rebuild(fresh).verdict, fresh.entries()) == (Verdict.FENCED, [])

    def test_broken_keys_are_told(self, fresh: Log) -> None:
        fresh.redis.set(state_key(fresh.id), "not a hash")
        assert self.rebuild(fresh).verdict is Verdict.BROKEN

    def test_no_fence_finds_less_than_all_of_it(self, client: redis.Redis) -> None:
        """A terminator that comes in the very moment: it finds nothing, or everything."""
        logs = [Log(client) for _ in range(300)]
        ends: dict[UUID, int] = {}

        def fence_each() -> None:
            for log in logs:
                while (answer := log.fence()).verdict is Verdict.ABSENT:
                    pass
                ends[log.id] = answer.end

        fencer = threading.Thread(target=fence_each)
        fencer.start()
        for log in logs:
            self.rebuild(log)
        fencer.join(30)
        assert set(ends.values()) == {len(self.WHOLE)}
        assert len(ends) == len(logs)


class TestMark:
    def test_it_stands_behind_the_text(self, log: Log) -> None:
        assert log.mark() == Answer(Verdict.OK)
        assert log.append(0, "text").ok
        assert log.mark(StreamPhase.GENERATING).end == 4
        assert log.ids() == ["0-1", "4-0", "4-1"]
        first, _, last = log.entries()
        assert (first.kind, first.data) == (PHASE, b'{"phase":"LOADING","attempt":1}')
        assert last.data == b'{"phase":"GENERATING","attempt":1}'
        assert log.state().phase is StreamPhase.GENERATING

    def test_several_at_one_place_are_numbered(self, log: Log) -> None:
        log.mark(StreamPhase.LOADING)
        log.mark(StreamPhase.GENERATING)
        assert log.ids() == ["0-1", "0-2"]
        assert log.append(0, "x").ok
        log.open(2)
        log.mark(StreamPhase.LOADING, epoch=2, attempt=2)
        log.mark(StreamPhase.GENERATING, epoch=2, attempt=2)
        assert log.ids() == ["0-1", "0-2", "1-0", "1-1", "1-2"]

    def test_a_phase_is_marked_once_in_an_epoch(self, log: Log) -> None:
        assert log.mark() == log.mark() == Answer(Verdict.OK)
        assert log.ids() == ["0-1"]
        log.open(2)
        assert log.mark(epoch=2, attempt=2).ok
        assert log.mark(epoch=2, attempt=2).ok
        assert log.ids() == ["0-1", "0-2"]
        assert log.entries()[1].data == b'{"phase":"LOADING","attempt":2}'

    @pytest.mark.parametrize(("epoch", "verdict"), [(0, Verdict.STALE), (2, Verdict.ABSENT)])
    def test_another_epochs_is_refused(self, log: Log, epoch: int, verdict: Verdict) -> None:
        assert log.mark(epoch=epoch) == Answer(verdict)
        assert log.entries() == []

    def test_behind_a_fence_there_is_none(self, log: Log) -> None:
        log.append(0, "hm", THINKING)
        fence = log.fence()
        assert log.mark() == Answer(Verdict.FENCED, 2, 2, USER, fence.fenced_us)
        assert log.ids() == ["2-0"]


class TestFence:
    def test_it_tells_reason_lengths_and_time(self, log: Log) -> None:
        log.append(0, "hm", THINKING)
        log.append(2, "ok")
        before, answer, after = time.time(), log.fence(), time.time()
        assert answer == Answer(Verdict.OK, 4, 2, USER, answer.fenced_us)
        assert before - 0.1 <= answer.fenced_us / 1e6 <= after + 0.1
        assert answer.fenced
        assert log.state().fence is USER

    def test_the_first_wins_and_every_other_is_told_it(self, log: Log) -> None:
        log.append(0, "text")
        first = log.fence(USER)
        told = Answer(Verdict.FENCED, 4, 0, USER, first.fenced_us)
        assert log.fence(ADMIN) == told
        assert log.fence(USER) == told
        assert log.fence(STOP, epoch=1, expected_end=4) == told
        assert log.fence(STOP, epoch=1, expected_end=3) == told
        assert log.state().fence is USER

    def test_of_many_at_once_one_wins(self, log: Log) -> None:
        answers: list[Answer] = []
        reasons = [*TerminationReason] * 3
        threads = [threading.Thread(target=lambda r=reason: answers.append(log.fence(r))) for reason in reasons]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(answer.verdict for answer in answers) == ["FENCED"] * (len(reasons) - 1) + ["OK"]
        assert len({(answer.end, answer.reason, answer.fenced_us) for answer in answers}) == 1

    @pytest.mark.parametrize(("epoch", "verdict"), [(0, Verdict.STALE), (2, Verdict.ABSENT)])
    def test_one_that_names_another_epoch_is_refused(self, log: Log, epoch: int, verdict: Verdict) -> None:
        assert log.fence(STOP, epoch=epoch) == Answer(verdict)
        assert log.fence(STOP, epoch=epoch, expected_end=0) == Answer(verdict)
        assert log.state().fence is None

    @pytest.mark.parametrize("expected_end", [0, 3, 5])
    def test_one_that_expects_another_end_is_behind(self, log: Log, expected_end: int) -> None:
        log.append(0, "text")
        assert log.fence(STOP, epoch=1, expected_end=expected_end) == Answer(Verdict.BEHIND, end=4)
        assert log.state().fence is None
        assert log.append(4, "!").ok

    def test_one_that_names_what_is_so_is_taken(self, log: Log) -> None:
        log.append(0, "text")
        assert log.fence(STOP, epoch=1, expected_end=4).ok
        assert log.append(4, "!").verdict is Verdict.FENCED

    def test_an_expected_end_of_nothing_is_one(self, log: Log) -> None:
        assert log.fence(STOP, epoch=1, expected_end=0).ok


class TestFinish:
    DATA = b'{"status":"TERMINATED","reason":"user"}'

    def test_done_stands_at_the_reserved_number(self, log: Log) -> None:
        log.append(0, "text")
        log.mark(StreamPhase.GENERATING)
        log.fence()
        assert log.finish(4, self.DATA) == Answer(Verdict.OK, end=4)
        assert log.ids() == ["4-0", "4-1", f"4-{DONE_SEQ}"]
        assert log.entries()[-1] == LogEntry(done_position(4), DONE, data=self.DATA)
        assert log.state().done

    def test_a_session_without_text_is_done_too(self, log: Log) -> None:
        log.fence()
        assert log.finish(0).ok
        assert log.ids() == [f"0-{DONE_SEQ}"]

    def test_it_comes_once(self, log: Log) -> None:
        log.append(0, "text")
        log.fence()
        log.finish(4, self.DATA)
        assert log.finish(4, b'{"status":"COMPLETED"}').ok
        assert log.finish(9, b'{"status":"COMPLETED"}').ok
        assert [entry.data for entry in log.entries() if entry.kind == DONE] == [self.DATA]

    def test_both_keys_live_on_for_the_retention(self, log: Log) -> None:
        log.append(0, "text")
        log.fence()
        log.finish(4)
        assert all(0 < ttl <= RETENTION_SECONDS for ttl in log.ttls())

    def test_a_log_that_was_empty_expires_as_well(self, log: Log) -> None:
        log.fence()
        log.finish(0)
        assert all(0 < ttl <= RETENTION_SECONDS for ttl in log.ttls())

    def test_a_log_that_is_longer_than_the_commit_gets_no_done(self, log: Log) -> None:
        log.append(0, "text")
        assert log.finish(3) == Answer(Verdict.BEHIND, end=4)
        assert log.ids() == ["4-0"]
        assert not log.state().done
        assert log.state().fence is None

    def test_a_log_that_is_shorter_gets_done_where_the_text_ends(self, log: Log) -> None:
        """The checkpoint was longer than what Redis had; readers take the rest from the database."""
        log.append(0, "te")
        log.fence()
        assert log.finish(4).ok
        assert log.ids() == ["2-0", f"4-{DONE_SEQ}"]

    def test_it_is_a_fence_as_well(self, log: Log) -> None:
        log.append(0, "text")
        log.finish(4, reason=STOP)
        assert log.append(4, "!").verdict is Verdict.FENCED
        assert log.mark().verdict is Verdict.FENCED
        assert log.fence(USER).reason is STOP
        assert log.open(2).reason is STOP

    def test_the_fence_that_stands_is_not_replaced(self, log: Log) -> None:
        fence = log.fence(USER)
        log.finish(0, reason=STOP)
        assert log.fence(ADMIN) == Answer(Verdict.FENCED, 0, 0, USER, fence.fenced_us)

    def test_a_log_that_is_gone_is_made_with_all_its_text(self, fresh: Log) -> None:
        pieces = [fresh.piece(0, "thought", THINKING), fresh.piece(7, "said")]
        assert fresh.verbs.finish(fresh.id, 11, b"{}", USER).verdict is Verdict.ABSENT
        assert fresh.verbs.finish(fresh.id, 11, b"{}", USER, lost=(1, pieces)).ok
        assert fresh.verbs.text(fresh.id) == ("thoughtsaid", 7)
        assert fresh.entries()[-1].position == done_position(11)
        assert fresh.append(11, "more").verdict is Verdict.FENCED
        for key in (state_key(fresh.id), log_key(fresh.id)):
            assert 0 < fresh.redis.ttl(key) <= RETENTION_SECONDS

    def test_one_that_is_there_is_not_made_again(self, log: Log) -> None:
        log.append(0, "said")
        assert log.finish(4).ok
        assert log.verbs.finish(log.id, 4, b"{}", USER, lost=(1, [log.piece(0, "said")])).ok
        assert [entry.kind for entry in log.entries()] == [MESSAGE, DONE]


class TestRenew:
    def test_leases_are_stamped_by_rediss_clock(self, log: Log) -> None:
        assert log.state().lease_age_seconds is None
        assert log.verbs.renew([(log.id, 1)]) == []
        age = log.state().lease_age_seconds
        assert age is not None
        assert 0 <= age < 5
        log.redis.hincrby(state_key(log.id), "lease_us", -30_000_000)
        age = log.state().lease_age_seconds
        assert age is not None
        assert 30 <= age < 35

    def test_only_what_was_refused_is_told_each_by_its_own_name(self, client: redis.Redis) -> None:
        good, absent, stale, fenced, also_good = logs = [Log(client) for _ in range(5)]
        for one in (good, stale, fenced, also_good):
            one.open()
        stale.open(2)
        fenced.append(0, "hm", THINKING)
        fence = fenced.fence(ADMIN)
        refused = dict(good.verbs.renew([(one.id, 1) for one in logs]))
        assert refused == {
            absent.id: Answer(Verdict.ABSENT),
            stale.id: Answer(Verdict.STALE),
            fenced.id: Answer(Verdict.FENCED, 2, 2, ADMIN, fence.fenced_us),
        }
        assert good.state().lease_age_seconds is not None
        assert also_good.state().lease_age_seconds is not None
        assert fenced.state().lease_age_seconds is not None
        assert stale.state().lease_age_seconds is None

    def test_none_costs_nothing(self, client: redis.Redis) -> None:
        before = client.info("commandstats").get("cmdstat_evalsha", {}).get("calls", 0)
        assert Log(client).verbs.renew([]) == []
        assert client.info("commandstats").get("cmdstat_evalsha", {}).get("calls", 0) == before

    def test_hundreds_go_in_one_command(self, client: redis.Redis) -> None:
        logs = [Log(client) for _ in range(300)]
        for one in logs:
            one.open()
        assert logs[0].verbs.renew([(one.id, 1) for one in logs]) == []
        states = logs[0].verbs.states([one.id for one in logs])
        assert all(state and state.lease_age_seconds is not None for state in states)


class TestReading:
    COUNT = PAGE_ENTRIES * 2 + 7

    @pytest.fixture
    def long(self, log: Log) -> Log:
        """A log of more than two pages, some of it not text."""
        log.mark()
        pieces = [WORLD_TEXT[n % len(WORLD_TEXT)] for n in range(self.COUNT)]
        operations = [log.piece(n, piece) for n, piece in enumerate(pieces)]
        assert all(answer.ok for answer in log.verbs.apply(operations))
        return log

    def test_a_page_is_bounded(self, long: Log) -> None:
        assert len(long.verbs.read(long.id)) == PAGE_ENTRIES
        assert len(long.verbs.read(long.id, count=3)) == 3

    def test_all_pages_are_read_in_order(self, long: Log) -> None:
        entries = long.entries()
        assert len(entries) == self.COUNT + 1
        assert [entry.position for entry in entries] == sorted(entry.position for entry in entries)
        expected = "".join(WORLD_TEXT[n % len(WORLD_TEXT)] for n in range(self.COUNT))
        assert long.verbs.text(long.id) == (expected, 0)

    @pytest.mark.parametrize("offset", [1, PAGE_ENTRIES - 1, PAGE_ENTRIES, PAGE_ENTRIES + 1, COUNT])
    def test_it_goes_on_behind_a_position(self, long: Log, offset: int) -> None:
        entries = list(long.verbs.read_all(long.id, Position(offset, 0)))
        assert [entry.position.offset for entry in entries] == [*range(offset + 1, self.COUNT + 1)]

    def test_a_position_counts_by_its_number_too(self, log: Log) -> None:
        log.append(0, "x")
        log.mark(StreamPhase.LOADING)
        log.mark(StreamPhase.GENERATING)
        assert [str(entry.position) for entry in log.verbs.read(log.id, Position(1, 0))] == ["1-1", "1-2"]
        assert [str(entry.position) for entry in log.verbs.read(log.id, Position(1, 1))] == ["1-2"]
        assert log.verbs.read(log.id, done_position(1)) == []
        assert len(log.verbs.read(log.id, START)) == 3

    def test_it_goes_on_in_the_middle_of_an_entry(self, log: Log) -> None:
        log.append(0, WORLD_TEXT)
        (entry,) = log.verbs.read(log.id, Position(3, 0))
        assert entry.after(3).text == WORLD_TEXT[3:]

    def test_the_last_position_is_the_newest_entrys(self, long: Log) -> None:
        assert long.verbs.last_position(long.id) == Position(self.COUNT, 0)

    def test_entries_that_overlap_are_put_together_once(self) -> None:
        entries = [
            LogEntry(Position(2, 0), THINKING, text="ab"),
            LogEntry(Position(2, 1), PHASE, data=b"{}"),
            LogEntry(Position(4, 0), MESSAGE, text="cd"),
            LogEntry(Position(6, 0), MESSAGE, text="cdef"),
            LogEntry(Position(5, 0), MESSAGE, text="e"),
        ]
        assert text_of(entries) == ("abcdef", 2)

    def test_many_states_come_in_their_order(self, client: redis.Redis) -> None:
        one, none, other = Log(client), Log(client), Log(client)
        one.open(1)
        other.open(2)
        states = one.verbs.states([one.id, none.id, other.id])
        assert [state and state.epoch for state in states] == [1, None, 2]
        assert one.verbs.states([]) == []


class TestWaitDone:
    def test_done_that_is_there_is_not_waited_for(self, log: Log) -> None:
        log.append(0, "text")
        log.fence()
        log.finish(4)
        assert log.verbs.wait_done(log.id, 5)

    def test_done_wakes_the_waiter(self, log: Log) -> None:
        answers: list[bool] = []
        waiter = threading.Thread(target=lambda: answers.append(log.verbs.wait_done(log.id, 10)))
        waiter.start()
        log.append(0, "text")
        wait_until(lambda: log.redis.info("clients")["blocked_clients"], what="the waiter blocks")
        log.append(4, "more")
        log.fence()
        started = time.monotonic()
        log.finish(8)
        waiter.join(5)
        assert answers == [True]
        assert time.monotonic() - started < 0.5

    def test_it_gives_up_in_time(self, log: Log) -> None:
        log.append(0, "text")
        started = time.monotonic()
        assert not log.verbs.wait_done(log.id, 0.1)
        assert 0.1 <= time.monotonic() - started < 0.6

    def test_a_log_that_is_gone_is_no_error(self, fresh: Log) -> None:
        assert not fresh.verbs.wait_done(fresh.id, 0.02)


class TestEveryKeyExpires:
    """Nothing is left over: no key of a session without a TTL, at any time."""

    def test_the_state_from_its_creation(self, fresh: Log) -> None:
        fresh.open()
        state, log = fresh.ttls()
        assert LIVE_SECONDS - 5 <= state <= LIVE_SECONDS
        assert log == -2

    @pytest.mark.parametrize("first", ["text", "thinking", "phase"])
    def test_the_log_from_its_first_entry_on(self, log: Log, first: str) -> None:
        match first:
            case "text":
                log.append(0, "x")
            case "thinking":
                log.append(0, "x", THINKING)
            case _:
                log.mark()
        state, ttl = log.ttls()
        assert LIVE_SECONDS - 5 <= ttl <= state

    def test_another_attempt_may_last_as_long_again(self, log: Log) -> None:
        log.append(0, "text")
        for key in (state_key(log.id), log_key(log.id)):
            log.redis.expire(key, 7)
        log.open(2)
        assert all(LIVE_SECONDS - 5 <= ttl <= LIVE_SECONDS for ttl in log.ttls())

    def test_but_not_of_what_is_done(self, log: Log) -> None:
        log.append(0, "text")
        log.fence()
        log.finish(4)
        assert log.open(2).verdict is Verdict.FENCED
        assert all(0 < ttl <= RETENTION_SECONDS for ttl in log.ttls())

    def test_the_log_that_was_made_anew(self, log: Log) -> None:
        log.append(0, "text")
        log.expire()
        log.open(2)
        log.append(0, "text", epoch=2)
        assert all(ttl > 0 for ttl in log.ttls())

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        st.lists(st.sampled_from(["open", "raise", "append", "mark", "fence", "finish", "renew", "lose"]), max_size=9)
    )
    def test_whatever_happens(self, client: redis.Redis, steps: list[str]) -> None:
        log, epoch, end = Log(client), 1, 0
        for step in steps:
            match step:
                case "open":
                    log.open(epoch)
                case "raise":
                    epoch += 1
                    log.open(epoch)
                case "append":
                    end = log.append(end, WORLD_TEXT, epoch=epoch).end
                case "mark":
                    log.mark(epoch=epoch)
                case "fence":
                    log.fence()
                case "finish":
                    log.finish(end)
                case "renew":
                    log.verbs.renew([(log.id, epoch)])
                case "lose":
                    log.expire()
                    end = 0
            assert -1 not in log.ttls(), f"after {step}"


class TestScriptsAreLoadedAgain:
    """A Redis that was restarted knows no script."""

    def test_for_single_calls(self, fresh: Log) -> None:
        def each() -> None:
            fresh.redis.script_flush()

        each()
        assert fresh.open().ok
        each()
        assert fresh.fence(STOP, epoch=0).verdict is Verdict.STALE
        each()
        assert fresh.verbs.renew([(fresh.id, 1)]) == []
        each()
        assert fresh.finish(0).ok

    def test_for_pipelines_and_nothing_is_doubled(self, log: Log) -> None:
        operations: list[Append | Mark] = [
            Mark(log.id, 1, StreamPhase.LOADING, 1),
            log.piece(0, "one "),
            log.piece(4, "two "),
        ]
        log.redis.script_flush()
        assert [answer.verdict for answer in log.verbs.apply(operations)] == [Verdict.OK] * 3
        assert log.text() == "one two "
        assert log.ids() == ["0-1", "4-0", "8-0"]

    def test_where_one_script_of_a_pipeline_is_known_and_the_other_not(self, log: Log) -> None:
        log.append(0, "one ")
        log.redis.script_flush()
        log.redis.script_load((Path(log_module.__file__).parent / "lua" / "append.lua").read_text())
        operations: list[Append | Mark] = [
            log.piece(4, "two "),
            Mark(log.id, 1, StreamPhase.GENERATING, 1),
            log.piece(8, "three"),
        ]
        answers = log.verbs.apply(operations)
        # What was appended before the other script was missed is BEHIND in the second round: it is there.
        assert answers[0] == Answer(Verdict.BEHIND, end=13)
        assert log.text() == "one two three"


class TestManyInOnePipeline:
    def test_answers_come_in_order_and_a_refusal_stops_nobody_else(self, client: redis.Redis) -> None:
        one, absent, other = Log(client), Log(client), Log(client)
        one.open()
        other.open()
        answers = one.verbs.apply([one.piece(0, "a"), absent.piece(0, "b"), one.piece(7, "c"), other.piece(0, "d")])
        assert [answer.verdict.value for answer in answers] == ["OK", "ABSENT", "BEHIND", "OK"]
        assert (one.text(), other.text()) == ("a", "d")

    def test_none_is_nothing(self, client: redis.Redis) -> None:
        assert Log(client).verbs.apply([]) == []

    def test_one_sessions_broken_keys_are_its_own_trouble(self, log: Log) -> None:
        other = Log(log.redis)
        other.open()
        log.redis.set(log_key(log.id), "not a stream")
        answers = log.verbs.apply([log.piece(0, "text"), other.piece(0, "text")])
        assert [answer.verdict for answer in answers] == [Verdict.BROKEN, Verdict.OK]

    def test_a_broken_state_costs_no_other_its_lease(self, log: Log) -> None:
        other = Log(log.redis)
        other.open()
        log.redis.set(state_key(log.id), "not a hash")
        assert log.verbs.renew([(log.id, 1), (other.id, 1)]) == [(log.id, Answer(Verdict.BROKEN))]
        lease = other.state().lease_age_seconds
        assert lease is not None
        assert lease < 1


class TestRedisItself:
    def test_one_that_is_gone_is_an_error_of_redis(self) -> None:
        with redis.Redis.from_url(CLOSED_REDIS) as client:
            log = Log(client)
            for verb in (log.open, log.fence, log.mark, log.entries, log.verbs.ping, log.state):
                with pytest.raises(redis.RedisError):
                    verb()

    def test_one_that_evicts_is_refused(self, fresh: Log) -> None:
        fresh.verbs.require_no_eviction()
        try:
            fresh.redis.config_set("maxmemory-policy", "allkeys-lru")
            fresh.verbs.require_no_eviction()  # without a limit nothing is evicted
            fresh.redis.config_set("maxmemory", "1gb")
            with pytest.raises(Unavailable, match="allkeys-lru"):
                fresh.verbs.require_no_eviction()
            fresh.redis.config_set("maxmemory-policy", "noeviction")
            fresh.verbs.require_no_eviction()
        finally:
            fresh.redis.config_set("maxmemory", 0)
            fresh.redis.config_set("maxmemory-policy", "noeviction")


def test_all_keys_of_a_session_share_a_hash_tag() -> None:
    session_id = UUID(int=5)
    assert {key.partition("}")[0] for key in (state_key(session_id), log_key(session_id))} == {f"sg:{{{session_id}"}
