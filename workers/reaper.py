"""What beat sends to the maintenance queue."""

from __future__ import annotations

from celery import shared_task

from webapp.queue import REAP_TASK
from webapp.streams.recovery import reap_alone
from workers.runtime import services


@shared_task(name=REAP_TASK, ignore_result=True)
def reap() -> None:
    """Look after what is due. Idempotent, so that two beats are safe."""
    reap_alone(services().reaper, services().redis)
