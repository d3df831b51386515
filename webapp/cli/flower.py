"""`sluicegate flower`: Flower, with its port, its password and its memory from the settings."""

from __future__ import annotations

import os
import secrets
import shelve
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from webapp.config import Settings

CREDENTIALS_FILE = "flower-auth"
_STATE_FILE = "flower.db"
_SAVED_EVERY_MILLISECONDS = 60_000


@click.command()
def flower() -> None:
    """Run Flower, which shows the workers and their tasks."""
    from webapp.config import load_settings

    settings = load_settings()
    settings.effective_broker_url  # noqa: B018 - raises where there is none: Flower would show an empty one for ever
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    state = settings.data_dir.absolute() / _STATE_FILE
    _drop_unreadable(state)
    # By the environment and not by options: everyone on the machine can read a command line.
    os.environ |= {
        "FLOWER_ADDRESS": settings.host,
        "FLOWER_PORT": str(settings.flower_port),
        "FLOWER_BASIC_AUTH": flower_credentials(settings),
        "FLOWER_PERSISTENT": "true",
        "FLOWER_DB": str(state),
        "FLOWER_STATE_SAVE_INTERVAL": str(_SAVED_EVERY_MILLISECONDS),
    }
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "celery", "-A", "workers.celery", "flower"])  # noqa: S606


def flower_credentials(settings: Settings) -> str:
    """`USER:PASSWORD` for Flower: as configured, else made once and kept in the data directory."""
    from webapp.embedded.runtime import write_private

    if settings.flower_basic_auth:
        return settings.flower_basic_auth
    path = settings.data_dir / CREDENTIALS_FILE
    if not path.is_file():
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        write_private(path, f"owner:{secrets.token_urlsafe(24)}\n")
    return path.read_text(encoding="utf-8").strip()


def _drop_unreadable(state: Path) -> None:
    """Flower does not start with a file that was cut short, and what is in it is only a history."""
    try:
        with shelve.open(str(state), flag="c") as shelf:  # noqa: S301 - a file that Flower itself wrote
            shelf.get("events")
    except Exception:
        for path in state.parent.glob(state.name + "*"):
            path.unlink(missing_ok=True)
