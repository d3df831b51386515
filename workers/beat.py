"""The Celery application of beat: `celery -A workers.beat beat`.

It sends the reaper's message and runs no task, so it does not import any: that is 40 MB less than the workers' own.
"""

from __future__ import annotations

from celery.signals import setup_logging

from webapp.config import load_settings
from webapp.logs import configure_logs
from webapp.queue import make_celery

settings = load_settings()
settings.data_dir.mkdir(parents=True, exist_ok=True)  # where the schedule is kept
app = make_celery(settings)


@setup_logging.connect
def _configure_logs(**_: object) -> None:
    """Celery leaves logging to us once this signal has a receiver."""
    configure_logs(settings)
