"""Databases with tables, and worlds over them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import structlog
from apiflask import APIFlask

from tests.integration.api import People
from tests.integration.world import CLOSED_REDIS, World, empty_tables, make_settings, make_world
from tests.services import ValkeyServer
from webapp.app import create_app, make_services
from webapp.config import Settings
from webapp.database import Database
from webapp.models import db

MakeSettings = Callable[..., Settings]
MakeWorld = Callable[..., World]


@pytest.fixture(scope="session", params=["sqlite", "postgresql"])
def session_database(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    """The session's database of each kind, with tables; a test that asks for it runs once on each."""
    directory = tmp_path_factory.mktemp("database")
    url = f"sqlite:///{directory / 'session.db'}"
    if request.param == "postgresql":
        url = request.getfixturevalue("postgres").create_database()
    database = make_services(make_settings(url, CLOSED_REDIS, directory)).database
    db.metadata.create_all(database.engine)
    yield database
    database.engine.dispose()


@pytest.fixture
def database(session_database: Database) -> Database:
    """A database that has the application's tables, and nothing in them."""
    empty_tables(session_database.engine)
    return session_database


@pytest.fixture
def settings_for(database: Database, valkey: ValkeyServer, tmp_path: Path) -> MakeSettings:
    """Makes settings for this test's database and the session's Valkey, which are both empty; takes others by name."""
    valkey.flush()
    database_url = database.engine.url.render_as_string(hide_password=False)

    def make(**overrides: Any) -> Settings:
        overrides = {"redis_url": valkey.url} | overrides
        return make_settings(database_url, overrides.pop("redis_url"), tmp_path, **overrides)

    return make


@pytest.fixture
def world_with(database: Database, settings_for: MakeSettings) -> Iterator[MakeWorld]:
    """Makes worlds with settings of their own, over one database."""
    made: list[World] = []

    def make(**overrides: Any) -> World:
        made.append(make_world(settings_for(**overrides), database))
        return made[-1]

    yield make
    for world in made:
        world.close()


@pytest.fixture
def world(world_with: MakeWorld) -> World:
    """The core with default settings."""
    return world_with()


@pytest.fixture(scope="session")
def session_app(tmp_path_factory: pytest.TempPathFactory) -> APIFlask:
    """The web application, made once; `app` puts it over a test's own services."""
    directory = tmp_path_factory.mktemp("app")
    with patch("webapp.app.configure_logs"):  # pytest shows the logs of a test that fails
        return create_app(make_settings(f"sqlite:///{directory / 'unused.db'}", CLOSED_REDIS, directory))


@pytest.fixture
def app(session_app: APIFlask, world: World) -> APIFlask:
    """The web application over this test's world."""
    session_app.extensions["sluicegate"] = world.services
    return session_app


@pytest.fixture
def people(app: APIFlask, world: World) -> People:
    """Makes callers of the web application, by name."""
    return People(app, world)


@pytest.fixture(scope="session", autouse=True)
def logs_go_to_pytest() -> None:
    """What is logged is shown with the test that fails, and nowhere else."""
    root = logging.getLogger()
    for handler in [one for one in root.handlers if type(one) is logging.StreamHandler]:
        root.removeHandler(handler)  # of a command that ran in this process, to an output that is closed
    root.addHandler(logging.NullHandler())  # for threads that end between two tests
    structlog.configure(
        processors=[
            structlog.stdlib.add_log_level,
            structlog.processors.format_exc_info,
            structlog.processors.KeyValueRenderer(key_order=["event"]),
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
    )
