"""What workers tell monitors of their tasks, sent a moment later and together.

Celery itself does so in the prefork pool only ("excludes eventlet/gevent, which should actually buffer", says its
`worker/consumer/events.py`); with gevent each event is sent, and its answer awaited, before the task may begin.
"""

from __future__ import annotations

from typing import Any, Final

import gevent
from celery.app.events import Events
from celery.events.dispatcher import EventDispatcher
from gevent.monkey import is_module_patched

LATER_SECONDS: Final = 0.05


class BufferedDispatcher(EventDispatcher):
    """Under gevent, sends the events of tasks together, `LATER_SECONDS` after the first of them; all others at once.

    Where the process is killed meanwhile they are lost, as events may be: a monitor is told again what counts.
    """

    def __init__(self, connection: Any = None, *args: Any, **options: Any) -> None:
        if is_module_patched("threading"):
            options |= {"buffer_group": frozenset(["task"]), "on_send_buffered": self._flush_soon}
        super().__init__(connection, *args, **options)
        self._later: gevent.Greenlet | None = None

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
