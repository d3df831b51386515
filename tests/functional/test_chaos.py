"""Whatever breaks, and whenever: a minute of faults, under load; the short form of `bench/chaos.py`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bench.chaos import run, system
from bench.report import Options, table

SEED = int(os.environ.get("SLUICEGATE_CHAOS_SEED", "16409"))
"""Whose first six faults are of six processes."""
STREAMS = 30
MINUTES = float(os.environ.get("SLUICEGATE_CHAOS_MINUTES", "1"))
KINDS = 6
"""Of faults that a minute has room for on a busy machine; `make chaos` has all of them."""


@pytest.mark.timeout(400)
def test_no_fault_breaks_an_invariant(tmp_path: Path) -> None:
    options = Options(SEED, MINUTES, STREAMS, short=True)
    with system(tmp_path, options) as rig:
        outcome = run(rig, options)
    print(table(outcome))
    assert not outcome.findings, "\n".join(map(str, outcome.findings))

    assert len({hit.plan.kind for hit in outcome.hits}) >= KINDS
    assert outcome.crowd
    # Or it would say nothing: each kind met streams, some were stopped, and some came to their own end.
    assert all(hit.streams for hit in outcome.hits)
    assert max(outcome.at_once) > 0.8 * STREAMS
    assert sum(1 for one in outcome.crowd.streams if one.stops) > STREAMS
    assert sum(1 for one in outcome.crowd.streams for seen in one.readers if seen.connections > 1) > STREAMS
