"""Migrations: up from nothing and down again, and what they make is what the models say, on both databases."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from flask import Flask
from flask_migrate import downgrade, upgrade
from sqlalchemy import Engine, NullPool, create_engine, inspect, text

from tests.integration.world import make_settings
from tests.services import PostgresServer
from webapp.database import configure_database
from webapp.migrate import configure_migrations
from webapp.models import db

TABLES = {table.name for table in db.metadata.sorted_tables}
Shape = dict[str, Any]


@pytest.fixture(autouse=True)
def alembic_is_quiet() -> None:
    logging.getLogger("alembic").setLevel(logging.WARNING)


@pytest.fixture
def app(database_url: str, tmp_path: Path) -> Iterator[Flask]:
    """An application over an empty database, with its migrations."""
    app = Flask(__name__)
    configure_database(app, make_settings(database_url, "", tmp_path))
    configure_migrations(app)
    with app.app_context():
        yield app
        db.engine.dispose()


@pytest.fixture
def engine(database_url: str) -> Engine:
    """Another way to the database of `app`."""
    return create_engine(database_url, poolclass=NullPool)


@pytest.fixture
def made_from_models(database_url: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    """A second database of the same kind, with the tables as the models make them."""
    if database_url.startswith("sqlite"):
        engine = create_engine(f"sqlite:///{tmp_path / 'models.db'}", poolclass=NullPool)
        db.metadata.create_all(engine)
        yield engine
        return
    server: PostgresServer = request.getfixturevalue("postgres")
    url = server.create_database()
    engine = create_engine(url, poolclass=NullPool)
    db.metadata.create_all(engine)
    yield engine
    server.drop_database(url)


def tables_of(engine: Engine) -> set[str]:
    return set(inspect(engine).get_table_names()) - {"alembic_version"}


def test_up_from_nothing_and_down_again_and_up(app: Flask, engine: Engine) -> None:
    upgrade()
    assert tables_of(engine) == TABLES
    downgrade(revision="base")
    assert tables_of(engine) == set()
    upgrade()
    assert tables_of(engine) == TABLES


def test_up_is_idempotent_and_keeps_what_is_there(app: Flask, engine: Engine) -> None:
    upgrade()
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO conversations (id, title, created_at) VALUES (:id, 't', :at)"), _ROW)
    upgrade()
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM conversations")) == 1


_ROW = {"id": "018f0000000070008000000000000001", "at": "2026-01-01 00:00:00"}


def test_what_runs_over_an_upgrade_is_due_and_what_has_ended_is_not(app: Flask, engine: Engine) -> None:
    upgrade(revision="0001")
    ids = {name: uuid4() for name in ("user", "conversation", "message", "running", "ended")}
    moment, never = sa.DateTime(timezone=True), datetime(2026, 1, 1, tzinfo=UTC)
    values = {name: value if engine.dialect.name == "postgresql" else value.hex for name, value in ids.items()}
    session = (
        "INSERT INTO stream_sessions (id, conversation_id, message_id, user_id, model, on_disconnect, status, phase, "
        "epoch, attempt, checkpoint, checkpoint_length, checkpoint_thinking_length, started_at, reason, ended_at) "
        "VALUES (:{}, :conversation, :message, :user, 'm', 'terminate', '{}', 'QUEUED', 0, 0, '', 0, 0, :at, {})"
    )
    with engine.begin() as connection:
        for statement in (
            "INSERT INTO users (id, name, token_hash, created_at) VALUES (:user, 'ada', 'x', :at)",
            "INSERT INTO conversations (id, title, created_at) VALUES (:conversation, 't', :at)",
            "INSERT INTO messages (id, conversation_id, role, content, thinking, created_at) "
            "VALUES (:message, :conversation, 'assistant', '', '', :at)",
            session.format("running", "ACTIVE", "NULL, NULL"),
            session.format("ended", "COMPLETED", "'stop', :at"),
        ):
            bound = text(statement).bindparams(sa.bindparam("at", type_=moment))
            connection.execute(bound, values | {"at": never})
    upgrade()
    with engine.connect() as connection:
        found = connection.execute(
            text("SELECT status, due_at, due_reason, abandon_at FROM stream_sessions ORDER BY status")
        ).all()
    assert [(row[0], row[1] is not None, row[2], row[3] is not None) for row in found] == [
        ("ACTIVE", True, "queue_timeout", True),
        ("COMPLETED", False, None, False),
    ]
    downgrade(revision="0001")
    upgrade()


def test_there_is_one_head(app: Flask) -> None:
    from alembic.script import ScriptDirectory

    config = app.extensions["migrate"].migrate.get_config()
    assert len(ScriptDirectory.from_config(config).get_heads()) == 1


def test_another_tools_tables_are_left_alone(app: Flask, engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE not_ours (id integer)"))
    upgrade()
    downgrade(revision="base")
    assert tables_of(engine) == {"not_ours"}


def test_autogenerate_finds_no_difference(app: Flask, engine: Engine) -> None:
    upgrade()
    with engine.connect() as connection:
        options = {"compare_type": True, "compare_server_default": True}
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, db.metadata) == []


def test_what_autogenerate_does_not_compare_is_equal_too(app: Flask, engine: Engine, made_from_models: Engine) -> None:
    """Columns, CHECKs, foreign keys' ON DELETE, names of all constraints, and predicates of partial indexes."""
    upgrade()
    for table in sorted(TABLES):
        migrated, modelled = shape_of(engine, table), shape_of(made_from_models, table)
        for part in modelled:
            assert migrated[part] == modelled[part], f"{table}: {part}"


