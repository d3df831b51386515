"""What one worker process has: its table of generations, and the greenlets that serve all of them."""

from __future__ import annotations

import contextvars
import time
from functools import cache
from typing import Final
from uuid import UUID

import gevent
import structlog
from celery.worker import state as worker_state
from redis.exceptions import RedisError

from webapp import metrics
from webapp.app import Services, make_services, make_token_log
from webapp.config import load_settings
from webapp.errors import NotFound, Unavailable
from webapp.queue import make_redis
from webapp.streams.lifecycle import TerminationReason
from workers.flusher import Flusher, keep_running
from workers.generate import Generation, Ports
from workers.keeper import Keeper
from workers.ollama import OllamaService

log = structlog.get_logger(__name__)


DRAIN_POLL_SECONDS: Final = 0.05
SEND_BACK_SECONDS: Final = 0.5
GIVE_UP_SECONDS: Final = 5.0


class Runtime:
    """Runs generations; made once a process, in the process that runs them."""

    def __init__(self, services: Services) -> None:
        settings = services.settings
        self.table: dict[UUID, Generation] = {}
        # Connections of their own: those that serve every stream never wait behind one of them.
        flusher = Flusher(make_token_log(make_redis(settings), settings))
        keeper = Keeper(self.table, services.manager, make_token_log(make_redis(settings), settings), flusher, settings)
        ollama = OllamaService(
            settings.ollama_base_url,
            connect_timeout_seconds=settings.upstream_connect_timeout_seconds,
            line_limit_bytes=settings.upstream_line_limit_bytes,
            answer_limit_characters=settings.answer_limit_characters,
        )
        self._ports = Ports(services.manager, services.log, ollama, flusher, settings, keeper.beat_soon)
        self._workers = services.workers
        self._settings = settings
        self._queue = services.queue
        self.draining = False
        """Set when the worker is told to stop: what comes now goes back."""
        for name, loop in (("flusher", flusher.run), ("leases", keeper.renew_leases), ("heartbeats", keeper.beat)):
            gevent.spawn(keep_running, name, loop)

    def report_alive(self, name: str) -> None:
        """Say every second that this worker is there; `/readyz` and `doctor` look. Runs until killed."""

        def report() -> None:
            while True:
                try:
                    self._workers.report(name)
                except RedisError:
                    log.debug("worker.report_failed")  # the keeper says that Redis is lost
                gevent.sleep(1)

        gevent.spawn(keep_running, "alive", report)

    def run(self, session_id: UUID, owner: str) -> None:
        """Run one session to its end, or return at once where it runs here already."""
        if self.draining:
            self._send_back(session_id)
            return
        if session_id in self.table:
            return
        # Entered before it is claimed: a stop that comes from now on finds it.
        generation = self.table[session_id] = Generation(session_id, owner, self._ports)
        try:
            with metrics.running():
                self._run_uninterrupted(generation)
        finally:
            del self.table[session_id]

    def _send_back(self, session_id: UUID) -> None:
        """Celery takes messages for a moment longer after it was told to stop: they are for another worker.

        Not at once, or this one would take them again and again; and not while the session is still being given up
        here, for until then the other would take the message for a duplicate.
        """
        gevent.sleep(SEND_BACK_SECONDS)
        while session_id in self.table:
            gevent.sleep(DRAIN_POLL_SECONDS)
        self._queue.enqueue(session_id)

    def _run_uninterrupted(self, generation: Generation) -> None:
        """Celery's own termination kills the task's greenlet wherever it is; the run is in another, which it
        cannot strike, and is told to end as `revoked`."""
        run = gevent.spawn(contextvars.copy_context().run, generation.run)  # within the task's trace
        while not run.ready():
            try:
                run.join()
            except gevent.GreenletExit:
                # A task that somebody means to end is put on this list first. A cold shutdown kills all tasks, which
                # nobody means as the end of their streams, and may do so before it says anywhere that it has begun.
                if str(generation.session_id) in worker_state.revoked:
                    generation.stop(TerminationReason.REVOKED)
                else:
                    self.draining = True  # or this worker would take again what it has just given up
                    generation.hand_over()
        run.get(block=False)  # raises what the run raised

    def drain(self) -> None:
        """Let the running streams end for a grace, then give the rest up to another worker. Blocks."""
        self.draining = True
        log.info("worker.draining", streams=len(self.table), grace_seconds=self._settings.drain_seconds)
        deadline = time.monotonic() + self._settings.drain_seconds
        while self.table and time.monotonic() < deadline:
            gevent.sleep(DRAIN_POLL_SECONDS)
        for generation in list(self.table.values()):
            generation.hand_over()
        while self.table:
            gevent.sleep(DRAIN_POLL_SECONDS)
        log.info("worker.drained")

    def wait_given_up(self) -> None:
        """At the process's exit, which Celery's cold shutdown does not delay: let what is being given up get there."""
        deadline = time.monotonic() + GIVE_UP_SECONDS
        while self.table and time.monotonic() < deadline:
            gevent.sleep(DRAIN_POLL_SECONDS)

    def on_revoked(self, task_id: str) -> None:
        """Celery has dropped or killed a task: its session ends as `revoked`, unless it has ended already.

        One that runs here is told by its greenlet's death.
        """
        try:
            session_id = UUID(task_id)
        except ValueError:
            return  # nobody's session; Celery has said that it dropped it
        if session_id in self.table:
            return
        try:
            self._ports.manager.terminate(session_id, TerminationReason.REVOKED)
        except (NotFound, Unavailable) as error:
            log.warning("worker.revoked_not_ended", session_id=task_id, error=error.detail)

    def stop(self, session_id: UUID, reason: TerminationReason) -> bool:
        """Stop a session that runs here; returns whether one does. Does not block."""
        generation = self.table.get(session_id)
        if generation is not None:
            generation.stop(reason)
        return generation is not None


@cache
def runtime() -> Runtime:
    """This process's runtime."""
    return Runtime(services())


@cache
def services() -> Services:
    """This process's services."""
    return make_services(load_settings())
