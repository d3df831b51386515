"""The reaper's work: what is over, and what a crash left behind, is found and brought to its end. Idempotent.

It looks only at what is due, by the partial indexes on `stream_sessions`, so its cost follows what has
gone wrong and not what exists.
"""

from __future__ import annotations

import math
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
from webapp.streams.keys import QUEUE_KEY, REAPER_KEY
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
RECOVERED_AT_ONCE: Final = 4
"""Of lost workers' sessions: each waits for the database and the broker, and the readers of all wait with it."""
LOOK_AHEAD_SECONDS: Final = 1.5
"""A little more than there is between two passes: what lapses before the next one is waited for."""
LOCK_SECONDS: Final = 10
QUEUE_TTL_SECONDS: Final = 86_400
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
        lost, _ = self._recover_lost()
        done = {"lost": lost}
        moment = now()
        lease = timedelta(seconds=self._settings.lease_seconds)
        read = self._database.read
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

    def queue_all_again(self) -> None:
        """The queue may be lost: have the next pass queue whatever waits in it, and not only what has waited long."""
        if sessions := self._database.write(lambda s: rows.look_at_all(s, now())):
            log.warning("reaper.queue_lost", sessions=sessions)

    def reap_lapsing(self) -> Counter[str]:
        """Wait for the workers that will be lost before the next pass, if they stay silent, and recover their sessions.

        So a session waits for its worker's lease, and not for the next pass too. Blocks for `LOOK_AHEAD_SECONDS` and
        the recovery at most; not at all where all workers are heard of.
        """
        deadline = time.monotonic() + LOOK_AHEAD_SECONDS
        done: Counter[str] = Counter()
        lost, lapse_seconds = self._recover_lost()
        while lapse_seconds is not None and time.monotonic() + lapse_seconds <= deadline:
            done += Counter(lost=lost)
            time.sleep(lapse_seconds)
            lost, lapse_seconds = self._recover_lost()
        return done + Counter(lost=lost)

    def _recover_lost(self) -> tuple[int, float | None]:
        """Recover the sessions of lost workers; returns how many, and in how many seconds the next would be lost."""
        moment = now()
        heard_before = moment - timedelta(seconds=self._settings.lease_seconds - LOOK_AHEAD_SECONDS)
        silent = {row.id: row for row in self._database.read(lambda s: rows.lost(s, heard_before, REAP_BATCH))}
        left_seconds = {row.id: self._left_seconds(row, moment) for row in silent.values()}
        lost = [session_id for session_id, seconds in left_seconds.items() if seconds <= 0]
        recovered = self._each("recover", lost, lambda session_id: self._recover(silent[session_id]), RECOVERED_AT_ONCE)
        return recovered, min((seconds for seconds in left_seconds.values() if seconds > 0), default=None)

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

    def _left_seconds(self, row: StreamSession, moment: datetime) -> float:
        """How long until its worker is lost, if nothing is heard of it; 0 or less: it is.

        It is lost only when its lease in Redis is old as well: a database that was slow loses nobody.
        """
        try:
            state = self._log.state(row.id)
        except RedisError:
            return math.inf
        except (KeyError, ValueError) as error:  # a newer version's words; that must not keep the others waiting
            log.warning("reaper.state_unreadable", session_id=str(row.id), error=repr(error))
            return math.inf
        ages = [(moment - row.heartbeat_at).total_seconds()] if row.heartbeat_at else []
        if state is not None and state.lease_age_seconds is not None:
            ages.append(state.lease_age_seconds)
        return self._settings.lease_seconds - min(ages, default=math.inf)

    def _recover(self, found: StreamSession) -> None:
        session_id, row = found.id, self._queries.row(found.id)
        if (row.epoch, row.owner, row.heartbeat_at) != (found.epoch, found.owner, found.heartbeat_at):
            return  # it was heard of since, or is another's by now
        state = self._log.state(session_id)
        log.warning("worker.lost", session_id=str(session_id), owner=row.owner, attempt=row.attempt, losses=row.losses)
        if row.stop_reason is not None:
            self._manager.settle(session_id, TerminationReason(row.stop_reason))
        elif state is not None and state.fence is not None:
            self._manager.settle(session_id, state.fence)
        elif row.due_at is not None and row.due_at <= now():
            self._manager.settle(session_id, TerminationReason(str(row.due_reason)))
        elif not self._settings.goes_on_elsewhere(row.model) or row.losses + 1 >= self._settings.max_attempts:
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


def reap_alone(reaper: Reaper, client: redis.Redis, *, at_start: bool = False) -> None:
    """One pass, unless one runs already: for beat, and for the start of a process.

    A process that starts waits for the other's pass, for that may be one that was killed in it, and after which nobody
    comes.
    """
    # Only against work done twice: two passes at once would do no harm, so the lock may lapse.
    wait_seconds = LOCK_SECONDS + 1 if at_start else 0
    lock = client.lock(REAPER_KEY, timeout=LOCK_SECONDS, sleep=0.2, blocking_timeout=wait_seconds)
    try:
        with lock:
            began_at = time.monotonic()
            if not client.expire(QUEUE_KEY, QUEUE_TTL_SECONDS):  # Redis is new, or was emptied
                reaper.queue_all_again()
                client.set(QUEUE_KEY, "1", ex=QUEUE_TTL_SECONDS)
            done = reaper.reap()
            took_seconds = time.monotonic() - began_at
            done += reaper.reap_lapsing()  # which mostly waits
            metrics.reaped(done, took_seconds)
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
