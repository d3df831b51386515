"""Nothing is left over, after many stops at once and many cycles; the short form of `bench/stability.py`."""

from __future__ import annotations

from bench.stability import cycle, leftovers, sample, terminate_at_once
from tests.functional.nodes import Stack
from tests.upstream import UpstreamProcess

STREAMS = 60
CYCLES = 60
TERMINATION_SECONDS = 20.0
"""Far more than it takes; a call that waits for nobody would take longer."""
GROWTH_KB = 40_000
"""Of web and worker over all of it, first uses included; the long form is held to 5 %."""


def test_many_stops_at_once_and_many_cycles_leave_nothing(stack: Stack, upstream: UpstreamProcess) -> None:
    cycle(stack, CYCLES // 10)
    before = sample(stack)
    terminations = terminate_at_once(stack, upstream, STREAMS)
    done = cycle(stack, CYCLES)

    assert len(terminations.seconds) == STREAMS
    assert max(terminations.seconds) < TERMINATION_SECONDS
    left = leftovers(stack, upstream)
    assert left == dict.fromkeys(left, 0)
    assert done.cycles == CYCLES
    assert done.samples[-1].web_kb - before.web_kb < GROWTH_KB
    assert done.samples[-1].worker_kb - before.worker_kb < GROWTH_KB
