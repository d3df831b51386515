"""StreamHub: the one reader of token logs in a process, and its many followers.

One blocking XREAD over all followed logs; each entry is decoded and encoded once and handed to every
follower. A follower that falls behind is let go: it reads the log by itself, at its own pace, and comes
back; what is held for it is bounded. Threads and greenlets serve alike: under gevent the primitives
used here are patched.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from enum import Enum, auto
from typing import Any, Final, NamedTuple
from uuid import UUID, uuid4

import redis
import structlog
from redis.exceptions import RedisError

from webapp.errors import Unavailable
from webapp.streams.events import DONE_SEQ, START, LogEntry, Position
from webapp.streams.keys import log_key, viewers_key, wake_key
from webapp.streams.log import TokenLog

log = structlog.get_logger(__name__)

BLOCK_MS: Final = 1000
"""Shorter than the client's socket time-out, or an idle read would be taken for a broken one."""
READ_ENTRIES: Final = 1000
RETRY_SECONDS: Final = 0.25
REST_SECONDS_PER_LOG: Final = 20e-6
"""A read asks for each log that is followed, whether anything is in it or not: so long the hub then rests for each of
them, and finds more in the next."""
REST_LIMIT_SECONDS: Final = 0.01
REST_LEAST_SECONDS: Final = 0.001
"""Up to which it does not rest at all: with fewer than some 50 logs, waiting costs more than it saves."""
LOST_CHECK_SECONDS: Final = 1.0
"""Between two questions to the database while Redis cannot be read: only it tells readers of endings then."""
REPORT_PAUSE_SECONDS: Final = 0.1
VIEWERS_FRESH_SECONDS: Final = 15
VIEWERS_TTL_SECONDS: Final = 30
WAKE_TTL_SECONDS: Final = 60


class Delivery(NamedTuple):
    """An entry, and its server-sent event."""

    entry: LogEntry
    encoded: bytes


class Signal(Enum):
    """What a subscription gives besides entries."""

    BEHIND = auto()
    """Entries were dropped because the follower was slow, or Redis can be read again: read the log."""
    ENDED = auto()
    """The database says that the session has ended: read the rest there."""
    CLOSED = auto()
    """The process stops, or the reader has gone."""


