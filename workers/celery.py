"""The Celery application of the workers: `celery -A workers.celery worker`."""

from __future__ import annotations

from typing import Any

from celery.signals import setup_logging, worker_ready

from webapp.config import load_settings
from webapp.logs import configure_logs
from webapp.queue import GENERATE_QUEUE, make_celery

settings = load_settings()
app = make_celery(settings, include=["workers.tasks", "workers.control", "workers.reaper"])


@setup_logging.connect
def _configure_logs(**_: object) -> None:
    """Celery leaves logging to us once this signal has a receiver."""
    configure_logs(settings)


@worker_ready.connect
def _prepare(sender: Any, **_: object) -> None:
    """A worker that generates makes its runtime before its first task, and says that it is there."""
    if GENERATE_QUEUE in sender.app.amqp.queues.consume_from:
        import gevent

        from workers.runtime import runtime

        gevent.spawn(lambda: runtime().report_alive(sender.hostname))
