"""What a start, a token and a stop make the system do; the short form of `bench/work.py`.

Counted and not timed, so that whoever makes one of them cost more learns it on any machine. The limits are some 15 %
above what was reached, for what goes on in the background is counted too.
"""

from __future__ import annotations

import pytest

from bench.work import Work, measure
from tests.functional.nodes import Stack
from tests.services import PostgresServer

LIMITS = {
    "token, 1 streams": Work(redis_commands=6.2, sql_statements=0.35, upstream_reads=1.05),
    "token, 50 streams": Work(redis_commands=5.3, sql_statements=0.22, upstream_reads=1.05),
    "start, 1 streams": Work(redis_commands=74.0, sql_statements=21.0, upstream_reads=3.5),
    "start, 50 streams": Work(redis_commands=74.0, sql_statements=21.0, upstream_reads=3.5),
    "stop, 1 streams": Work(redis_commands=25.0, sql_statements=21.5, upstream_reads=0.5),
    "stop, 50 streams": Work(redis_commands=25.0, sql_statements=21.5, upstream_reads=0.5),
}


@pytest.mark.usefixtures("recovery")
def test_nothing_costs_more_than_it_did(stack: Stack, postgres: PostgresServer) -> None:
    found = measure(stack, postgres, (1, 50))
    print("\n".join(f"{name}: {work}" for name, work in found.items()))
    assert found.keys() == LIMITS.keys()
    for name, limit in LIMITS.items():
        work = found[name]
        assert work.redis_commands <= limit.redis_commands, name
        assert work.sql_statements <= limit.sql_statements, name
        assert work.upstream_reads <= limit.upstream_reads, name
