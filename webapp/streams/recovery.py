"""The reaper's work: what is over, and what a crash left behind, is found and brought to its end. Idempotent.

It looks only at what is due, by the partial indexes on `stream_sessions`, so its cost follows what has
gone wrong and not what exists.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

import redis
import structlog
from redis.exceptions import LockError, RedisError

from webapp import metrics
from webapp.config import Settings
from webapp.database import Database
from webapp.errors import Unavailable
from webapp.logs import brief
from webapp.models import StreamSession, now
from webapp.streams import rows
from webapp.streams.keys import REAPER_KEY
from webapp.streams.lifecycle import TerminationReason
from webapp.streams.log import TokenLog
from webapp.streams.manager import StreamSessionManager
from webapp.streams.queries import SessionQueries
from webapp.streams.retention import Retention

log = structlog.get_logger(__name__)

REAP_BATCH: Final = 200
"""Sessions of one kind that one pass takes."""
STOP_BATCH: Final = 100
"""Of those that are to be stopped: each may have to wait some seconds for a worker that does not answer."""
STOPPED_AT_ONCE: Final = 20
LOCK_SECONDS: Final = 10
PUBLISH_GRACE_SECONDS: Final = 5
"""That whoever committed an ending has for putting `done` in the log."""


class Reaper:
    """Finds lost workers, sessions that are over, abandoned or not claimed, endings without `done`, and what is old."""

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
        self._retention = Retention(database, settings)

    def reap(self) -> Counter[str]:
        """Look after what is due. Idempotent, so that two passes at once do no harm.

        Returns how many of each kind were dealt with.
        """
        moment = now()
        lease = timedelta(seconds=self._settings.lease_seconds)
        read = self._database.read
        silent = {row.id: row for row in read(lambda s: rows.lost(s, moment - lease, REAP_BATCH))}
        lost = [row.id for row in silent.values() if self._is_lost(row)]
        done = {"lost": self._each("recover", lost, lambda session_id: self._recover(silent[session_id]))}
        # A live worker ends its own; one that has not in a lease's time is told to.
        due = {row.id: row for row in read(lambda s: rows.due(s, moment, STOP_BATCH)) if _is_due(row, moment - lease)}
        done["due"] = self._each("expire", list(due), lambda session_id: self._expire(due[session_id]), STOPPED_AT_ONCE)
        abandoned = read(lambda s: rows.abandoned(s, moment, STOP_BATCH))
        done["abandoned"] = self._each("abandon", abandoned, self._abandon, STOPPED_AT_ONCE)
        done["unclaimed"] = self._each(
            "requeue", read(lambda s: rows.unclaimed(s, moment, REAP_BATCH)), self._reconsider
        )
        grace = timedelta(seconds=PUBLISH_GRACE_SECONDS)
        unpublished = read(lambda s: rows.unpublished(s, moment - grace, REAP_BATCH))
        done["unpublished"] = self._each("publish", unpublished, self._manager.publish)
        return +Counter(done | self._retention.sweep())

    def _each(self, step: str, session_ids: Sequence[UUID], action: Callable[[UUID], object], at_once: int = 1) -> int:
        """Deal with each; one session's trouble is its own. Returns with how many it went well."""

        def deal_with(session_id: UUID) -> bool:
            try:
                action(session_id)
            except Exception as error:
                log.warning("reaper.step_failed", step=step, session_id=str(session_id), error=brief(error))
                return False
            return True

        if at_once == 1 or len(session_ids) < 2:
            return sum(map(deal_with, session_ids))
        with ThreadPoolExecutor(at_once) as pool:
            return sum(pool.map(deal_with, session_ids))

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
        elif row.due_at is not None and row.due_at <= now():
            self._manager.settle(session_id, TerminationReason(str(row.due_reason)))
        elif self._settings.on_worker_lost == "keep" or row.attempt >= self._settings.max_attempts:
            detail = "The worker that wrote this answer was lost"
            self._manager.settle(session_id, TerminationReason.WORKER_LOST, detail=detail)
        else:
            self._manager.give_up(session_id, row.epoch, lost=True)

    def _expire(self, found: StreamSession) -> None:
        row = self._queries.row(found.id)
        if (row.epoch, row.due_at) == (found.epoch, found.due_at):
            self._manager.terminate(row.id, TerminationReason(str(row.due_reason)))

    def _abandon(self, session_id: UUID) -> None:
        """Nobody is known to have watched it for its grace; whoever is there now has only not been written down."""
        if self._queries.count_viewers([session_id])[0]:  # raises where Redis cannot say
            grace = timedelta(seconds=self._settings.abandon_grace_seconds)
            self._manager.watched([session_id], now() + grace)
            return
        row = self._queries.row(session_id)
        if row.abandon_at is not None and row.abandon_at <= now():
            self._manager.terminate(session_id, TerminationReason.ABANDONED)

    def _reconsider(self, session_id: UUID) -> None:
        """Nobody has claimed it: stop it if that was asked, else queue it again."""
        row = self._queries.row(session_id)
        if row.stop_reason is not None:
            self._manager.settle(session_id, TerminationReason(row.stop_reason))
        else:
            self._manager.requeue(session_id)


def reap_alone(reaper: Reaper, client: redis.Redis) -> None:
    """One pass, unless one runs already: for beat, and for the start of a process."""
    # Only against work done twice: two passes at once would do no harm, so the lock may lapse.
    lock = client.lock(REAPER_KEY, timeout=LOCK_SECONDS, blocking=False)
    try:
        with lock:
            began_at = time.monotonic()
            done = reaper.reap()
            metrics.reaped(done, time.monotonic() - began_at)
            if done:
                log.info("reaper.pass", **done)
    except LockError:
        return  # another's pass; or, at this one's end, the lock has lapsed
    except (RedisError, Unavailable) as error:
        log.warning("reaper.skipped", error=str(error))


def _is_due(row: StreamSession, long_since: datetime) -> bool:
    """Whether it is for the reaper to end: nobody runs it, or a worker that lives has let the time pass."""
    if row.owner is None or row.due_at is None:
        return True
    return row.due_at <= long_since and row.heartbeat_at is not None and row.heartbeat_at > long_since
