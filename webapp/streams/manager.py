"""StreamSessionManager: the only writer of a session's status.

The row decides who owns a session and how it ended; Redis decides, fast, what text still counts.
An ending is always: FENCE, then COMMIT, then FINISH (`done`). Whoever comes second learns the
outcome from the committed row, and from nowhere else. The steps in capitals are those of the
model in `docs/model/`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Final
from uuid import UUID

import structlog
from redis.exceptions import RedisError
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from webapp import metrics, tracing
from webapp.config import Settings
from webapp.database import Database
from webapp.errors import Conflict, Invalid, TooManyStreams, Unavailable
from webapp.logs import bind, brief
from webapp.models import StreamSession, now
from webapp.streams import endings, rows
from webapp.streams.admission import Admission, busy
from webapp.streams.lifecycle import StreamPhase, StreamStatus, TerminationReason
from webapp.streams.log import Answer, TokenLog, Verdict, appends_of
from webapp.streams.ports import Assignment, NewMessage, Outcome, RequestKey, Rerun, TaskQueue
from webapp.streams.queries import SessionQueries, done_data, session_view
from webapp.streams.timing import Timeouts, look_again_at
from webapp.views import ReceiptView, SessionView

log = structlog.get_logger(__name__)

WITHOUT_REDIS_WAIT_SECONDS: Final = 10.0
"""That a terminate call waits for the worker's commit while Redis cannot be reached."""
WITHOUT_REDIS_POLL_SECONDS: Final = 0.1
WATCHED_BUSY_SECONDS: Final = 2.0


