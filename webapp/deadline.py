"""By when what is being done must be over: known to whatever it waits for, in the same greenlet or thread."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_deadline: ContextVar[float] = ContextVar("deadline", default=math.inf)


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """What is done in this block is to be over in so many seconds."""
    token = _deadline.set(time.monotonic() + seconds)
    try:
        yield
    finally:
        _deadline.reset(token)


def seconds_left() -> float:
    """Until the deadline, at least 0; infinite where there is none."""
    return max(0.0, _deadline.get() - time.monotonic())
