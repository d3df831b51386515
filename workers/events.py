"""What workers tell monitors of their tasks, sent a moment later and together.

Celery itself does so in the prefork pool only ("excludes eventlet/gevent, which should actually buffer", says its
`worker/consumer/events.py`); with gevent each event is sent, and its answer awaited, before the task may begin.
"""

from __future__ import annotations

import math
from typing import Any, Final

import gevent
from celery.app.events import Events
from celery.events.dispatcher import EventDispatcher
from gevent.monkey import is_module_patched

LATER_SECONDS: Final = 0.05


class BufferedDispatcher(EventDispatcher):
    """Under gevent, sends the events of tasks together, `LATER_SECONDS` after the first of them; all others at once.

    Those of a process's last moments are lost, as events may be; a broker that comes back is told those from before.
    """

    def __init__(self, connection: Any = None, *args: Any, **options: Any) -> None:
        if is_module_patched("threading"):
            # Without a limit: beyond it Celery would send at once, and wait.
            options |= {"buffer_group": ["task"], "buffer_limit": math.inf, "on_send_buffered": self._flush_soon}
        super().__init__(connection, *args, **options)
        self._later: gevent.Greenlet | None = None

    def extend_buffer(self, other: BufferedDispatcher) -> None:
        """Take over what another had not sent when its connection was lost."""
        super().extend_buffer(other)
        for group, events in other._group_buffer.items():
            self._group_buffer[group] += events

    def _flush_soon(self) -> None:
        """Does not block: a signal's handler, which may send events too, runs in gevent's hub."""
        if self._later is None:
            self._later = gevent.spawn_later(LATER_SECONDS, self._flush_now)

    def _flush_now(self) -> None:
        self._later = None
        self.flush(errors=False)


class BufferedEvents(Events):
    """`app.events` with that dispatcher."""

    dispatcher_cls = "workers.events:BufferedDispatcher"
