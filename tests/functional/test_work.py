"""What a start, a token and a stop make the system do; the short form of `bench/work.py`, which has the limits.

Counted and not timed, so that whoever makes one of them cost more learns it on any machine. What goes on in the
background is measured before, and taken off.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from bench.work import LIMITS, SETTINGS, SIZES, Work, beyond, measure_in_quiet, table
from tests.functional.nodes import Stack
from tests.services import PostgresServer


@pytest.fixture(scope="module")
def stack_settings() -> Mapping[str, str]:
    return SETTINGS


@pytest.mark.usefixtures("recovery")
def test_nothing_costs_more_than_it_did(stack: Stack, postgres: PostgresServer) -> None:
    found = measure_in_quiet(stack, postgres, SIZES)
    print(table(found))
    assert beyond(found) == []


def test_a_figure_is_the_least_of_each_time() -> None:
    assert Work(3.0, 1.0, 2.0).least(Work(2.0, 4.0, 2.5)) == Work(2.0, 1.0, 2.0)


@pytest.mark.parametrize("kind", ["token", "start", "stop"])
def test_a_counter_that_counts_nothing_is_found_out(kind: str) -> None:
    """And so is a figure above its limit, and one that is missing."""
    dead = LIMITS | {name: Work(0, 0, 0) for name in LIMITS if name.startswith(kind)}
    assert {line.partition(",")[0] for line in beyond(dead)} == {kind}
    dear = LIMITS | {f"{kind}, 50 streams": Work(1000, 1000, 1000)}
    assert len(beyond(dear)) == 3
    assert beyond({name: work for name, work in LIMITS.items() if not name.startswith(kind)}) == [
        f"{kind}, {size} streams was not measured" for size in SIZES
    ]
