"""What gunicorn serves: `gunicorn webapp.wsgi:app`."""

from __future__ import annotations

from webapp.app import create_app
from webapp.config import load_settings
from webapp.metrics import share

settings = load_settings()
share(settings.metrics_directory)
app = create_app(settings)
