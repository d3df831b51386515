"""`create_app` and `make_services`: the one place where things are wired."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass

import redis
from apiflask import APIFlask
from celery import Celery
from flask import Flask

from webapp import auth
from webapp.accounts import Accounts
from webapp.config import Settings
from webapp.conversations import Conversations
from webapp.database import Database, configure_database, open_database
from webapp.logs import configure_logs
from webapp.migrate import configure_migrations
from webapp.queue import CeleryQueue, Workers, make_celery, make_redis
from webapp.streams.hub import StreamHub
from webapp.streams.log import TokenLog
from webapp.streams.manager import StreamSessionManager
from webapp.streams.queries import SessionQueries
from webapp.streams.recovery import Reaper
from webapp.upstream import Upstream


@dataclass(frozen=True)
class Services:
    """What the faces and the workers are made over."""

    settings: Settings
    database: Database
    redis: redis.Redis
    log: TokenLog
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


def create_app(settings: Settings) -> APIFlask:
    """The web application. It connects to nothing until it is asked something."""
    from webapp.pages import pages
    from webapp.rest import configure_rest

    configure_logs(settings)
    app = APIFlask(__name__, title="Sluicegate", version="0.1.0", spec_path="/openapi.json", docs_path="/docs")
    services = app.extensions["sluicegate"] = _wire(app, settings)
    services.manager.wait_done = services.hub.wait_done
    auth.configure_auth(app, settings, _secret_key(settings))
    configure_rest(app, settings)
    app.register_blueprint(pages)
    return app


def make_services(settings: Settings) -> Services:
    """The services without the web: for workers."""
    return _wire(Flask(__name__), settings)


def _wire(app: Flask, settings: Settings) -> Services:
    configure_database(app, settings)
    configure_migrations(app)
    database = open_database(app)
    client = make_redis(settings)
    token_log = make_token_log(client, settings)
    celery = make_celery(settings, publisher=True, set_as_current=False)
    queries = SessionQueries(database, token_log)
    queue = CeleryQueue(celery)
    manager = StreamSessionManager(database, token_log, queue, settings, queries)
    hub_client = make_redis(settings)  # of its own, so that it never waits behind requests
    hub = StreamHub(
        hub_client,
        token_log,
        buffer_bytes=settings.reader_buffer_bytes,
        check_seconds=settings.database_check_seconds,
        ended_among=queries.ended_among,
    )
    queries.count_viewers = hub.viewers
    return Services(
        settings=settings,
        database=database,
        redis=client,
        log=token_log,
        celery=celery,
        queue=queue,
        manager=manager,
        queries=queries,
        reaper=Reaper(database, token_log, manager, queries, settings),
        hub=hub,
        accounts=Accounts(database, sign_in_token_seconds=settings.sign_in_token_seconds),
        conversations=Conversations(database),
        upstream=Upstream(settings),
        workers=Workers(client),
    )


def make_token_log(client: redis.Redis, settings: Settings) -> TokenLog:
    """The token log over a client; a live log's TTL is the longest that a session can last, and some slack."""
    live_seconds = int(settings.queue_timeout_seconds + settings.max_duration_seconds) + settings.log_slack_seconds
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
