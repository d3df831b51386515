"""The reaper's cost follows what has gone wrong and not what exists, on both databases; see `bench/reaper.py`."""

from __future__ import annotations

import pytest
from sqlalchemy import func, select

from bench.plans import PlanWatch
from bench.reaper import FEW, Cost, empty_database, measure
from tests.integration.world import World
from tests.services import ValkeyServer
from webapp.models import StreamSession

MANY = 20_000
"""Ended sessions. `make bench-reaper` has 50 times as many, which takes longer to fill in than all tests."""


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def costs(
    request: pytest.FixtureRequest, valkey: ValkeyServer, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Cost, Cost]:
    """Of the passes over few sessions and over many."""
    postgres = request.getfixturevalue("postgres") if request.param == "postgresql" else None
    directory = tmp_path_factory.mktemp("reaper")
    measured = []
    for ended in (FEW, MANY):
        with empty_database(request.param, postgres, directory) as url:
            measured.append(measure(url, valkey, ended, passes=3))
    return measured[0], measured[1]


def test_no_statement_reads_a_whole_table(costs: tuple[Cost, Cost]) -> None:
    assert costs[1].walks == []


def test_a_pass_takes_as_many_statements_beside_many_as_beside_few(costs: tuple[Cost, Cost]) -> None:
    few, many = costs
    assert many.statements == few.statements


def test_a_pass_takes_about_as_long_beside_many_as_beside_few(costs: tuple[Cost, Cost]) -> None:
    few, many = costs
    assert min(many.pass_seconds) < 3 * min(few.pass_seconds)
    assert min(many.idle_seconds) < 5 * min(few.idle_seconds)


def test_a_whole_table_that_is_read_would_be_found(world: World) -> None:
    with PlanWatch(world.database.engine) as watch:
        counting = select(func.count()).select_from(StreamSession).where(StreamSession.model == "a-model")
        world.database.read(lambda s: s.scalar(counting))
    assert len(watch.walks) == 1
