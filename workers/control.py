"""The remote-control command by which a stop reaches a worker at once."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from celery.worker.control import control_command

from webapp.queue import STOP_COMMAND
from webapp.streams.lifecycle import TerminationReason
from workers.runtime import runtime


@control_command(name=STOP_COMMAND, args=[("session_id", str), ("reason", str)], signature="SESSION_ID REASON")
def stop_stream(state: Any, session_id: str, reason: str) -> dict[str, str]:
    """Stop a stream session that runs at this worker."""
    found = runtime().stop(UUID(session_id), TerminationReason(reason))
    return {"ok": "stopping" if found else "not running here"}
