"""The Celery application of the workers: `celery -A workers.celery worker`."""

from __future__ import annotations

import time
from typing import Any

import kombu.utils.functional
from celery.signals import setup_logging, task_revoked, worker_ready, worker_shutting_down

from webapp.config import load_settings
from webapp.logs import configure_logs
from webapp.queue import GENERATE_QUEUE, make_celery

# gevent patches `threading` before `time`, and on the way touches Celery's lazy objects, which import kombu: kombu
# keeps the `sleep` that blocks. It sleeps between two tries to reach the broker, and every stream with it.
kombu.utils.functional.sleep = time.sleep  # type: ignore[attr-defined]

settings = load_settings()
app = make_celery(settings, include=["workers.tasks", "workers.control", "workers.reaper"])


@setup_logging.connect
def _configure_logs(**_: object) -> None:
    """Celery leaves logging to us once this signal has a receiver."""
    configure_logs(settings)


@worker_ready.connect
def _prepare(sender: Any, **_: object) -> None:
    """A worker that generates makes its runtime before its first task, says that it is there, and drains at its end."""
    if GENERATE_QUEUE not in sender.app.amqp.queues.consume_from:
        return
    import gevent

    from workers.runtime import runtime

    gevent.spawn(lambda: runtime().report_alive(sender.hostname))

    def drain() -> None:
        sender.cancel_task_queue(GENERATE_QUEUE)
        runtime().drain()

    def on_shutting_down(**_: object) -> None:
        gevent.spawn(drain)  # this runs inside gevent's hub, where nothing may block

    def on_revoked(request: Any, **_: object) -> None:
        gevent.spawn(runtime().on_revoked, request.id)

    worker_shutting_down.connect(on_shutting_down, weak=False)
    task_revoked.connect(on_revoked, weak=False)