class StreamSessionManager:
    """Starts, claims, stops, ends, recovers. Safe to use from many threads or greenlets, nodes and processes."""

    def __init__(
        self,
        database: Database,
        token_log: TokenLog,
        queue: TaskQueue,
        settings: Settings,
        queries: SessionQueries,
    ) -> None:
        self._database = database
        self._log = token_log
        self._queue = queue
        self._settings = settings
        self._queries = queries
        self._admission = Admission(settings)
        self.wait_done: Callable[[UUID, float], bool] = token_log.wait_done
        """Blocks until a session's `done` is in the log; a web process sets its hub's, which costs no connection."""

    # -- start ---------------------------------------------------------------------------------

    def start(self, new: NewMessage) -> SessionView:
        """Write the question, the empty answer and an ACTIVE session; then queue it.

        Raises:
            Unavailable: Redis or the database is down, or the queue is full; nothing was written.
            ConversationBusy: the conversation has an ACTIVE session.
            TooManyStreams: the user is at the cap.
        """
        return self._accept(lambda s: self._admission.of_message(s, new), new.request_key, new.conversation_id)

    def continue_(self, rerun: Rerun) -> SessionView:
        """Go on with the message of a session that has ended; the new stream opens with its partial.

        Raises:
            Conflict: there is nothing to go on with. Otherwise as `start`.
        """
        return self._again(lambda s: self._admission.of_continuation(s, rerun), rerun)

    def retry(self, rerun: Rerun) -> SessionView:
        """Give another answer to the question of a session that has ended; the old one stays, marked as replaced.

        Raises:
            Conflict: it was replaced before, or more was said since. Otherwise as `start`.
        """
        return self._again(lambda s: self._admission.of_retry(s, rerun), rerun)

    def _again(self, admit: Callable[[Session], StreamSession], rerun: Rerun) -> SessionView:
        return self._accept(admit, rerun.request_key, self._queries.row(rerun.session_id).conversation_id)

    def _accept(
        self, admit: Callable[[Session], StreamSession], key: RequestKey | None, conversation_id: UUID | None = None
    ) -> SessionView:
        self._require_redis()
        begun: list[UUID] = []

        def work(s: Session) -> StreamSession:
            row = admit(s)
            begun.append(row.id)
            return row

        try:
            row = self._database.write(work)
        except (IntegrityError, TooManyStreams, Unavailable, Conflict) as error:
            if isinstance(error, Unavailable) and begun:
                self._enqueue(begun[-1])  # it may have been written all the same; if not, nobody finds it
            if key and (same := self.repeated(key)):
                return same  # its twin was quicker, and may have taken the last place; or it is this very request's
            raise self._why_refused(conversation_id, error) from error
        # From here on the message is accepted: what fails now is made good by the reaper.
        bind(session_id=row.id, conversation_id=row.conversation_id)
        self._try("count", metrics.stream_started, row.id)
        self._try("open", lambda: self._open(row), row.id)
        self._enqueue(row.id)
        return session_view(row)

    def _open(self, row: StreamSession) -> None:
        """Make the log; one that goes on with a message opens with what that message has."""
        self._log.open(row.id, row.epoch, live_seconds=self._timeouts(row).live_seconds(self._settings))
        self._log.apply(appends_of(row.id, row.epoch, row.checkpoint, row.checkpoint_thinking_length))

    def _timeouts(self, row: StreamSession) -> Timeouts:
        return Timeouts.of_session(row, self._settings)

    def repeated(self, request: RequestKey) -> SessionView | None:
        """The session that an earlier request with the same key began, if there was one.

        Raises:
            Invalid: that request had another body.
        """
        found = self._database.read(lambda s: rows.remembered_request(s, request, now()))
        if found is None:
            return None
        if found.body_sha256 != request.body_sha256:
            problem = "was sent before, with another body: a new request needs a key of its own"
            raise Invalid(f"Idempotency-Key {problem}", errors=[{"field": "Idempotency-Key", "message": problem}])
        return self._queries.view(found.session_id)

    def _require_redis(self) -> None:
        try:
            self._log.ping()
        except RedisError as error:
            raise Unavailable("Redis cannot be reached, so nothing was accepted; try again") from error

    def _why_refused(self, conversation_id: UUID | None, error: Exception) -> Exception:
        """The partial unique index allows one ACTIVE session a conversation; any other conflict is a defect."""
        if not isinstance(error, IntegrityError):
            return error
        active = self._database.read(lambda s: rows.active_in(s, conversation_id)) if conversation_id else None
        return busy(active) if active or "conversation" in str(error.orig) else error

    def _enqueue(self, session_id: UUID) -> None:
        if not self._try("enqueue", lambda: self._queue.enqueue(session_id), session_id):
            # It is not in the queue, and nobody has to wait until it might have been forgotten there.
            self._try("look again", lambda: self._look_again(session_id, now()), session_id)

    def _look_again(self, session_id: UUID, at: datetime) -> None:
        self._database.write_one(lambda s: rows.look_again(s, session_id, at))

    def _try(self, step: str, action: Callable[[], object], session_id: UUID) -> bool:
        """Do what may fail without harm, because the reaper or a heartbeat makes it good; say if it did."""
        try:
            action()
            return True
        except Exception as error:
            log.warning("stream.step_failed", step=step, session_id=str(session_id), error=brief(error))
            return False

    # -- claim ---------------------------------------------------------------------------------

    def claim(self, session_id: UUID, owner: str, tries: list[datetime] | None = None) -> Assignment | None:
        """CLAIM a session for a worker: once for each epoch, whoever else tries.

        `tries` is kept by a caller that repeats a claim after `Unavailable`: the moments of its claims, by which one
        that was written, but whose answer was lost, is known as its own.

        Returns None where there is nothing to do: it has ended, is owned, or was to be stopped (then it is ended here).

        Raises:
            Unavailable: it is not known whether the session was claimed.
        """
        earlier = list(tries or ())

        def work(s: Session) -> tuple[StreamSession | None, Assignment | None]:
            row, moment = rows.get(s, session_id), now()
            if row is not None and rows.is_claimed_by(row, owner, earlier):
                return row, self._assignment(s, row)
            if row is None or row.status != StreamStatus.ACTIVE or row.owner or row.stop_reason:
                return row, None
            if tries is not None:
                tries.append(moment)
            due = self._timeouts(row).due_without_token(moment, row.claimed_at or moment)
            claimed = rows.claim(s, session_id, row.epoch, owner, moment, due)
            return row, claimed and self._assignment(s, claimed)

        row, assignment = self._database.write_one(work)
        if row is None:
            log.warning("stream.unknown", session_id=str(session_id))
        elif assignment is not None:
            if assignment.attempt == 1:
                metrics.stream_claimed((assignment.claimed_at - row.started_at).total_seconds())
        elif row.status == StreamStatus.ACTIVE and row.stop_reason and not row.owner:
            self.settle(session_id, TerminationReason(str(row.stop_reason)))
        return assignment

    def _assignment(self, s: Session, row: StreamSession) -> Assignment:
        return Assignment(
            session_id=row.id,
            conversation_id=row.conversation_id,
            user_id=row.user_id,
            epoch=row.epoch,
            attempt=row.attempt,
            model=row.model,
            messages=rows.history(s, row, self._settings.history_limit_characters),
            options=row.options,
            think=row.think,
            keep_alive=row.keep_alive,
            checkpoint=row.checkpoint,
            checkpoint_thinking_length=row.checkpoint_thinking_length,
            claimed_at=row.claimed_at or now(),
            timeouts=self._timeouts(row),
        )

    def beat(self, beats: Sequence[rows.Beat]) -> list[rows.BeatAnswer]:
        """Heartbeats and checkpoints of a worker's sessions, in one statement; see `rows.beat`."""
        return self._database.write_one(lambda s: rows.beat(s, beats, now())) if beats else []

    def give_up(self, session_id: UUID, epoch: int, *, lost: bool = False) -> None:
        """Let go of a session that is to go on elsewhere: it waits anew, or where its worker was `lost`, no longer
        than that worker would have."""
        row = self._queries.row(session_id)
        due = None if lost else self._timeouts(row).due_in_queue(now(), row.claimed_at)
        if self._database.write(lambda s: rows.release(s, session_id, epoch, due)):
            self.requeue(session_id)

    def requeue(self, session_id: UUID) -> None:
        """Put a session in the queue once more; a second claim of it finds nothing to do."""
        row = self._queries.row(session_id)
        again_at = look_again_at(now(), row.heartbeat_at or row.started_at, row.due_at)
        self._look_again(session_id, again_at)
        self._enqueue(session_id)

    def watched(self, session_ids: Sequence[UUID], until: datetime) -> None:
        """Somebody watches these: they do not count as abandoned before `until`."""
        # Who watches is also told to Redis, again and again, which must not wait for a database that is locked.
        self._database.write(lambda s: rows.watched(s, session_ids, until), busy_seconds=WATCHED_BUSY_SECONDS)

    # -- the ending ----------------------------------------------------------------------------

    def finish(self, session_id: UUID, epoch: int, outcome: Outcome) -> bool:
        """End a session on behalf of the worker that owns it at `epoch`: COMMIT, then FINISH.

        Returns whether it was this call that ended it. Where the session has moved to another epoch, or
        has ended, nothing is written. Safe to repeat after an error.

        Raises:
            Unavailable: the database did not answer; it is not known whether the ending was written.
        """
        while True:
            row, won = self._commit(session_id, epoch, _ending(outcome))
            if won or row is None or row.epoch != epoch or row.status != StreamStatus.ACTIVE:
                return won
            # The row has more than that text, which only a log that Redis had lost can lack; or its worker's own
            # heartbeat has brought it there meanwhile.
            outcome = _with_checkpoint(row, outcome)

    def settle(self, session_id: UUID, reason: TerminationReason, *, detail: str | None = None) -> None:
        """End a session that no worker runs, or whose worker does not answer; returns once it has ended.

        The final text is the longer of log and checkpoint: one is a prefix of the other. Without Redis a session
        that no worker has had yet is ended by the row alone, which has all its text.

        Raises:
            Unavailable: Redis or the database cannot be reached, so what was seen is not known; the
                session stays as it is, and the reaper comes back to it.
        """
        while (row := self._queries.row(session_id)).status == StreamStatus.ACTIVE:
            try:
                ending = self._ending_of_unowned(row, reason, detail)
            except RedisError as error:
                if row.claimed_at is not None:
                    raise Unavailable("Redis cannot be reached; the stop is recorded and will take effect") from error
                ending = _ending_of_unclaimed(row, reason, detail)
            if ending is not None:
                self._commit(row.id, row.epoch, ending)

    def _ending_of_unowned(
        self, row: StreamSession, reason: TerminationReason, detail: str | None
    ) -> rows.Ending | None:
        # At the row's epoch: in an emptied Redis somebody who was late may have made an empty state of an older one.
        answer = self._log.fence(row.id, reason, epoch=row.epoch)
        if answer.verdict is Verdict.ABSENT:
            self._require_no_owner(row)
            self._log.open(row.id, row.epoch, live_seconds=self._timeouts(row).live_seconds(self._settings))
            answer = self._log.fence(row.id, reason, epoch=row.epoch)
        if not answer.fenced:
            return None
        text, thinking_length = self._log.text(row.id)
        state = self._log.state(row.id)
        stands = state is not None and state.fence is not None and state.end >= answer.end
        if len(text) < answer.end and not stands:
            return None  # Redis was emptied between the fence and the reading, and maybe a state made since
        if row.checkpoint_length > len(text):
            text, thinking_length = row.checkpoint, row.checkpoint_thinking_length
        phase = state.phase if state and row.claimed_at else StreamPhase(row.phase)
        detail = detail if answer.reason is reason else None
        return _ending(Outcome(answer, text, thinking_length, phase, upstream_closed_at=None, detail=detail))

    def _require_no_owner(self, row: StreamSession) -> None:
        """An emptied Redis knows nothing of the text; a worker that lives does, and will end the session with it."""
        lease = timedelta(seconds=self._settings.lease_seconds)
        if row.owner and row.heartbeat_at and now() - row.heartbeat_at < lease:
            raise Unavailable("Redis has lost the stream's log; the stop is recorded and its worker will end it")

    def _commit(self, session_id: UUID, epoch: int, ending: rows.Ending) -> tuple[StreamSession | None, bool]:
        """COMMIT, then FINISH. The loser of a race adopts the winner's outcome by reading the row later.

        Returns the row as it is now, and whether it was this call that ended it.
        """

        def work(s: Session) -> tuple[StreamSession | None, bool]:
            ended = rows.commit(s, session_id, epoch, ending)
            return ended or rows.get(s, session_id), ended is not None

        with tracing.span("commit", session_id=session_id, reason=ending.reason.value):
            row, won = self._database.write_one(work)
        if row is not None and won:
            self._try("publish", lambda: self._publish(row), session_id)
        elif row is not None and row.status != StreamStatus.ACTIVE and row.published_at is None:
            # It was committed before: the answer to that commit may have been lost.
            self._try("publish", lambda: self.publish(session_id), session_id)
        return row, won

    def publish(self, session_id: UUID) -> None:
        """FINISH: put `done` in the log, from the committed row, and note that it is there. Safe to repeat.

        Whoever notes it tells the operator of the ending: the commit's answer may have been lost, or its process.

        Raises:
            RedisError, Unavailable: it is tried again by the reaper.
        """
        self._publish(self._queries.row(session_id))

    def _publish(self, row: StreamSession) -> None:
        length, reason = (row.length or 0) + (row.thinking_length or 0), TerminationReason(str(row.reason))
        answer = self._log.finish(row.id, length, done_data(row), reason)
        if answer.verdict is Verdict.ABSENT:  # whoever still waits at the log learns of the end there
            _, thinking, content, data = self._queries.final_text(row.id)
            pieces = appends_of(row.id, row.epoch, thinking + content, len(thinking))
            answer = self._log.finish(row.id, length, data, reason, lost=(row.epoch, pieces))
        if answer.verdict is Verdict.BEHIND:
            log.error("stream.log_beyond_commit", session_id=str(row.id), log_end=answer.end, committed=row.length)
        if ended := self._database.write_one(lambda s: rows.published(s, row.id, now())):
            self._try("report", lambda: endings.report(*ended), row.id)

    # -- terminate -----------------------------------------------------------------------------

    def terminate(
        self,
        session_id: UUID,
        reason: TerminationReason,
        by: str | None = None,
        row: StreamSession | None = None,
    ) -> ReceiptView:
        """Stop a session and say how it ended: the same receipt to every caller, however many, however often.

        `by` is the name of who asks; `row` the session as the caller has just read it. Blocks until the ending is
        committed, for at most `terminate_wait_seconds` while a worker owns the session and a little longer in all.

        Raises:
            NotFound: there is no such session.
            Unavailable: the stop is recorded, but what ends it cannot be reached now; or its worker has claimed it
                and said nothing to Redis yet, which looks like a Redis that was emptied.
        """
        with tracing.span("stop", session_id=session_id, reason=reason.value):
            row = self._record(row or self._queries.row(session_id), reason, by)
            if row.status == StreamStatus.ACTIVE:
                self._stop(row)
        return self._queries.receipt(session_id)

    def _record(self, row: StreamSession, reason: TerminationReason, by: str | None) -> StreamSession:
        """RECORD the stop; the row as it is then."""
        if row.status != StreamStatus.ACTIVE or row.stop_reason:
            return row  # no write where there is nothing to record: fifty callers cost one

        return self._database.write_one(lambda s: rows.record_stop(s, row.id, reason, by, now())) or row

    def _stop(self, row: StreamSession) -> None:
        reason = TerminationReason(str(row.stop_reason))
        fence = self._try_fence(row.id, reason)
        # Without Redis the worker learns of the stop from its next heartbeat, and then gives Redis a moment.
        wait_seconds = self._settings.terminate_wait_seconds if fence else WITHOUT_REDIS_WAIT_SECONDS
        deadline = time.monotonic() + wait_seconds
        nudge = fence is None or fence.verdict in (Verdict.OK, Verdict.ABSENT)
        while row.status == StreamStatus.ACTIVE and row.owner and (left := deadline - time.monotonic()) > 0:
            if nudge:
                self._nudge(row.id, row.owner, reason)
                nudge = False
            if fence is None:
                time.sleep(min(WITHOUT_REDIS_POLL_SECONDS, left))
            elif self._wait_ended(row.id, left):
                return
            row = self._queries.row(row.id)
        if row.status == StreamStatus.ACTIVE:
            if not row.owner:
                self._try("revoke", lambda: self._queue.revoke(row.id), row.id)
            self._settle_or_wait(row.id, reason, deadline)

    def _nudge(self, session_id: UUID, owner: str, reason: TerminationReason) -> None:
        self._try("nudge", lambda: self._queue.nudge(session_id, owner, reason), session_id)

    def _settle_or_wait(self, session_id: UUID, reason: TerminationReason, deadline: float) -> None:
        """Finish what nobody owns. A claim that slips in between makes the claimer finish: it meets the fence."""
        while (row := self._queries.row(session_id)).status == StreamStatus.ACTIVE:
            if row.owner and (left := deadline - time.monotonic()) > 0:
                self._wait_ended(session_id, left)
                continue
            try:
                self.settle(session_id, reason)
            except Unavailable:
                # A worker that has claimed it since and not said so to Redis yet looks like a log that was lost.
                claimed = row.owner is None and self._queries.row(session_id).owner
                if not claimed or time.monotonic() >= deadline:
                    raise

    def _try_fence(self, session_id: UUID, reason: TerminationReason) -> Answer | None:
        try:
            with tracing.span("fence", session_id=session_id, reason=reason.value):
                return self._log.fence(session_id, reason)
        except RedisError as error:
            log.warning("stream.fence_failed", session_id=str(session_id), error=repr(error))
            return None

    def _wait_ended(self, session_id: UUID, timeout_seconds: float) -> bool:
        """Until `done` is in the log, which it is only behind a commit; without Redis, for a moment, after which the
        caller looks at the row."""
        try:
            return self.wait_done(session_id, timeout_seconds)
        except RedisError:
            time.sleep(min(0.1, timeout_seconds))
            return False


