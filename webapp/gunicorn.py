"""How gunicorn runs the web process: `gunicorn -c python:webapp.gunicorn webapp.wsgi:app`.

gunicorn reads the module's names as its settings. WEB_CONCURRENCY, which is gunicorn's own
variable, sets the number of processes; one serves thousands of open streams.
"""

from __future__ import annotations

from typing import Any

from gunicorn.glogging import Logger

from webapp.config import load_settings
from webapp.heap import freeze_heap
from webapp.logs import configure_logs

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


class logger_class(Logger):
    """gunicorn's own lines in the form of all others."""

    def setup(self, cfg: Any) -> None:
        super().setup(cfg)
        configure_logs(_settings)


def pre_request(worker: Any, request: Any) -> None:
    """A stream's connection is closed behind `done`: it is watched for the reader's leaving."""
    if request.path.endswith("/events") or request.path == "/api/stream-message" or _asks_for_subscription(request):
        request.force_close()


def _asks_for_subscription(request: Any) -> bool:
    accepted = [value for name, value in request.headers if name == "ACCEPT"]
    return request.path == "/graphql" and any("text/event-stream" in value for value in accepted)


def post_worker_init(worker: Any) -> None:
    """Watch for this worker's end, so that its open streams do not delay it."""
    import gevent

    freeze_heap()
    gevent.spawn(_close_readers_at_end, worker)
    gevent.spawn(_reap_at_start, worker)


def _reap_at_start(worker: Any) -> None:
    """Beat may be long in coming, and what was left behind is to be seen to before anybody asks."""
    from webapp.streams.recovery import reap_alone

    services = getattr(worker.wsgi, "extensions", {}).get("sluicegate")
    if services is not None:
        reap_alone(services.reaper, services.redis, at_start=True)


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
