"""Faults under load break no invariant, of as many kinds as a minute has room for; the short form of `bench/chaos.py`.

SLUICEGATE_CHAOS_SEED draws another schedule.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bench.chaos import run, system
from bench.report import Options, table

SEED = int(os.environ.get("SLUICEGATE_CHAOS_SEED", "16409"))
"""Whose first six faults are of five kinds of process: Valkey is killed and emptied, a worker gets SIGTERM, and
then the reaper, a web process, PostgreSQL and a worker are killed."""
STREAMS = 30
MINUTES = 1.0
"""After which no fault begins."""
KINDS = 6
"""Of faults, at least; a busy machine has room for that many. `make chaos` has all of them."""


@pytest.mark.timeout(400)
def test_no_fault_breaks_an_invariant(tmp_path: Path) -> None:
    options = Options(SEED, MINUTES, STREAMS, short=True)
    with system(tmp_path, options) as rig:
        outcome = run(rig, options)
    print(table(outcome))
    assert not outcome.findings, "\n".join(map(str, outcome.findings))

    assert len({hit.plan.kind for hit in outcome.hits}) >= KINDS
    assert outcome.crowd
    # Or it would say nothing: each fault met streams, most slots had one at once, and more streams were stopped, and
    # more readers were cut off and came again, than there are slots.
    assert all(hit.streams for hit in outcome.hits)
    assert max(outcome.at_once) > 0.8 * STREAMS
    assert sum(1 for one in outcome.crowd.streams if one.stops) > STREAMS
    assert sum(1 for one in outcome.crowd.streams for seen in one.readers if seen.connections > 1) > STREAMS
