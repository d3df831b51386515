"""`sluicegate migrate` and `retain`: the database's tables, and what is too old to stay in them."""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from webapp.cli.terminal import StatusLine, paint

if TYPE_CHECKING:
    from flask import Flask


@click.command()
def migrate() -> None:
    """Bring the database's tables to this version.

    Safe to repeat: what has been done already is not done again. At a terminal each migration is named as it begins,
    with the time that it took.

    \b
    Example:
      DATABASE_URL=postgresql://sluicegate@db/sluicegate sluicegate migrate
    """
    from flask_migrate import upgrade

    from webapp.cli.services import bare_app
    from webapp.config import load_settings, mask_url
    from webapp.logs import configure_logs

    settings = load_settings()
    configure_logs(settings)
    app = bare_app(settings)
    with app.app_context():
        if sys.stderr.isatty():
            logging.getLogger("alembic").setLevel(logging.WARNING)  # the same, for a log
            with _Steps(app):
                upgrade()
        else:
            upgrade()
    click.echo(f"The database is up to date: {mask_url(settings.effective_database_url)}")


@click.command()
def retain() -> None:
    """Remove from the database, at once, what is too old to be kept.

    The reaper does the same by itself, a batch with each of its passes: this is for after a retention was shortened, or
    before a backup. Safe to repeat, to interrupt, and beside everything else.

    \b
    Example:
      SLUICEGATE_SESSION_RETENTION_DAYS=7 sluicegate retain
    """
    from webapp.cli.services import open_services
    from webapp.streams.retention import Retention

    services = open_services()
    retention = Retention(services.database, services.settings)
    removed: Counter[str] = Counter()
    status = StatusLine()
    try:
        while any((batch := retention.sweep()).values()):
            removed.update(batch)
            status.show(f"{removed.total():,} rows removed")
    finally:
        status.clear()
        told = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in removed.items() if count)
        click.echo(f"Removed: {told or 'nothing'}")


class _Steps:
    """Says on standard error which migration is being made, of how many, and how long each took."""

    def __init__(self, app: Flask) -> None:
        self._configuration = app.extensions["migrate"].configure_args
        self._pending: Sequence[Any] = _pending(app)
        self._made = 0
        self._began = 0.0
        self._status = StatusLine()

    def __enter__(self) -> None:
        self._configuration["on_version_apply"] = self._applied
        self._begin()

    def __exit__(self, *exception: object) -> None:
        del self._configuration["on_version_apply"]
        self._status.clear()

    def _begin(self) -> None:
        self._began = time.monotonic()
        if self._made < len(self._pending):
            self._status.show(self._name(self._pending[self._made]))

    def _applied(self, **about: Any) -> None:
        """Alembic has made one, whichever it told us."""
        seconds = time.monotonic() - self._began
        self._status.clear()
        if self._made < len(self._pending):
            took = paint(sys.stderr, f"{seconds:6.2f} s", fg="green")
            self._status.say(f"{took}  {self._name(self._pending[self._made])}")
        self._made += 1
        self._begin()

    def _name(self, revision: Any) -> str:
        return f"Migration {self._made + 1} of {len(self._pending)}: {revision.revision}, {revision.doc}"


def _pending(app: Flask) -> list[Any]:
    """The migrations that the database has not had, in the order in which they are made."""
    from alembic.config import Config
    from alembic.runtime.migration import MigrationContext
    from alembic.script import ScriptDirectory

    from webapp.migrate import MIGRATIONS_DIRECTORY

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS_DIRECTORY).replace("%", "%%"))
    script = ScriptDirectory.from_config(config)
    with app.extensions["migrate"].db.engine.connect() as connection:
        current = MigrationContext.configure(connection).get_current_heads()
    return list(reversed(list(script.iterate_revisions("heads", current or "base"))))
