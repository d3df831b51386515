"""The flusher: what its sources have goes out together, and one source's trouble is its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from uuid import UUID

import gevent
import pytest
import redis

from tests.services import ValkeyServer
from webapp.models import new_id
from webapp.streams.events import MESSAGE
from webapp.streams.keys import log_key
from webapp.streams.log import Answer, Append, Mark, TokenLog, Verdict
from workers.flusher import Flusher, keep_running


class Said:
    """A source of some pieces."""

    def __init__(self, log: TokenLog, *pieces: str) -> None:
        self.session_id: UUID = new_id()
        self.left = list(pieces)
        self.end = 0
        self.answers: list[Verdict] = []
        self.failure: Exception | None = None
        log.open(self.session_id, 1)

    def pending(self) -> Sequence[Append | Mark]:
        over = bool(self.answers) and self.answers[-1] is Verdict.BROKEN
        return [Append(self.session_id, 1, self.end, MESSAGE, piece) for piece in self.left[:1]] if not over else []

    def on_answer(self, operation: Append | Mark, answer: Answer) -> None:
        if self.failure:
            failure, self.failure = self.failure, None
            raise failure
        self.answers.append(answer.verdict)
        if answer.ok and isinstance(operation, Append):
            self.end = operation.end
            self.left.pop(0)
        elif answer.verdict is Verdict.BEHIND:  # it was written, and the answer to that did not come through
            self.end = answer.end
            self.left.pop(0)

    def rebuild(self, token_log: TokenLog) -> None:
        if self.answers[-1:] == [Verdict.ABSENT]:
            self.end = token_log.rebuild(self.session_id, 1, "worker@one", [], live_seconds=60).end


@pytest.fixture
def client(valkey: ValkeyServer) -> Iterator[redis.Redis]:
    valkey.flush()
    with redis.Redis.from_url(valkey.url, protocol=2) as client:
        yield client


@pytest.fixture
def log(client: redis.Redis) -> TokenLog:
    return TokenLog(client, live_seconds=60, retention_seconds=60)


@pytest.fixture
def flusher(log: TokenLog) -> Iterator[Flusher]:
    flusher = Flusher(log)
    loop = gevent.spawn(keep_running, "flusher", flusher.run)
    yield flusher
    loop.kill()


def written(*sources: Said) -> None:
    """Wait until they have nothing left, in gevent's own time."""
    with gevent.Timeout(5, AssertionError(f"not written: {[source.left for source in sources]}")):
        while any(source.left for source in sources):
            gevent.sleep(0.005)


def test_what_is_said_is_written_in_order(log: TokenLog, flusher: Flusher) -> None:
    sources = [Said(log, "one ", "two ", "three"), Said(log, "four")]
    for source in sources:
        flusher.submit(source)
    written(*sources)
    assert [log.text(source.session_id)[0] for source in sources] == ["one two three", "four"]
    assert flusher.healthy


def test_a_session_whose_keys_are_damaged_stops_no_other(log: TokenLog, flusher: Flusher, client: redis.Redis) -> None:
    damaged, sound = Said(log, "text"), Said(log, "one ", "two")
    client.set(log_key(damaged.session_id), "not a stream")
    flusher.submit(damaged)
    flusher.submit(sound)
    written(sound)
    assert log.text(sound.session_id)[0] == "one two"
    assert damaged.answers == [Verdict.BROKEN]
    assert flusher.healthy


def test_a_session_that_fails_stops_no_other(log: TokenLog, flusher: Flusher) -> None:
    failing, sound = Said(log, "text"), Said(log, "one ", "two")
    failing.failure = ValueError("a defect")
    flusher.submit(failing)
    flusher.submit(sound)
    written(failing, sound)
    assert log.text(sound.session_id)[0] == "one two"
    assert log.text(failing.session_id)[0] == "text"


def test_an_emptied_redis_is_written_again(log: TokenLog, flusher: Flusher, client: redis.Redis) -> None:
    source = Said(log, "one")
    client.flushall()
    flusher.submit(source)
    written(source)
    assert source.answers == [Verdict.ABSENT, Verdict.OK]
    assert log.text(source.session_id)[0] == "one"
