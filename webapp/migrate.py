"""Migrations: Alembic through Flask-Migrate, over the tables of `models`."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from flask import Flask
from flask_migrate import Migrate

from webapp.models import db

MIGRATIONS_DIRECTORY: Final = Path(__file__).resolve().parent.parent / "migrations"


def configure_migrations(app: Flask) -> None:
    """Bind Flask-Migrate. SQLite cannot alter a table in place, so its migrations copy (batch mode)."""
    Migrate(app, db, directory=str(MIGRATIONS_DIRECTORY), render_as_batch=True, compare_type=True)
