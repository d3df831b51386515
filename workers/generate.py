"""One generation: from the upstream to the token log, until it ends or is stopped.

Three greenlets take part. The *reader* reads the upstream and does nothing else, so that it may be
killed at any instant. The *flusher*, shared by all sessions, writes the log. The greenlet that runs
`Generation.run` waits: for the answer's end, for a stop, for a time-out; then it closes the upstream,
takes the fence, and has the manager commit.
"""

from __future__ import annotations

import contextvars
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import UUID

import gevent
import structlog
from gevent.event import Event
from redis.exceptions import RedisError
from sqlalchemy.exc import DBAPIError

from webapp import metrics, tracing
from webapp.config import Settings
from webapp.errors import Unavailable
from webapp.logs import bind
from webapp.models import now
from webapp.streams.lifecycle import StreamPhase, TerminationReason
from webapp.streams.log import Answer, Append, Mark, TokenLog, Verdict
from webapp.streams.manager import StreamSessionManager
from webapp.streams.ports import Assignment, Outcome
from webapp.streams.rows import Beat
from webapp.streams.timing import Due, Timeouts
from workers.flusher import Flusher
from workers.ollama import ChatEnd, ChatRequest, OllamaService, UpstreamError
from workers.transcript import Transcript

log = structlog.get_logger(__name__)

RETRY_SECONDS: Final = 0.2
RETRY_LAST_SECONDS: Final = 1.0
GIVE_UP_SECONDS: Final = 5.0
"""That a session is tried to be given up for while the database does not answer."""
WITHOUT_REDIS_SECONDS: Final = 2.0
"""How long an ending waits for Redis before it is committed without the fence: the row then decides alone."""


@dataclass(frozen=True, slots=True)
class Ports:
    """What a generation works with."""

    manager: StreamSessionManager
    log: TokenLog
    ollama: OllamaService
    flusher: Flusher
    settings: Settings
    ask_rows: Callable[[], None]
    """Have the rows of this worker's sessions asked at once, instead of at the next heartbeat; does not block."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Why a generation is over, as far as this worker knows. The fence may know better."""

    reason: TerminationReason
    detail: str | None = None
    stats: dict[str, Any] | None = None
    natural: bool = False
    """Whether the text is complete as it is, so that all of it has to be in the log before the fence."""


def _pauses_seconds() -> Iterator[float]:
    """Between two tries to reach the database: short at first, and not those of all streams at once."""
    pause_seconds = RETRY_SECONDS
    while True:
        yield pause_seconds * random.uniform(0.5, 1.0)  # noqa: S311 - spreads the tries, no secret
        pause_seconds = min(pause_seconds * 2, RETRY_LAST_SECONDS)


class Lost(Exception):
    """The session has a newer epoch, or has ended: nothing may be written for it any more."""


