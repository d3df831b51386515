"""What beat sends to the maintenance queue."""

from __future__ import annotations

import structlog
from celery import shared_task

from webapp.errors import Unavailable
from webapp.queue import REAP_TASK
from workers.runtime import services

log = structlog.get_logger(__name__)


@shared_task(name=REAP_TASK, ignore_result=True)
def reap() -> None:
    """Look after what is due. Idempotent, so that two beats are safe."""
    try:
        done = services().reaper.reap()
    except Unavailable as error:
        log.warning("reaper.skipped", error=error.detail)
        return
    if any(done.values()):
        log.info("reaper.pass", **done)
