"""What is asked costs what it shows and not what exists, on both databases; see `bench/scale.py`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa

from bench.scale import CALLS, HEAVY, Site, Size, site, watch
from tests.integration.world import World
from tests.services import ValkeyServer
from webapp.models import Role

FEW = Size(2_000, 4_000)
MANY = Size(20_000, 40_000)
"""Conversations, of which there must be more than it takes no time to read, and sessions. `make bench-scale` has more,
and times the calls."""

Sites = tuple[Site, Site]


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def sites(
    request: pytest.FixtureRequest, valkey: ValkeyServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Sites]:
    """The application beside few conversations and beside many."""
    postgres = request.getfixturevalue("postgres") if request.param == "postgresql" else None
    directory = tmp_path_factory.mktemp("scale")
    with ExitStack() as stack:
        few, many = (stack.enter_context(site(request.param, one, valkey, postgres, directory)) for one in (FEW, MANY))
        yield few, many


@pytest.mark.parametrize(("call", "user"), CALLS)
def test_no_statement_reads_a_whole_table(sites: Sites, call: str, user: str) -> None:
    few, many = (watch(one, call, user) for one in sites)
    assert many.walks == set()
    assert many.executed == few.executed, "statements of its own for each row"
    if call != "all streams":  # which looks at each of the user's conversations, and shows more of more
        assert many.steps <= 2 * few.steps, "rows that are read and not shown"


def test_an_index_that_is_missing_would_be_found(sites: Sites) -> None:
    _, many = sites
    index, table = "ix_messages_conversation_id_id", "messages"
    _execute(many, f"DROP INDEX {index}")
    try:
        assert watch(many, "its messages", HEAVY).walks
    finally:
        _execute(many, f"CREATE INDEX {index} ON {table} (conversation_id, id)")


@pytest.mark.parametrize("sites", ["sqlite"], indirect=True)
def test_rows_that_are_read_and_not_shown_would_be_found(sites: Sites) -> None:
    """On SQLite, where an index of ACTIVE sessions stands beside one of all: no plan says which of the two is short.
    PostgreSQL does not count its steps."""
    index, table = "ix_stream_sessions_active_user", "stream_sessions"
    for one in sites:
        _execute(one, f"DROP INDEX {index}")
    try:
        few, many = (watch(one, "start", HEAVY) for one in sites)
        assert many.steps > 2 * few.steps
    finally:
        for one in sites:
            _execute(one, f"CREATE INDEX {index} ON {table} (user_id, status) WHERE status = 'ACTIVE'")


def test_a_narrowed_list_shows_the_newest_of_what_is_asked_for(world: World) -> None:
    """Whatever else is newer in the conversations that it looks at."""
    mine = [world.start().session_id for _ in range(3)]
    others = world.start(user_id=world.user("bob"))
    world.join(others.conversation_id, "ada", Role.VIEWER)

    def listed(**narrowed: Any) -> list[UUID]:
        return [one.session_id for one in world.queries.list_streams(user_id=world.user(), **narrowed)]

    assert listed(limit=2) == [others.session_id, mine[2]]
    assert listed(limit=2, user_name="ada") == listed(limit=2, user_name="ada", active_only=True) == mine[:0:-1]
    assert listed(limit=1, user_name="bob") == [others.session_id]
    assert listed(model="another-model") == []


def _execute(one: Site, statement: str) -> None:
    engine = one.world.database.engine
    with engine.begin() as connection:
        connection.execute(sa.text(statement))
    engine.dispose()  # SQLite's connections keep what they have explained
