"""The Celery application of the workers: `celery -A workers.celery worker`."""

from __future__ import annotations

import atexit
import os
import signal
import threading
import time
from typing import Any, Final

import kombu.utils.functional
import structlog
from celery.signals import setup_logging, task_failure, task_revoked, worker_ready, worker_shutting_down

from webapp.config import load_settings
from webapp.heap import freeze_heap
from webapp.logs import configure_logs
from webapp.metrics import share
from webapp.queue import GENERATE_QUEUE, GENERATE_TASK, make_celery
from webapp.tracing import configure_tracing

log = structlog.get_logger(__name__)

EXIT_SECONDS: Final = 10.0
"""That Celery has for leaving once the streams are given up."""

# gevent patches `threading` before `time`, and on the way touches Celery's lazy objects, which import kombu: kombu
# keeps the `sleep` that blocks. It sleeps between two tries to reach the broker, and every stream with it.
kombu.utils.functional.sleep = time.sleep  # type: ignore[attr-defined]

settings = load_settings()
settings.data_dir.mkdir(parents=True, exist_ok=True)  # where beat keeps its schedule
share(settings.metrics_directory)
app = make_celery(
    settings, include=["workers.tasks", "workers.control", "workers.reaper"], events="workers.events:BufferedEvents"
)
app.conf.worker_consumer = "workers.consumer:Consumer"


@setup_logging.connect
def _configure_logs(**_: object) -> None:
    """Celery leaves logging to us once this signal has a receiver."""
    configure_logs(settings)


@task_failure.connect
def _log_failure(sender: Any, task_id: str, exception: BaseException, **_: object) -> None:
    """In place of Celery's own line, which has the error's words in it."""
    ids = {"session_id": task_id} if sender.name == GENERATE_TASK else {}
    log.error("task.failed", task=sender.name, exc_info=exception, **ids)


def _reap_at_start() -> None:
    from webapp.streams.recovery import reap_alone
    from workers.runtime import services

    reap_alone(services().reaper, services().redis, at_start=True)


def _serve_metrics() -> None:
    from workers.runtime import services

    if settings.metrics_port:
        services().metrics.serve(settings.host, settings.metrics_port)


@worker_ready.connect
def _prepare(sender: Any, **_: object) -> None:
    """A worker that generates makes its runtime before its first task, says that it is there, and drains at its end.
    Every worker begins with a pass of the reaper: beat may be long in coming."""
    configure_tracing(settings)
    _serve_metrics()
    threading.Thread(target=_reap_at_start, name="reap-at-start", daemon=True).start()
    if GENERATE_QUEUE not in sender.app.amqp.queues.consume_from:
        return
    import gevent

    from workers.runtime import runtime

    own = runtime()  # made here and now: two tasks at once would make two
    freeze_heap()
    own.report_alive(sender.hostname)
    atexit.register(own.wait_given_up)

    def drain() -> None:
        try:
            sender.cancel_task_queue(GENERATE_QUEUE)
        except Exception:
            log.warning("worker.consumer_not_cancelled", exc_info=True)  # the broker is away, and delivers nothing
        own.drain()
        gevent.sleep(EXIT_SECONDS)
        log.warning("worker.left_by_force")  # Celery waits for a broker that does not come back
        os._exit(0)

    def on_shutting_down(**_: object) -> None:
        own.draining = True
        gevent.spawn(drain)  # this runs inside gevent's hub, where nothing may block

    def on_revoked(request: Any, **_: object) -> None:
        gevent.spawn(own.on_revoked, request.id)

    celerys_own = signal.getsignal(signal.SIGQUIT)

    def on_quit(*arguments: Any) -> None:
        gevent.spawn(celerys_own, *arguments)  # it asks the broker to deliver no more, and waits for it

    signal.signal(signal.SIGQUIT, on_quit)
    worker_shutting_down.connect(on_shutting_down, weak=False)
    task_revoked.connect(on_revoked, weak=False)
