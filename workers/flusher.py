"""The flusher: one group commit for all sessions of a process.

What arrived while the last flush was under way goes with the next, in one pipeline. So the first token
of a quiet session leaves at once; a process that serves many rests for a moment between two flushes, and
writes large groups.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, Protocol
from uuid import UUID

import gevent
import structlog
from gevent.event import Event
from redis.exceptions import RedisError

from webapp import metrics
from webapp.streams.log import Answer, Append, Mark, TokenLog

log = structlog.get_logger(__name__)

REST_SECONDS: Final = 0.001
"""Between two flushes that come one upon the other: what arrives meanwhile goes together, which costs less."""
BUSY_SESSIONS: Final = 3
"""That a flush has written at least where the next is not to follow at once: fewer do not save anything by waiting."""
RETRY_FIRST_SECONDS: Final = 0.05
RETRY_LAST_SECONDS: Final = 1.0


class Source(Protocol):
    """A session that has something to write."""

    session_id: UUID

    def pending(self) -> Sequence[Append | Mark]:
        """What is not in the log yet, in order. Asked again until it was answered."""

    def on_answer(self, operation: Append | Mark, answer: Answer) -> None:
        """What became of one of them."""

    def rebuild(self, token_log: TokenLog) -> None:
        """Make its log anew, where that was lost and may be; asked before every flush."""


class Flusher:
    """Writes what its sources have, as one pipeline, for as long as any has something."""

    def __init__(self, token_log: TokenLog) -> None:
        self._log = token_log
        self._dirty: dict[UUID, Source] = {}
        self._wake = Event()
        self.healthy = True
        """Whether the last flush reached Redis."""

    def submit(self, source: Source) -> None:
        """Have a source's pending operations written soon. Does not block."""
        self._dirty[source.session_id] = source
        self._wake.set()

    def run(self) -> None:
        """Write until killed."""
        while True:
            self._wake.wait()
            self._wake.clear()
            if self._dirty and self._flush_until_written() >= BUSY_SESSIONS:
                gevent.sleep(REST_SECONDS)

    def _flush_until_written(self) -> int:
        """Returns how many sessions were in it."""
        pause_seconds = RETRY_FIRST_SECONDS
        batch, self._dirty = self._dirty, {}
        while True:
            try:
                self._flush(batch)
                if not self.healthy:
                    log.info("flusher.redis_found", sessions=len(batch))
                self.healthy = True
                return len(batch)
            except Exception as error:
                if not isinstance(error, RedisError):
                    self._dirty = batch | self._dirty
                    self._wake.set()
                    raise
                if self.healthy:
                    log.warning("flusher.redis_lost", sessions=len(batch), error=repr(error))
                self.healthy = False
            gevent.sleep(pause_seconds)
            pause_seconds = min(pause_seconds * 2, RETRY_LAST_SECONDS)
            batch |= self._dirty
            self._dirty = {}

    def _flush(self, batch: dict[UUID, Source]) -> None:
        for source in batch.values():
            self._guarded(source, partial(source.rebuild, self._log))
        work = [(source, operation) for source in batch.values() for operation in source.pending()]
        if not work:
            return
        began_at = time.monotonic()
        answers = self._log.apply([operation for _, operation in work])
        characters = sum(len(operation.text) for _, operation in work if isinstance(operation, Append))
        metrics.flushed(len(work), characters, time.monotonic() - began_at)
        refused: set[UUID] = set()
        for (source, operation), answer in zip(work, answers, strict=True):
            if source.session_id not in refused:  # what follows a refusal was refused because of it
                self._guarded(source, partial(source.on_answer, operation, answer))
                if not answer.ok:
                    refused.add(source.session_id)
        for source in batch.values():
            if source.pending():
                self.submit(source)

    def _guarded(self, source: Source, action: Callable[[], None]) -> None:
        """One session's trouble is its own: an error here must not end the others."""
        try:
            action()
        except RedisError:
            raise
        except Exception:
            log.exception("flusher.session_failed", session_id=str(source.session_id))


def keep_running(name: str, loop: Callable[[], None]) -> None:
    """Run a loop that serves every session; one that ends is started again, and said so."""
    while True:
        try:
            loop()
        except Exception:
            log.exception("loop.restarted", loop=name)
        gevent.sleep(0.5)
