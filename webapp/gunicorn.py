"""How gunicorn runs the web process: `gunicorn -c python:webapp.gunicorn webapp.wsgi:app`.

gunicorn reads the module's names as its settings. WEB_CONCURRENCY, which is gunicorn's own
variable, sets the number of processes; one serves thousands of open streams.
"""

from __future__ import annotations

from typing import Any

from webapp.config import load_settings

_WATCH_SECONDS = 0.1

_settings = load_settings()
_address = f"[{_settings.host}]" if ":" in _settings.host else _settings.host

bind = [f"{_address}:{_settings.port}"]
worker_class = "gevent"
# Each open stream is a connection, and a browser keeps up to six.
worker_connections = 4000
# A worker that does not tick for so long is killed: far above any pause of a healthy one.
timeout = 60
# Open streams are closed at once (below); what is left are short requests.
graceful_timeout = 5
keepalive = 5
# All masters of a user would share one socket in the home.
control_socket_disable = True
# Every request is logged by the application, with what it knows of it.
accesslog = None
errorlog = "-"
loglevel = _settings.log_level.lower()
proc_name = "sluicegate-web"


def pre_request(worker: Any, request: Any) -> None:
    """A stream's connection is closed behind `done`: it is watched for the reader's leaving."""
    if request.path.endswith("/events") or request.path == "/api/stream-message":
        request.force_close()


def post_worker_init(worker: Any) -> None:
    """Watch for this worker's end, so that its open streams do not delay it."""
    import gevent

    gevent.spawn(_close_readers_at_end, worker)


def _close_readers_at_end(worker: Any) -> None:
    """An open stream is a request that does not end by itself: SIGTERM would wait for it in vain.

    Its client connects again, to whoever serves then, and reads on from where it was.
    """
    import gevent

    while worker.alive:
        gevent.sleep(_WATCH_SECONDS)
    services = getattr(worker.wsgi, "extensions", {}).get("sluicegate")
    if services is not None:
        services.hub.close()
