"""`create_app` and `make_services`: the one place where things are wired."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import redis
from celery import Celery
from flask import Flask
from werkzeug.middleware.proxy_fix import ProxyFix

from webapp import auth
from webapp.access import note_requests
from webapp.accounts import Accounts
from webapp.calls import Calls
from webapp.config import Settings
from webapp.conversations import Conversations
from webapp.database import Database, configure_database, open_database
from webapp.limits import Limits
from webapp.logs import configure_logs
from webapp.metrics import Exposition
from webapp.models import now
from webapp.operations import Operations
from webapp.queue import CeleryQueue, Workers, make_celery, make_hurried_redis, make_redis
from webapp.streams.hub import StreamHub
from webapp.streams.log import TokenLog
from webapp.streams.manager import StreamSessionManager
from webapp.streams.queries import SessionQueries
from webapp.streams.recovery import Reaper
from webapp.streams.timing import Timeouts
from webapp.tracing import configure_tracing
from webapp.upstream import Upstream

if TYPE_CHECKING:
    from apiflask import APIFlask


@dataclass(frozen=True)
class Services:
    """What the faces and the workers are made over."""

    settings: Settings
    database: Database
    redis: redis.Redis
    log: TokenLog
    views_log: TokenLog
    """Of a client that is quick to give up."""
    celery: Celery
    queue: CeleryQueue
    manager: StreamSessionManager
    queries: SessionQueries
    reaper: Reaper
    hub: StreamHub
    accounts: Accounts
    conversations: Conversations
    upstream: Upstream
    workers: Workers
    limits: Limits
    calls: Calls
    metrics: Exposition
    operations: Operations


def create_app(settings: Settings) -> APIFlask:
    """The web application. It connects to nothing until it is asked something."""
    from apiflask import APIFlask  # as the faces: workers and commands start without them

    from webapp.graphql import configure_graphql
    from webapp.pages import pages
    from webapp.rest import configure_rest

    configure_logs(settings)
    configure_tracing(settings)
    app = APIFlask(__name__, title="Sluicegate", version="0.1.0", spec_path="/openapi.json", docs_path=None)
    services = app.extensions["sluicegate"] = _wire(app, settings)
    services.manager.wait_done = services.hub.wait_done
    note_requests(app)
    auth.configure_auth(app, settings, _secret_key(settings))
    configure_rest(app, settings)
    configure_graphql(app, settings)
    app.register_blueprint(pages)
    if settings.trusted_proxies:
        # By the last so many entries only: what stands before them anybody can have written.
        proxies = {"x_for": settings.trusted_proxies, "x_proto": settings.trusted_proxies}
        app.wsgi_app = ProxyFix(app.wsgi_app, **proxies)  # type: ignore[method-assign]
    return app


def make_services(settings: Settings) -> Services:
    """The services without the web: for workers."""
    return _wire(Flask(__name__), settings)


def _wire(app: Flask, settings: Settings) -> Services:
    configure_database(app, settings)
    database = open_database(app, settings)
    client = make_redis(settings)
    token_log = make_token_log(client, settings)
    celery = make_celery(settings, publisher=True, set_as_current=False)
    # What is only shown does without Redis rather than wait for it.
    views_client = make_hurried_redis(settings)
    views_log = make_token_log(views_client, settings)
    queries = SessionQueries(database, views_log)
    queue = CeleryQueue(celery)
    manager = StreamSessionManager(database, token_log, queue, settings, queries)
    hub_client = make_redis(settings)  # of its own, so that it never waits behind requests
    hub = StreamHub(
        hub_client,
        token_log,
        buffer_bytes=settings.reader_buffer_bytes,
        check_seconds=settings.database_check_seconds,
        ended_among=queries.ended_among,
        report_seconds=_report_seconds(settings),
    )
    hub.watched = lambda session_ids: manager.watched(session_ids, now() + _watched_for(settings))
    queries.count_viewers = hub.viewers
    conversations, upstream = Conversations(database), Upstream(settings)
    metrics = Exposition(queries.population)
    limits = Limits(make_hurried_redis(settings), messages=settings.rate_limit, sign_ins=settings.sign_in_rate_limit)
    return Services(
        settings=settings,
        database=database,
        redis=client,
        log=token_log,
        views_log=views_log,
        celery=celery,
        queue=queue,
        manager=manager,
        queries=queries,
        reaper=Reaper(database, token_log, manager, queries, settings),
        hub=hub,
        accounts=Accounts(database, sign_in_token_seconds=settings.sign_in_token_seconds),
        conversations=conversations,
        upstream=upstream,
        workers=Workers(client),
        limits=limits,
        calls=Calls(settings, conversations, manager, queries, upstream, limits),
        metrics=metrics,
        operations=Operations(database, Workers(views_client), queries, manager, metrics, settings),
    )


def _report_seconds(settings: Settings) -> float:
    """Between two reports of who is watching: several in the grace after which a stream counts as abandoned."""
    return min(settings.database_check_seconds, max(0.2, settings.abandon_grace_seconds / 4))


def _watched_for(settings: Settings) -> timedelta:
    """After a report a stream is not abandoned for its grace, counted from when the next would have been made."""
    return timedelta(seconds=settings.abandon_grace_seconds + _report_seconds(settings))


def make_token_log(client: redis.Redis, settings: Settings) -> TokenLog:
    """The token log over a client."""
    live_seconds = Timeouts.of(settings).live_seconds(settings)
    return TokenLog(client, live_seconds=live_seconds, retention_seconds=settings.log_retention_seconds)


def _secret_key(settings: Settings) -> str:
    """The configured key, or one that is made once and kept beside the embedded data."""
    if settings.secret_key:
        return settings.secret_key
    path = settings.data_dir / "secret-key"
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return path.read_text().strip()
    with os.fdopen(descriptor, "w") as file:
        key = secrets.token_urlsafe(48)
        file.write(key)
    return key