def test_the_comparison_sees_checks_and_predicates(made_from_models: Engine) -> None:
    """Or the test above would hold of anything."""
    sessions = shape_of(made_from_models, "stream_sessions")
    assert len(sessions["checks"]) == 7
    assert "worker_lost" in sessions["checks"]["ck_stream_sessions_reason"]
    active = sessions["indexes"]["uq_stream_sessions_active_conversation"]
    assert re.search(r"UNIQUE .*WHERE .*status.* = 'ACTIVE'", active)
    assert {key["ondelete"] for key in sessions["foreign_keys"].values()} == {"CASCADE"}


def shape_of(engine: Engine, table: str) -> Shape:
    """All that a database knows of a table, in a form that does not depend on the order of its making."""
    there = inspect(engine)
    special: Callable[[Engine, str], Shape] = _of_sqlite if engine.dialect.name == "sqlite" else _of_postgresql
    return {
        "columns": {
            one["name"]: (repr(one["type"]), one["nullable"], one["default"]) for one in there.get_columns(table)
        },
        "primary_key": there.get_pk_constraint(table),
        "foreign_keys": {
            one["name"]: {
                "from": one["constrained_columns"],
                "to": (one["referred_table"], one["referred_columns"]),
                "ondelete": one["options"].get("ondelete"),
            }
            for one in there.get_foreign_keys(table)
        },
        "uniques": {one["name"]: one["column_names"] for one in there.get_unique_constraints(table)},
        "checks": {one["name"]: " ".join(one["sqltext"].split()) for one in there.get_check_constraints(table)},
        **special(engine, table),
    }


def _of_sqlite(engine: Engine, table: str) -> Shape:
    query = text("SELECT name, sql FROM sqlite_master WHERE type = 'index' AND tbl_name = :table AND sql IS NOT NULL")
    with engine.connect() as connection:
        return {"indexes": {name: " ".join(sql.split()) for name, sql in connection.execute(query, {"table": table})}}


def _of_postgresql(engine: Engine, table: str) -> Shape:
    indexes = text("SELECT indexname, indexdef FROM pg_indexes WHERE tablename = :table")
    constraints = text(
        "SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint WHERE conrelid = CAST(:table AS regclass)"
    )
    with engine.connect() as connection:
        return {
            "indexes": {row[0]: row[1] for row in connection.execute(indexes, {"table": table})},
            "constraints": {row[0]: row[1] for row in connection.execute(constraints, {"table": table})},
        }