class Subscription:
    """One follower's entries, in order, from the position at which it was attached."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._held_bytes = 0
        self._items: deque[Delivery] = deque()
        self._signal: Signal | None = None
        self._ready = threading.Event()

    def put(self, delivery: Delivery) -> None:
        """Hold an entry; over the limit all that is held is dropped and the follower is BEHIND."""
        if self._signal is Signal.BEHIND:
            return
        self._held_bytes += len(delivery.encoded)
        if self._held_bytes > self._limit_bytes:
            self._items.clear()
            self.signal(Signal.BEHIND)
        else:
            self._items.append(delivery)
            self._ready.set()

    def signal(self, signal: Signal) -> None:
        """Tell the follower; CLOSED is final."""
        if self._signal is not Signal.CLOSED:
            self._signal = signal
        self._ready.set()

    def take(self, timeout_seconds: float) -> tuple[list[Delivery], Signal | None]:
        """All that is held, and a signal if one stands; waits for either, at most so long."""
        if not self._items and self._signal is None:
            self._ready.wait(timeout_seconds)
        self._ready.clear()
        items: list[Delivery] = []
        with suppress(IndexError):  # one by one, for another thread may put at any point
            while True:
                items.append(self._items.popleft())
        self._held_bytes = 0
        return items, self._signal


class _Channel:
    """One log that is followed."""

    def __init__(self, session_id: UUID, last: Position) -> None:
        self.session_id = session_id
        self.last = last
        self.subscriptions: list[Subscription] = []
        self.heard_at = time.monotonic()


class StreamHub:
    """Follows logs for the readers of one process. Start it once; `close` lets every reader go."""

    def __init__(
        self,
        client: redis.Redis,
        token_log: TokenLog,
        *,
        buffer_bytes: int,
        check_seconds: float,
        ended_among: Callable[[Sequence[UUID]], Iterable[UUID]],
        report_seconds: float = 5.0,
    ) -> None:
        """`buffer_bytes`: held for one slow reader. `check_seconds`: silence after which the database is asked,
        through `ended_among`, which of the silent sessions have ended. `report_seconds`: between two reports of
        who is watching, where nobody comes or goes."""
        self._redis = client
        self._reader: redis.Redis | None = None
        self._log = token_log
        self._buffer_bytes = buffer_bytes
        self._check_seconds = check_seconds
        self._ended_among = ended_among
        self._report_seconds = report_seconds
        self.watched: Callable[[Sequence[UUID]], None] = lambda session_ids: None
        """Told at each report which sessions, of those that end when nobody watches, are being watched."""
        self._channels: dict[UUID, _Channel] = {}
        self._by_key: dict[bytes, _Channel] = {}
        self._waiting: dict[Subscription, UUID] = {}
        self._id = uuid4().hex
        self._wake_last = "0-0"
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._watching: Counter[UUID] = Counter()
        self._abandonable: set[UUID] = set()
        self._changed: set[UUID] = set()
        """Where somebody has come or gone since the last report."""
        self._report_all_at = 0.0
        self._report_due = threading.Event()
        self._check_due = threading.Event()
        self._trouble: set[str] = set()
        self._lost_at = 0.0
        self._started = False
        self._closed = threading.Event()
        self.healthy = True
        """Whether the last read reached Redis."""

    # -- followers -----------------------------------------------------------------------------

    def arrive(self, session_id: UUID, *, abandonable: bool) -> None:
        """Somebody watches a session from now on; `abandonable`: whether it ends when nobody does."""
        self._start()
        with self._lock:
            self._watching[session_id] += 1
            self._changed.add(session_id)
            if abandonable:
                self._abandonable.add(session_id)
        self._report_due.set()

    def leave(self, session_id: UUID) -> None:
        """One of those who watched a session has gone."""
        with self._lock:
            self._watching[session_id] -= 1
            if not self._watching[session_id]:
                del self._watching[session_id]
            self._changed.add(session_id)
        self._report_due.set()

    def attach(self, session_id: UUID, last: Position) -> tuple[Subscription, Position]:
        """Begin to receive a session's entries.

        Returns the subscription, and the position after which it delivers: what lies between `last` and that
        the caller reads from the log.
        """
        self._start()
        subscription = Subscription(self._buffer_bytes)
        with self._lock:
            channel = self._channels.get(session_id)
            fresh = channel is None
            if channel is None:
                channel = self._channels[session_id] = _Channel(session_id, last)
                self._by_key[log_key(session_id).encode()] = channel
            channel.subscriptions.append(subscription)
            begins = channel.last
        if self._closed.is_set():
            subscription.signal(Signal.CLOSED)
        elif fresh:
            self._wake()
        return subscription, begins

    def detach(self, session_id: UUID, subscription: Subscription) -> None:
        """Stop receiving; the log is not read any more once nobody follows it."""
        with self._lock:
            channel = self._channels.get(session_id)
            if channel is None or subscription not in channel.subscriptions:
                return
            channel.subscriptions.remove(subscription)
            if not channel.subscriptions:
                del self._channels[session_id]
                del self._by_key[log_key(session_id).encode()]

    def wait_for_redis(self, session_id: UUID) -> Subscription:
        """Begin to wait: BEHIND once Redis can be read again, or ENDED, where the database says so before.

        One process asks for all who wait: none of them needs to try by itself.
        """
        self._start()
        subscription = Subscription(0)
        with self._lock:
            self._waiting[subscription] = session_id
        if self._closed.is_set():
            subscription.signal(Signal.CLOSED)
        return subscription

    def wait_no_longer(self, subscription: Subscription) -> None:
        """What was begun with `wait_for_redis` is over."""
        with self._lock:
            self._waiting.pop(subscription, None)

    def wait_done(self, session_id: UUID, timeout_seconds: float) -> bool:
        """Block until a session's `done` is in its log; False where it does not come in time."""
        deadline = time.monotonic() + timeout_seconds
        last = self._log.last_position(session_id) or START
        if last.seq == DONE_SEQ:
            return True
        subscription, begins = self.attach(session_id, last)
        try:
            # Where others have followed it beyond that already, what lies between is not delivered.
            if begins > last and (self._log.last_position(session_id) or START).seq == DONE_SEQ:
                return True
            while (left := deadline - time.monotonic()) > 0:
                items, signal = subscription.take(left)
                if signal is Signal.CLOSED:
                    return self._log.wait_done(session_id, left)  # the process stops, and its hub already has
                if any(item.entry.position.seq == DONE_SEQ for item in items) or signal is Signal.ENDED:
                    return True
                if signal is Signal.BEHIND:
                    return False
            return False
        finally:
            self.detach(session_id, subscription)

    def close(self) -> None:
        """Let every reader go, so that the process can stop; they come back to another with their cursors."""
        self._closed.set()
        self._report_due.set()
        self._check_due.set()
        with self._lock:
            subscriptions = [*self._waiting, *(one for each in self._channels.values() for one in each.subscriptions)]
        for subscription in subscriptions:
            subscription.signal(Signal.CLOSED)

    @property
    def alive(self) -> bool:
        """Whether the loops run that serve every reader; they are started with the first one."""
        return all(thread.is_alive() for thread in self._threads)

    @property
    def followed(self) -> int:
        """How many logs are followed."""
        return len(self._channels)

    def viewers(self, session_ids: Sequence[UUID]) -> list[int]:
        """How many readers all web processes together report for each session."""
        pipe = self._redis.pipeline(transaction=False)
        for session_id in session_ids:
            pipe.hvals(viewers_key(session_id))
        oldest = time.time() - VIEWERS_FRESH_SECONDS
        return [sum(_count(report, oldest) for report in reports) for reports in pipe.execute()]

    # -- the loops -------------------------------------------------------------------------

    def _start(self) -> None:
        with self._lock:
            if self._started:
                return
            self._started = True
        loops = (
            ("hub.read", self._read_once),
            ("hub.check", self._check_once),
            ("hub.report", self._report_once),
        )
        for name, step in loops:
            self._threads.append(threading.Thread(target=self._forever, args=(name, step), name=name, daemon=True))
            self._threads[-1].start()

    def _forever(self, name: str, step: Callable[[], None]) -> None:
        """These loops serve every reader: an error ends a step, never the loop."""
        while not self._closed.is_set():
            try:
                step()
                self._trouble.discard(name)
            except (RedisError, Unavailable) as error:
                if name not in self._trouble:  # once, and not with every try
                    lost = "hub.redis_lost" if isinstance(error, RedisError) else "hub.database_lost"
                    log.warning(lost, loop=name, error=repr(error))
                self._trouble.add(name)
                time.sleep(RETRY_SECONDS)
            except Exception:
                log.exception("hub.step_failed", loop=name)
                time.sleep(RETRY_SECONDS)

    def _wake(self) -> None:
        """End the hub's blocking read, so that it looks at its channels again."""
        if not self.healthy:
            return  # it does not read, and looks when it does again
        try:
            pipe = self._redis.pipeline()
            pipe.xadd(wake_key(self._id), {"w": "1"}, maxlen=1)
            pipe.expire(wake_key(self._id), WAKE_TTL_SECONDS)
            pipe.execute()
        except RedisError:
            log.debug("hub.wake_failed")  # the read ends by itself after BLOCK_MS, and says so where Redis is lost

    def _read_once(self) -> None:
        wake = wake_key(self._id)
        with self._lock:
            asked = dict(self._by_key)
            streams: dict[Any, Any] = {key: str(channel.last) for key, channel in asked.items()}
        streams[wake] = self._wake_last
        try:
            # By a connection of its own, which the pool would look at before each read.
            self._reader = self._reader or redis.Redis(
                connection_pool=self._redis.connection_pool, single_connection_client=True
            )
            answer: Any = self._reader.xread(streams, count=READ_ENTRIES, block=BLOCK_MS)
        except RedisError:
            self._reader = None
            self._lose()
            raise
        self._find()
        for key, entries in answer or ():
            if key == wake.encode():
                self._wake_last = entries[-1][0].decode()
            elif (channel := self._by_key.get(key)) is asked[key] and channel is not None:
                self._deliver(channel, entries)  # one that was made anew meanwhile begins elsewhere
        rest_seconds = min(len(asked) * REST_SECONDS_PER_LOG, REST_LIMIT_SECONDS)
        if rest_seconds > REST_LEAST_SECONDS:
            time.sleep(rest_seconds)

    def _lose(self) -> None:
        if self.healthy:
            self.healthy, self._lost_at = False, time.monotonic()
            self._check_due.set()

    def _find(self) -> None:
        """Redis can be read again: say so to all who wait for that, and see at once what has ended meanwhile."""
        if not self.healthy:
            self.healthy = True
            log.info("hub.redis_found", lost_seconds=round(time.monotonic() - self._lost_at, 1))
            with self._lock:
                waiting = list(self._waiting)
            for subscription in waiting:
                subscription.signal(Signal.BEHIND)
            self._check_due.set()

    def _deliver(self, channel: _Channel, entries: Sequence[Any]) -> None:
        channel.heard_at = time.monotonic()
        deliveries = [one for entry_id, fields in entries if (one := _decode(channel.session_id, entry_id, fields))]
        with self._lock:  # a follower that attaches now begins after these
            channel.last = Position.parse(entries[-1][0].decode())
            subscriptions = list(channel.subscriptions)
        for subscription in subscriptions:
            for delivery in deliveries:
                subscription.put(delivery)

    def _check_once(self) -> None:
        """Ask the database about streams that are silent or cannot be read."""
        check_seconds = self._check_seconds if self.healthy else min(self._check_seconds, LOST_CHECK_SECONDS)
        all_of_them = self._check_due.wait(check_seconds) or not self.healthy
        self._check_due.clear()
        if self._closed.is_set():
            return
        since = time.monotonic() - self._check_seconds
        asked: dict[UUID, list[Subscription]] = {}
        with self._lock:
            for subscription, session_id in self._waiting.items():
                asked.setdefault(session_id, []).append(subscription)
            for channel in self._channels.values():
                if all_of_them or channel.heard_at < since:
                    asked.setdefault(channel.session_id, []).extend(channel.subscriptions)
        for session_id in self._ended_among(list(asked)) if asked else ():
            for subscription in asked[session_id]:
                subscription.signal(Signal.ENDED)

    def _report_once(self) -> None:
        """Say who is watching: a session as soon as somebody comes to it or leaves it, and all again and again."""
        self._report_due.wait(max(0.0, self._report_all_at - time.monotonic()))
        self._report_due.clear()
        everything = time.monotonic() >= self._report_all_at
        with self._lock:
            abandonable = list(self._abandonable) if everything else [*(self._abandonable & self._changed)]
            changed, self._changed = self._changed, set()
            viewers = {one: self._watching[one] for one in (self._watching.keys() | changed if everything else changed)}
            # Told once more, though: the grace begins when the last has gone.
            self._abandonable -= {one for one, count in viewers.items() if not count}
        if everything:
            self._report_all_at = time.monotonic() + self._report_seconds
        try:
            self._report_viewers(viewers)
        except RedisError:
            with self._lock:
                self._changed |= changed
            raise
        finally:  # neither waits for the other: who ends what nobody watches asks both
            if abandonable:
                self.watched(abandonable)
        time.sleep(REPORT_PAUSE_SECONDS)  # whoever comes and goes in the meantime is reported together

    def _report_viewers(self, viewers: dict[UUID, int]) -> None:
        if not viewers:
            return
        pipe = self._redis.pipeline()  # whole, or a key might stay without a TTL
        for session_id, count in viewers.items():
            key = viewers_key(session_id)
            if count:
                pipe.hset(key, self._id, f"{count}:{time.time():.0f}")
                pipe.expire(key, VIEWERS_TTL_SECONDS)
            else:
                pipe.hdel(key, self._id)
        pipe.execute()


def _decode(session_id: UUID, entry_id: bytes, fields: dict[bytes, bytes]) -> Delivery | None:
    """None for what this version cannot read: the other streams of the same answer must not wait for it."""
    try:
        entry = LogEntry.from_redis(entry_id, fields)
        return Delivery(entry, entry.encode())
    except (KeyError, ValueError):
        log.exception("hub.entry_unreadable", session_id=str(session_id), entry_id=entry_id.decode())
        return None


def _count(report: bytes, oldest: float) -> int:
    count, _, reported_at = report.partition(b":")
    return int(count) if float(reported_at) >= oldest else 0
