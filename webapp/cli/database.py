"""`sluicegate migrate`: the database's tables."""

from __future__ import annotations

import click


@click.command()
def migrate() -> None:
    """Bring the database's tables to this version."""
    from flask_migrate import upgrade

    from webapp.cli.services import bare_app
    from webapp.config import load_settings, mask_url
    from webapp.logs import configure_logs

    settings = load_settings()
    configure_logs(settings)
    with bare_app(settings).app_context():
        upgrade()
    click.echo(f"The database is up to date: {mask_url(settings.effective_database_url)}")
