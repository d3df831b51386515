"""Databases with tables, and worlds over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import NullPool, create_engine

from tests.integration.world import World, empty_tables, make_settings, make_world
from tests.services import ValkeyServer
from webapp.config import Settings
from webapp.models import db

MakeSettings = Callable[..., Settings]
MakeWorld = Callable[..., World]


@pytest.fixture(scope="session", params=["sqlite", "postgresql"])
def database_with_tables(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """URL of the session's database of each kind; a test that asks for it runs once on each."""
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path_factory.mktemp('sqlite') / 'session.db'}"
    else:
        url = request.getfixturevalue("postgres").create_database()
    engine = create_engine(url, poolclass=NullPool)
    db.metadata.create_all(engine)
    return url


@pytest.fixture
def tables_url(database_with_tables: str) -> str:
    """URL of a database that has the application's tables, and nothing in them."""
    empty_tables(create_engine(database_with_tables, poolclass=NullPool))
    return database_with_tables


@pytest.fixture
def settings_for(tables_url: str, valkey: ValkeyServer, tmp_path: Path) -> MakeSettings:
    """Makes settings for this test's database and the session's Valkey, which are both empty; takes others by name."""
    valkey.flush()

    def make(**overrides: Any) -> Settings:
        overrides = {"redis_url": valkey.url} | overrides
        return make_settings(tables_url, overrides.pop("redis_url"), tmp_path, **overrides)

    return make


@pytest.fixture
def world_with(settings_for: MakeSettings) -> Iterator[MakeWorld]:
    """Makes worlds with settings of their own, over one database."""
    made: list[World] = []

    def make(**overrides: Any) -> World:
        made.append(make_world(settings_for(**overrides)))
        return made[-1]

    yield make
    for world in made:
        world.close()


@pytest.fixture
def world(world_with: MakeWorld) -> World:
    """The core with default settings."""
    return world_with()