def _with_checkpoint(row: StreamSession, outcome: Outcome) -> Outcome:
    """The longer of the outcome's text and the checkpoint: the fence may stand in a log that Redis had lost."""
    if row.checkpoint_length <= len(outcome.text):
        return outcome
    return replace(outcome, text=row.checkpoint, thinking_length=row.checkpoint_thinking_length)


def _ending_of_unclaimed(row: StreamSession, reason: TerminationReason, detail: str | None) -> rows.Ending:
    """Of a session that nobody has run: its text is what it began with. A claim meanwhile makes its commit void."""
    answer = Answer(Verdict.FENCED, row.checkpoint_length, row.checkpoint_thinking_length, reason)
    phase, text, thinking_length = StreamPhase(row.phase), row.checkpoint, row.checkpoint_thinking_length
    return _ending(Outcome(answer, text, thinking_length, phase, upstream_closed_at=None, detail=detail))


def _ending(outcome: Outcome) -> rows.Ending:
    """What to write for an outcome: the text, cut nowhere but at the fence."""
    answer = outcome.answer
    thinking_length = min(outcome.thinking_length, len(outcome.text))
    moment = now()
    content = outcome.text[thinking_length:]
    return rows.Ending(
        reason=TerminationReason(str(answer.reason)),
        text=outcome.text,
        thinking_length=thinking_length,
        sha256=hashlib.sha256(content.encode()).hexdigest(),
        fenced_at=datetime.fromtimestamp(answer.fenced_us / 1e6, UTC) if answer.fenced_us else moment,
        ended_at=moment,
        upstream_closed_at=outcome.upstream_closed_at,
        phase=outcome.phase,
        detail=outcome.detail,
        stats=outcome.stats,
    )
