"""The Celery instance, and the queue as the manager sees it.

Tasks are named by string: webapp never imports workers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final
from urllib.parse import urlsplit
from uuid import UUID

import redis
from celery import Celery
from celery.app.amqp import AMQP
from celery.app.control import Control
from kombu.connection import Connection
from kombu.entity import Exchange, Queue
from kombu.pidbox import Mailbox
from redis.backoff import NoBackoff
from redis.retry import Retry

from webapp import tracing
from webapp.config import Settings
from webapp.errors import Unavailable
from webapp.streams.keys import WORKERS_KEY
from webapp.streams.lifecycle import TerminationReason

GENERATE_TASK: Final = "sluicegate.generate"
REAP_TASK: Final = "sluicegate.reap"
STOP_COMMAND: Final = "stop_stream"
GENERATE_QUEUE: Final = "generate"
MAINTENANCE_QUEUE: Final = "maintenance"
REAP_INTERVAL_SECONDS: Final = 1.0
WORKER_FRESH_SECONDS: Final = 5
WORKER_TTL_SECONDS: Final = 60


ANSWER_SECONDS: Final = 2.0
"""After which a Redis that does not answer is as good as one that is down; longer than any read here blocks."""
_CONSUMER_ANSWER_SECONDS: Final = 5.0
_HEALTH_CHECK_SECONDS: Final = 10
_RECONNECT_SECONDS: Final = 1.0

# What a publisher cannot say at once is made good by the reaper, or by the worker's next renewal of its lease.
_PUBLISHER_PATIENCE: Final = {"max_retries": 0, "interval_start": 0, "interval_step": 0.1, "interval_max": 0.2}
# Without a limit kombu waits for ever for a broker that is there and says nothing. It is not BRPOP that is limited:
# that is read when there is something to read, and looked after by the health check.
_REDIS_PUBLISHER: Final = {"socket_timeout": ANSWER_SECONDS, "socket_connect_timeout": ANSWER_SECONDS}
_REDIS_CONSUMER: Final = {
    "socket_timeout": _CONSUMER_ANSWER_SECONDS,
    "socket_connect_timeout": ANSWER_SECONDS,
    "socket_keepalive": True,
    "health_check_interval": _HEALTH_CHECK_SECONDS,
}


class _Connection(Connection):
    """Tries a broker that is away every second; Celery's own workers and beat would come to wait 30 s between tries."""

    def ensure_connection(self, *args: Any, **options: Any) -> Any:
        steady = {"interval_start": _RECONNECT_SECONDS, "interval_step": 0, "interval_max": _RECONNECT_SECONDS}
        return super().ensure_connection(*args, **steady | options)


class _Amqp(AMQP):
    Connection = _Connection


class _Once:
    """A producer that sends once, whatever it is told."""

    def __init__(self, producer: Any) -> None:
        self._producer = producer

    def publish(self, *args: Any, **options: Any) -> Any:
        return self._producer.publish(*args, **options | {"retry": False})


class _Mailbox(Mailbox):
    """Remote control that gives up. kombu's own tries until there is a broker again, and its caller waits for it."""

    @contextmanager
    def producer_or_acquire(self, producer: Any = None, channel: Any = None) -> Iterator[_Once]:
        with super().producer_or_acquire(producer, channel) as found:
            yield _Once(found)


class _Control(Control):
    Mailbox = _Mailbox


def make_celery(settings: Settings, *, publisher: bool = False, **options: Any) -> Celery:
    """The Celery application; `publisher`: for those who only enqueue and nudge, and must not wait for a broker."""
    # Without a broker nothing is accepted, so nothing is enqueued: `StreamSessionManager.start` asks Redis first.
    broker = settings.effective_broker_url if settings.broker_configured else "memory://"
    if publisher:
        options["control"] = _Control
    app = Celery("sluicegate", broker=broker, amqp=_Amqp, **options)
    app.conf.update(
        # JSON only: a pickled message would be code from whoever can reach the broker.
        task_serializer="json",
        accept_content=["json"],
        result_backend=None,
        task_ignore_result=True,
        task_default_queue=GENERATE_QUEUE,
        # Each by an exchange of its own: what is sent to one must never be copied to the other.
        task_queues=[Queue(name, Exchange(name), routing_key=name) for name in (GENERATE_QUEUE, MAINTENANCE_QUEUE)],
        task_routes={REAP_TASK: {"queue": MAINTENANCE_QUEUE}},
        task_publish_retry=False,
        worker_concurrency=settings.worker_concurrency,
        # A message that a busy worker holds back is one that an idle worker could run.
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        worker_send_task_events=True,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_pool_limit=50,
        control_queue_expires=60.0,
        beat_schedule={
            "reap": {
                "task": REAP_TASK,
                "schedule": REAP_INTERVAL_SECONDS,
                "options": {"expires": 5 * REAP_INTERVAL_SECONDS},
            }
        },
        beat_schedule_filename=str(settings.data_dir / "beat-schedule"),
        timezone="UTC",
    )
    app.conf.broker_transport_options = _transport_options(broker, publisher=publisher)
    return app


