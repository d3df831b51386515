"""What gunicorn serves: `gunicorn webapp.wsgi:app`."""

from __future__ import annotations

from webapp.app import create_app
from webapp.config import load_settings

app = create_app(load_settings())
