"""What beat sends to the maintenance queue."""

from __future__ import annotations

from typing import Final

import structlog
from celery import shared_task
from redis.exceptions import LockError, RedisError

from webapp.errors import Unavailable
from webapp.queue import REAP_TASK
from webapp.streams.keys import REAPER_KEY
from workers.runtime import services

log = structlog.get_logger(__name__)

LOCK_SECONDS: Final = 10


@shared_task(name=REAP_TASK, ignore_result=True)
def reap() -> None:
    """Look after what is due. Idempotent, so that two beats are safe."""
    # Only against work done twice: two passes at once would do no harm, so the lock may lapse.
    lock = services().redis.lock(REAPER_KEY, timeout=LOCK_SECONDS, blocking=False)
    try:
        with lock:
            done = services().reaper.reap()
    except LockError:
        return
    except (RedisError, Unavailable) as error:
        log.warning("reaper.skipped", error=str(error))
        return
    if any(done.values()):
        log.info("reaper.pass", **done)