class Generation:
    """One session, for as long as this worker runs it. Entered in the worker's table before it is claimed."""

    def __init__(self, session_id: UUID, owner: str, ports: Ports) -> None:
        self.session_id = session_id
        self.owner = owner
        self.epoch = 0
        self.transcript = Transcript()
        self.checkpointed = 0
        self._ports = ports
        self._attempt = 0
        self._marks: list[Mark] = []
        self._phase = StreamPhase.QUEUED
        self._wake = Event()
        self._flushed = Event()
        self._stop: Stop | None = None
        self._lost = False
        self._finished = False
        self._broken = False
        self.log_lost = False
        """Whether Redis has lost the log, and it is not made anew yet."""
        self._may_rebuild = False
        self._fence_unknown = False
        self.held = False
        """Whether the log has been opened at this epoch, so that there is a lease to renew."""
        self._handing_over = False
        self._said: set[str] = set()
        self._refusal: Answer | None = None
        self._reader: gevent.Greenlet | None = None
        self._upstream_opened = False
        self._upstream_closed_at: datetime | None = None
        self._timeouts = Timeouts.of(ports.settings)
        self._claimed_at = now()
        self._heard_at = time.monotonic()
        """When the model spoke last; before its first word, when it was asked."""
        self._has_spoken = False

    # -- what others call ----------------------------------------------------------------------

    def stop(self, reason: TerminationReason, detail: str | None = None) -> None:
        """End the generation soon: closes the upstream in whatever it is doing. Does not block."""
        self._end(Stop(reason, detail))
        if self._reader is not None:
            self._reader.kill(block=False)

    def hand_over(self) -> None:
        """The worker stops: close the upstream, and let the session go on elsewhere from where it is."""
        self._handing_over = True
        self.stop(TerminationReason.SHUTDOWN)

    def lose(self) -> None:
        """The session is another's now: stop, and write nothing."""
        self._lost = True
        self.stop(TerminationReason.WORKER_LOST)

    def on_lease_refused(self, answer: Answer) -> None:
        """The lease's renewal found the session fenced, taken over, or its state gone."""
        if answer.verdict is Verdict.STALE:
            self.lose()
        elif answer.fenced and answer.reason is not None:
            self.stop(answer.reason)
        elif answer.verdict is Verdict.ABSENT:
            self._lose_log()
        elif answer.verdict is Verdict.BROKEN:
            self._break()

    def on_row(self, stop_reason: TerminationReason | None, *, log_was_lost: bool) -> None:
        """What the row said of this session, asked when the log was lost already, or was not."""
        if stop_reason is not None:
            # Whoever stops it has taken the fence, maybe in what Redis lost: nothing more may be shown of it.
            self._fence_unknown = self._fence_unknown or log_was_lost
            self.stop(stop_reason)
        elif log_was_lost:
            self._may_rebuild = True
            self._ports.flusher.submit(self)

    def _break(self) -> None:
        """The session's keys in Redis are not ours any more: it ends here, with all its text, and harms no other."""
        self._broken = True
        self.stop(TerminationReason.INTERNAL, "The stream's token log in Redis was damaged")
        self._flushed.set()

    def beat(self, *, with_text: bool, everything: bool) -> Beat:
        """This session's heartbeat. While Redis answers, only acknowledged text is checkpointed."""
        transcript = self.transcript
        end = (transcript.length if everything else transcript.acknowledged) if with_text else self.checkpointed
        delta = transcript.between(self.checkpointed, end) if end > self.checkpointed else ""
        thinking_length = min(transcript.thinking_length, self.checkpointed + len(delta))
        owner = "" if self._handing_over else self.owner  # what is given up is not to be taken back
        return Beat(self.session_id, self.epoch, self.checkpointed, delta, thinking_length, self._due(), owner)

    # -- the flusher's source ------------------------------------------------------------------

    def pending(self) -> Sequence[Append | Mark]:
        if self._lost or self._finished or self._broken or self.log_lost or self._refusal is not None:
            return ()
        return [*self._marks, *self.transcript.unacknowledged(self.session_id, self.epoch)]

    def on_answer(self, operation: Append | Mark, answer: Answer) -> None:
        if answer.ok:
            if isinstance(operation, Append):
                self.transcript.acknowledge(operation.end)
            else:
                self._marks.remove(operation)
        elif answer.verdict is Verdict.BEHIND and answer.end <= self.transcript.length:
            self.transcript.rewind(answer.end)  # an answer of Redis was lost; the log knows what it has
        elif answer.verdict is Verdict.ABSENT:
            self._lose_log()
        elif answer.fenced and answer.reason is not None:
            self._refusal = answer
            self.stop(answer.reason)
        elif answer.verdict is Verdict.BROKEN:
            self._break()
        else:
            self.lose()
        self._flushed.set()

    def _lose_log(self) -> None:
        """Redis has lost the log. A fence may have been in it: the row is asked before anything is shown again."""
        if not self.log_lost and not self._finished:
            self.log_lost = True
            log.warning("stream.log_lost", session_id=str(self.session_id), length=self.transcript.length)
        self._ports.ask_rows()

    def rebuild(self, token_log: TokenLog) -> None:
        """Make the log anew, with all text as one step: a fence must not find less than was seen."""
        if not self._may_rebuild or self._lost or self._finished:
            return
        pieces = self.transcript.everything(self.session_id, self.epoch)
        live_seconds = self._timeouts.live_seconds(self._ports.settings)
        answer = token_log.rebuild(self.session_id, self.epoch, self.owner, pieces, live_seconds=live_seconds)
        self.log_lost = self._may_rebuild = False
        log.warning("stream.log_rebuilt", session_id=str(self.session_id), length=answer.end)
        if answer.verdict is Verdict.STALE:
            self.lose()
        elif answer.verdict is Verdict.BROKEN:
            self._break()
        else:
            self.transcript.acknowledge(min(answer.end, self.transcript.length))
            if self._phase is not StreamPhase.QUEUED:
                self._mark(self._phase)
        self._flushed.set()

    # -- the run -------------------------------------------------------------------------------

    def run(self) -> None:
        """Claim the session and see it to its end. Returns early where there is nothing to do."""
        assignment = self._claim()
        if assignment is None:
            return
        bind(session_id=self.session_id, conversation_id=assignment.conversation_id, user_id=assignment.user_id)
        # The checkpoint first: from the moment that the epoch is known the keeper writes heartbeats.
        self.transcript.preload(assignment.checkpoint, assignment.checkpoint_thinking_length, 0)
        self.checkpointed = len(assignment.checkpoint)
        self._timeouts, self._claimed_at = assignment.timeouts, assignment.claimed_at
        self.epoch, self._attempt = assignment.epoch, assignment.attempt
        try:
            opened = self._open(assignment)
            if not opened.fenced:
                self._generate(assignment)
            if not self._handed_over(assignment.model):
                self._finish()
        except Lost:
            log.info("stream.lost_to_another", session_id=str(self.session_id), epoch=self.epoch)
        finally:
            self._finished = True

    def _claim(self) -> Assignment | None:
        """Repeated until the database answers, or the worker stops: then the session is claimed by another."""
        tries: list[datetime] = []
        pauses = _pauses_seconds()
        while True:
            try:
                return self._ports.manager.claim(self.session_id, self.owner, tries)
            except Unavailable as error:
                if self._handing_over:
                    return None
                self._say_once("stream.claim_retried", error)
                gevent.sleep(next(pauses))

    def _open(self, assignment: Assignment) -> Answer:
        """OPEN the log at the new epoch, and take over the text that earlier attempts left."""
        try:
            answer: Answer = self._patiently("open", lambda: self._open_at(self._ports.log))
        except RedisError:
            if self.epoch > 1:
                raise  # what earlier attempts said is in the log alone
            return Answer(Verdict.ABSENT)  # it is to end, and nobody has said anything
        if answer.verdict is Verdict.STALE:
            raise Lost
        self._phase = StreamPhase.LOADING
        self.held = True
        if self.epoch > 1 or assignment.checkpoint:
            text, thinking_length = self._patiently("read", lambda: self._ports.log.text(self.session_id))
            if len(assignment.checkpoint) > len(text):
                text, thinking_length = assignment.checkpoint, assignment.checkpoint_thinking_length
            self.transcript.preload(text, thinking_length, min(answer.end, len(text)))
        if answer.fenced:
            self._refusal = answer
        return answer

    def _open_at(self, token_log: TokenLog) -> Answer:
        live_seconds = self._timeouts.live_seconds(self._ports.settings)
        return token_log.open(self.session_id, self.epoch, self.owner, live_seconds=live_seconds)

    def _patiently(self, step: str, action: Callable[[], Any]) -> Any:
        """Until Redis answers: nothing can be written, and nothing be known, before."""
        said = False
        while True:
            try:
                return action()
            except RedisError as error:
                if self._stop is not None:
                    raise
                if not said:
                    log.warning("stream.waits_for_redis", step=step, session_id=str(self.session_id), error=repr(error))
                said = True
                gevent.sleep(RETRY_SECONDS)

    def _generate(self, assignment: Assignment) -> None:
        if self._stop is None:
            self._mark(StreamPhase.LOADING)
            self._heard_at = time.monotonic()
            self._reader = gevent.spawn(contextvars.copy_context().run, self._read, self._request(assignment))
            try:
                self._watch()
            finally:
                self._close_upstream()

    def _request(self, assignment: Assignment) -> ChatRequest:
        """The question; where earlier attempts left a partial answer, the model is to go on with it."""
        messages, think = list(assignment.messages), assignment.think
        content = self.transcript.text[self.transcript.thinking_length :]
        if content:
            messages.append({"role": "assistant", "content": content})
            think = False if think is not None else None
        elif assignment.attempt > 1:
            self.transcript.think_again()
        return ChatRequest(assignment.model, messages, assignment.options, think, assignment.keep_alive)

    def _read(self, request: ChatRequest) -> None:
        """The reader. Ends by itself, by an error, or by being killed; each time the upstream is closed by then."""
        try:
            end: ChatEnd = self._ports.ollama.chat(request, self._on_text, self._on_open)
            self._end(Stop(end.reason, stats=end.stats, natural=True))
        except UpstreamError as error:
            self._end(Stop(TerminationReason.UPSTREAM_ERROR, error.detail, natural=True))
        except Exception as error:
            log.exception("stream.reader_failed", session_id=str(self.session_id))
            self._end(Stop(TerminationReason.INTERNAL, f"The reader failed: {type(error).__name__}", natural=True))
        finally:
            if self._upstream_opened:
                self._upstream_closed_at = now()

    def _on_open(self) -> None:
        self._upstream_opened = True

    def _on_text(self, thinking: str, content: str) -> None:
        if self._stop is None and (thinking or content):
            if self.transcript.add(thinking, content):
                metrics.chunk_arrived(len(thinking) + len(content))
            if self._phase is not StreamPhase.GENERATING:
                metrics.first_token(time.monotonic() - self._heard_at)
                tracing.event("first token")
                self._mark(StreamPhase.GENERATING)
                self._wake.set()  # from now on it is the silence between two tokens that counts
            self._heard_at, self._has_spoken = time.monotonic(), True
            self._ports.flusher.submit(self)

    def _mark(self, phase: StreamPhase) -> None:
        self._phase = phase
        self._marks.append(Mark(self.session_id, self.epoch, phase, self._attempt))
        self._ports.flusher.submit(self)

    def _watch(self) -> None:
        """Wait for the end, or for the first time-out that is due."""
        while self._stop is None:
            self._wake.clear()
            due = self._due()
            if (left := (due.at - now()).total_seconds()) <= 0:
                self._end(Stop(due.reason, natural=True))
            else:
                self._wake.wait(left)

    def _due(self) -> Due:
        """When this worker ends the session by itself, unless the model speaks before."""
        heard_at = now() - timedelta(seconds=time.monotonic() - self._heard_at)
        if self._has_spoken:
            return self._timeouts.due_after_token(heard_at, self._claimed_at)
        return self._timeouts.due_without_token(heard_at, self._claimed_at)

    def _end(self, stop: Stop) -> None:
        """The first is kept: what comes later came too late."""
        if self._stop is None:
            self._stop = stop
        self._wake.set()
        self._flushed.set()

    def _close_upstream(self) -> None:
        if self._reader is not None:
            self._reader.kill()
            if self._upstream_opened and self._upstream_closed_at is None:
                self._upstream_closed_at = now()

    def _handed_over(self, model: str) -> bool:
        """Give the session up to another worker, where that was asked for and nothing has ended it meanwhile."""
        if not self._handing_over or not self._ports.settings.goes_on_elsewhere(model):
            return False
        flushed = self._flush_all(time.monotonic() + WITHOUT_REDIS_SECONDS)
        told = self._refusal is not None or self._fence_unknown
        if told or self._stop is None or self._stop.reason is not TerminationReason.SHUTDOWN:
            return False
        if self._give_up(everything=not flushed):
            log.info("stream.handed_over", session_id=str(self.session_id), length=self.transcript.length)
        else:
            log.warning("stream.not_handed_over", session_id=str(self.session_id))  # it will be taken for lost
        return True

    def _give_up(self, *, everything: bool) -> bool:
        """Tried for a moment, for whoever stops a worker waits for it.

        Without Redis's answers `everything` is written down: what it took without saying so may have been seen.
        """
        deadline = time.monotonic() + GIVE_UP_SECONDS
        pauses = _pauses_seconds()
        while True:
            try:
                self._ports.manager.beat([self.beat(with_text=True, everything=everything)])
                self._ports.manager.give_up(self.session_id, self.epoch)
                return True
            except Unavailable:
                if time.monotonic() > deadline:
                    return False
                gevent.sleep(next(pauses))

    # -- the ending ----------------------------------------------------------------------------

    def _finish(self) -> None:
        """FENCE, then COMMIT what the fence says; repeated until it is known to have happened."""
        stop = self._stop or Stop(TerminationReason.INTERNAL)
        answer = self._refusal or self._fence(stop)
        reason = answer.reason
        # A fence may stand in a log that Redis has lost and that is not rebuilt: what was seen counts all the same.
        end = max(answer.end, self.transcript.seen)
        outcome = Outcome(
            answer=answer,
            text=self.transcript.between(0, end),
            thinking_length=min(self.transcript.thinking_length, end),
            phase=self._phase,
            upstream_closed_at=self._upstream_closed_at,
            detail=stop.detail if reason is stop.reason else None,
            stats=stop.stats if reason is stop.reason else None,
        )
        self._commit(outcome)

    def _commit(self, outcome: Outcome) -> None:
        pauses = _pauses_seconds()
        while True:
            try:
                self._ports.manager.finish(self.session_id, self.epoch, outcome)
                return
            except Unavailable as error:
                self._say_once("stream.commit_retried", error)
                gevent.sleep(next(pauses))
            except DBAPIError:
                if outcome.stats is None and outcome.detail is None:
                    raise
                log.exception("stream.commit_without_stats", session_id=str(self.session_id))
                outcome = replace(outcome, stats=None, detail=None)  # the text is what must be kept

    def _say_once(self, event: str, error: Unavailable) -> None:
        """Of what is repeated until it is known; how long it lasts, the database's own lines tell."""
        if event not in self._said:
            self._said.add(event)
            log.warning(event, session_id=str(self.session_id), error=error.detail)

    def _fence(self, stop: Stop) -> Answer:
        """Take the fence at this worker's epoch. A natural end first has all its text in the log.

        Raises:
            Lost: the session has a newer epoch.
        """
        deadline = time.monotonic() + WITHOUT_REDIS_SECONDS
        while time.monotonic() < deadline:
            if self._lost:
                raise Lost
            if self._refusal is not None:
                return self._refusal
            if self._broken or self._fence_unknown:
                break
            if stop.natural and not self._flush_all(deadline):
                break
            try:
                answer = self._try_fence(stop, deadline)
            except RedisError:
                gevent.sleep(RETRY_SECONDS)
                continue
            if answer is not None:
                return answer
        return self._unfenced(stop)

    def _try_fence(self, stop: Stop, deadline: float) -> Answer | None:
        expected_end = self.transcript.length if stop.natural else None
        answer = self._ports.log.fence(self.session_id, stop.reason, epoch=self.epoch, expected_end=expected_end)
        if answer.fenced:
            return answer
        if answer.verdict is Verdict.STALE:
            raise Lost
        if answer.verdict is Verdict.BEHIND:
            self.transcript.rewind(min(answer.end, self.transcript.length))
        if answer.verdict is Verdict.ABSENT:
            self._lose_log()
            self._flush_all(deadline)
        return None

    def _flush_all(self, deadline: float) -> bool:
        """Wait until the log has everything, or refuses; False where it does not come to that in time."""
        while self.pending() or self.log_lost:
            if self._lost or self._fence_unknown or (left := deadline - time.monotonic()) <= 0:
                return False
            self._flushed.clear()
            self._ports.flusher.submit(self)
            self._flushed.wait(left)
        return True

    def _unfenced(self, stop: Stop) -> Answer:
        """Redis cannot be reached, or has lost the fence: the worker holds all text, and the row decides."""
        log.warning("stream.ended_without_redis", session_id=str(self.session_id), reason=stop.reason.value)
        return Answer(Verdict.FENCED, self.transcript.length, self.transcript.thinking_length, stop.reason, 0)
