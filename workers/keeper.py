"""The keeper: renews the leases of a worker's sessions, and writes their heartbeats and checkpoints.

Both answers carry stops that a nudge did not deliver: the lease's renewal says which sessions are
fenced, and the heartbeat returns a stop request that was recorded in the row.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from uuid import UUID

import gevent
import structlog
from gevent.event import Event
from redis.exceptions import RedisError

from webapp.config import Settings
from webapp.errors import Unavailable
from webapp.streams.log import TokenLog
from webapp.streams.manager import StreamSessionManager
from workers.flusher import Flusher
from workers.generate import Generation

log = structlog.get_logger(__name__)


class Keeper:
    """Keeps the sessions in `table`, the worker's table of what it runs."""

    def __init__(
        self,
        table: dict[UUID, Generation],
        manager: StreamSessionManager,
        token_log: TokenLog,
        flusher: Flusher,
        settings: Settings,
    ) -> None:
        self._table = table
        self._manager = manager
        self._log = token_log
        self._flusher = flusher
        self._settings = settings
        self._redis_answers = True
        self._database_answers = True
        self._text_due_at = 0.0
        self._hurry = Event()

    def renew_leases(self) -> None:
        """Every `lease_renew_seconds`, one command for all sessions. Runs until killed."""
        while True:
            gevent.sleep(self._settings.lease_renew_seconds)
            held = [one for one in self._claimed() if one.held]
            try:
                refused = self._log.renew([(one.session_id, one.epoch) for one in held])
                self._redis_answers = True
            except RedisError as error:
                if self._redis_answers:  # once, and not with every try
                    log.warning("keeper.redis_lost", sessions=len(held), error=repr(error))
                self._redis_answers = False
                continue
            for session_id, answer in refused:
                if generation := self._table.get(session_id):
                    generation.on_lease_refused(answer)

    def beat(self) -> None:
        """Every `heartbeat_seconds`, one statement for all sessions. Runs until killed."""
        while True:
            self._hurry.wait(self._settings.heartbeat_seconds)
            self._hurry.clear()
            self.beat_once(self._claimed())

    def beat_soon(self) -> None:
        """Ask the rows now, not at the next heartbeat. Does not block."""
        self._hurry.set()

    def beat_once(self, generations: Sequence[Generation]) -> None:
        """Write heartbeats; text too when it is due, and always while Redis is not well."""
        lost_logs = {one.session_id for one in generations if one.log_lost}
        well = self._redis_answers and self._flusher.healthy
        with_text = not well or time.monotonic() >= self._text_due_at
        beats = {
            one.session_id: one.beat(with_text=with_text or one.log_lost, everything=not well or one.log_lost)
            for one in generations
        }
        try:
            answers = {answer.session_id: answer for answer in self._manager.beat(list(beats.values()))}
        except Unavailable as error:
            if self._database_answers:
                log.warning("keeper.database_lost", sessions=len(beats), error=error.detail)
            self._database_answers = False
            return
        self._database_answers = True
        if with_text:
            self._text_due_at = time.monotonic() + self._settings.checkpoint_seconds
        for generation in generations:
            answer = answers.get(generation.session_id)
            if answer is None:
                generation.lose()  # ended, or at a newer epoch
                continue
            generation.checkpointed = answer.checkpoint_length
            generation.on_row(answer.stop_reason, log_was_lost=generation.session_id in lost_logs)

    def _claimed(self) -> list[Generation]:
        return [one for one in self._table.values() if one.epoch]
