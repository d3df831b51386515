"""The tasks: thin shells. An id comes in, one call is made."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from celery import Task, shared_task

from webapp import tracing
from webapp.queue import GENERATE_TASK
from workers.runtime import runtime


@shared_task(name=GENERATE_TASK, bind=True, ignore_result=True)
def generate(self: Task[Any, Any], session_id: str) -> None:
    """Run one stream session to its end. Harmless when it comes twice or late."""
    with tracing.span("generate", parent=self.request.headers or {}, session_id=session_id):
        runtime().run(UUID(session_id), self.request.hostname)
