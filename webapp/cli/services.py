"""How a command gets at what it works on: the application's own parts, without serving."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flask import Flask

    from webapp.accounts import Accounts
    from webapp.app import Services
    from webapp.config import Settings


def quiet_settings() -> Settings:
    """The settings in force, but with warnings only in the log, unless a level is set."""
    from webapp.config import load_settings

    settings = load_settings()
    level = settings.log_level if "log_level" in settings.model_fields_set else "WARNING"
    return settings.model_copy(update={"log_level": level})


def open_services() -> Services:
    """Everything; needs the database and Redis to be there when it is used."""
    from webapp.app import make_services
    from webapp.logs import configure_logs
    from webapp.metrics import share

    settings = quiet_settings()
    configure_logs(settings)
    logging.getLogger("webapp.database").setLevel(logging.ERROR)  # that it is down, the command says in one line
    share(settings.metrics_directory)  # a command may end a stream, which counts as any ending does
    return make_services(settings)


@contextmanager
def open_accounts() -> Iterator[Accounts]:
    """The accounts alone, which need the database and no Redis."""
    from webapp.accounts import Accounts
    from webapp.database import open_database
    from webapp.logs import configure_logs

    settings = quiet_settings()
    configure_logs(settings)
    logging.getLogger("webapp.database").setLevel(logging.ERROR)  # that it is down, the command says in one line
    database = open_database(bare_app(settings), settings)
    try:
        yield Accounts(database, sign_in_token_seconds=settings.sign_in_token_seconds)
    finally:
        database.engine.dispose()


def bare_app(settings: Settings) -> Flask:
    """A Flask application that knows the database and its migrations, and nothing else."""
    from flask import Flask

    from webapp.database import configure_database
    from webapp.migrate import configure_migrations

    app = Flask("sluicegate")
    configure_database(app, settings)
    configure_migrations(app)
    return app
