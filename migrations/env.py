"""Alembic's environment: the engine and the tables come from the application."""

from __future__ import annotations

from alembic import context
from flask import current_app

migrate = current_app.extensions["migrate"]


def include_name(name: str | None, kind: str, _: object) -> bool:
    """Leave tables that are not ours alone."""
    return kind != "table" or name in migrate.db.metadata.tables


if context.is_offline_mode():
    context.configure(url=migrate.db.engine.url, target_metadata=migrate.db.metadata, literal_binds=True)
    with context.begin_transaction():
        context.run_migrations()
else:
    with migrate.db.engine.connect() as connection:
        context.configure(
            connection=connection,
            target_metadata=migrate.db.metadata,
            include_name=include_name,
            **migrate.configure_args,
        )
        with context.begin_transaction():
            context.run_migrations()