def _transport_options(broker: str, *, publisher: bool) -> dict[str, Any]:
    """How long to wait for the broker, in the words of its transport; RabbitMQ's would not understand Redis's."""
    on_redis = urlsplit(broker).scheme.startswith("redis")
    if publisher:
        return _PUBLISHER_PATIENCE | (_REDIS_PUBLISHER if on_redis else {})
    return dict(_REDIS_CONSUMER) if on_redis else {}


class CeleryQueue:
    """`TaskQueue` over Celery."""

    def __init__(self, app: Celery) -> None:
        self._app = app

    def enqueue(self, session_id: UUID) -> None:
        """Put a session in the queue; the task's id is the session's."""
        with tracing.span("enqueue", session_id=session_id):
            self._app.send_task(
                GENERATE_TASK,
                args=[str(session_id)],
                task_id=str(session_id),
                queue=GENERATE_QUEUE,
                ignore_result=True,
                argsrepr=f"session {session_id}",  # as Flower and Celery's own logs show it
                kwargsrepr="",
                headers=tracing.carrier(),
            )

    def revoke(self, session_id: UUID) -> None:
        """Tell all workers to drop a queued task when they meet it."""
        self._app.control.revoke(str(session_id))

    def nudge(self, session_id: UUID, owner: str, reason: TerminationReason) -> None:
        """Send the remote-control command that stops a session at its worker."""
        arguments = {"session_id": str(session_id), "reason": reason.value}
        self._app.control.broadcast(STOP_COMMAND, arguments=arguments, destination=[owner])


class Workers:
    """Which workers are alive, as they say themselves, every second, in Redis."""

    def __init__(self, client: redis.Redis) -> None:
        self._redis = client

    def report(self, name: str) -> None:
        """A worker is alive."""
        pipe = self._redis.pipeline()
        pipe.zadd(WORKERS_KEY, {name: time.time()})
        pipe.zremrangebyscore(WORKERS_KEY, 0, time.time() - WORKER_TTL_SECONDS)
        pipe.expire(WORKERS_KEY, WORKER_TTL_SECONDS)
        pipe.execute()

    def alive(self) -> list[str]:
        """The names of those heard of lately."""
        names: Any = self._redis.zrangebyscore(WORKERS_KEY, time.time() - WORKER_FRESH_SECONDS, "+inf")
        return [name.decode() for name in names]

    def silent_seconds(self) -> dict[str, float]:
        """Of those heard of within a minute: how long ago that was, by name."""
        found: Any = self._redis.zrangebyscore(WORKERS_KEY, time.time() - WORKER_TTL_SECONDS, "+inf", withscores=True)
        return {name.decode(): max(0.0, time.time() - at) for name, at in found}

    def require_one(self) -> None:
        """Raises `Unavailable` where no worker is alive."""
        if not self.alive():
            raise Unavailable("No worker is alive: start one with the Procfile's `worker` line")


class _NotConfigured(redis.Connection):
    """What stands for a Redis whose address nobody has told."""

    def connect(self) -> None:
        raise redis.ConnectionError("REDIS_URL is not set and no embedded Valkey runs")


def make_redis(settings: Settings, **options: Any) -> redis.Redis:
    """A client for logs and leases; `options` of a connection go before what is said here.

    The socket time-out is above the longest block of a read (a second), and short enough to notice a Redis that
    is there and says nothing; redis-py tries a broken connection again by itself, which the verbs allow for.
    """
    if not settings.redis_url:
        # Commands that do not need Redis work without one.
        return redis.Redis(connection_pool=redis.ConnectionPool(connection_class=_NotConfigured))
    usual = {
        # Waiting for a connection is no failure of Redis; each generation may want one at the same moment.
        "max_connections": settings.worker_concurrency + 100,
        "timeout": 10,
        "protocol": 2,
        "socket_timeout": ANSWER_SECONDS,
        "socket_connect_timeout": ANSWER_SECONDS,
        "health_check_interval": 30,
    }
    pool = redis.BlockingConnectionPool.from_url(settings.effective_redis_url, **usual | options)
    return redis.Redis(connection_pool=pool)


def make_hurried_redis(settings: Settings) -> redis.Redis:
    """A client for what has another way, and goes it rather than wait: half a second at most for each step."""
    return make_redis(
        settings,
        max_connections=50,
        timeout=0.5,
        socket_timeout=0.5,
        socket_connect_timeout=0.5,
        retry=Retry(NoBackoff(), 0),  # the pool itself sees a connection that broke since it was used last
    )
