"""Celery's consumer, which the loss of a broker must not end."""

from __future__ import annotations

import celery.worker.consumer
import structlog

log = structlog.get_logger(__name__)


class Consumer(celery.worker.consumer.Consumer):
    """Goes on to connect anew, whatever the closing of the connection that was lost raises.

    Celery closes it twice. Where the worker was waiting for more, with a task under way, the first time fails, for the
    broker is away; the second restores the task's message by a transport that is gone by then, and the `AttributeError`
    of that would end the worker.
    """

    def on_connection_error_after_connected(self, exc: BaseException) -> None:
        try:
            super().on_connection_error_after_connected(exc)
        except Exception:
            # What is not restored is delivered again: by the broker, or by the reaper, who queues what nobody claimed.
            log.warning("worker.connection_not_closed", exc_info=True)
