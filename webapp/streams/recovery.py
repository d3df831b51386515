"""The reaper's work: what a crash left behind is found and brought to its end. Idempotent.

It looks only at what is due, by the partial indexes on `stream_sessions`, so its cost follows what has
gone wrong and not what exists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Final
from uuid import UUID

import structlog
from redis.exceptions import RedisError

from webapp.config import Settings
from webapp.database import Database
from webapp.models import StreamSession, now
from webapp.streams import rows
from webapp.streams.lifecycle import TerminationReason
from webapp.streams.log import TokenLog
from webapp.streams.manager import StreamSessionManager
from webapp.streams.queries import SessionQueries

log = structlog.get_logger(__name__)

REAP_BATCH: Final = 200
"""Sessions of one kind that one pass takes."""
PUBLISH_GRACE_SECONDS: Final = 5
"""That whoever committed an ending has for putting `done` in the log."""


class Reaper:
    """Finds lost workers, sessions that nobody claims, and endings without `done`."""

    def __init__(
        self,
        database: Database,
        token_log: TokenLog,
        manager: StreamSessionManager,
        queries: SessionQueries,
        settings: Settings,
    ) -> None:
        self._database = database
        self._log = token_log
        self._manager = manager
        self._queries = queries
        self._settings = settings

    def reap(self) -> dict[str, int]:
        """Look after what is due: lost workers, unclaimed sessions, endings without `done`. Idempotent.

        Returns how many of each were dealt with.
        """
        moment = now()
        lease = timedelta(seconds=self._settings.lease_seconds)
        silent = {row.id: row for row in self._database.read(lambda s: rows.lost(s, moment - lease, REAP_BATCH))}
        lost = [row.id for row in silent.values() if self._is_lost(row)]
        unclaimed = self._database.read(lambda s: rows.unclaimed(s, moment, REAP_BATCH))
        unpublished = self._database.read(
            lambda s: rows.unpublished(s, moment - timedelta(seconds=PUBLISH_GRACE_SECONDS), REAP_BATCH)
        )
        return {
            "lost": self._each("recover", lost, lambda session_id: self._recover(silent[session_id])),
            "unclaimed": self._each("requeue", unclaimed, self._reconsider),
            "unpublished": self._each("publish", unpublished, self._manager.publish),
        }

    def _each(self, step: str, session_ids: Sequence[UUID], action: Callable[[UUID], object]) -> int:
        """Deal with each; one session's trouble is its own. Returns with how many it went well."""
        done = 0
        for session_id in session_ids:
            try:
                action(session_id)
                done += 1
            except Exception as error:
                log.warning("reaper.step_failed", step=step, session_id=str(session_id), error=repr(error))
        return done

    def _is_lost(self, row: StreamSession) -> bool:
        """A worker is lost only when its lease in Redis is old as well: a database that was slow loses nobody."""
        try:
            state = self._log.state(row.id)
        except RedisError:
            return False
        except (KeyError, ValueError) as error:  # a newer version's words; that must not keep the others waiting
            log.warning("reaper.state_unreadable", session_id=str(row.id), error=repr(error))
            return False
        age_seconds = state.lease_age_seconds if state else None
        return age_seconds is None or age_seconds >= self._settings.lease_seconds

    def _recover(self, found: StreamSession) -> None:
        session_id, row = found.id, self._queries.row(found.id)
        if (row.epoch, row.owner, row.heartbeat_at) != (found.epoch, found.owner, found.heartbeat_at):
            return  # it was heard of since, or is another's by now
        state = self._log.state(session_id)
        log.warning("worker.lost", session_id=str(session_id), owner=row.owner, attempt=row.attempt)
        if row.stop_reason is not None:
            self._manager.settle(session_id, TerminationReason(row.stop_reason))
        elif state is not None and state.fence is not None:
            self._manager.settle(session_id, state.fence)
        elif self._settings.on_worker_lost == "keep" or row.attempt >= self._settings.max_attempts:
            detail = "The worker that wrote this answer was lost"
            self._manager.settle(session_id, TerminationReason.WORKER_LOST, detail=detail)
        else:
            self._manager.give_up(session_id, row.epoch)

    def _reconsider(self, session_id: UUID) -> None:
        """Nobody has claimed it: stop it if that was asked, or its time is up; else queue it again."""
        row = self._queries.row(session_id)
        waited_seconds = (now() - (row.heartbeat_at or row.started_at)).total_seconds()
        if row.stop_reason is not None:
            self._manager.settle(session_id, TerminationReason(row.stop_reason))
        elif waited_seconds >= self._settings.queue_timeout_seconds:
            self._manager.settle(session_id, TerminationReason.QUEUE_TIMEOUT)
        else:
            self._manager.requeue(session_id)
