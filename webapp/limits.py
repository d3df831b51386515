"""How often a user may send a message, and an address may try to sign in.

The counters are in Redis, one for all web processes. While Redis is away each process counts for itself, in memory:
the limits are then laxer, and nothing else changes. A window begins with the first hit and ends as long after as the
rate says.
"""

from __future__ import annotations

import ipaddress
import math
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Final, TypeVar

import redis
import structlog
from limits import RateLimitItem, parse_many
from limits.storage import MemoryStorage, RedisStorage
from limits.strategies import FixedWindowRateLimiter

from webapp.errors import TooManyRequests
from webapp.streams.keys import LIMIT_PREFIX
from webapp.views import UserView

log = structlog.get_logger(__name__)

REDIS_RETRY_SECONDS: Final = 5.0
"""How long Redis is not asked again after it has failed."""
_IPV6_HOME_BITS: Final = 64
"""What one customer of a provider has; whoever is limited could choose any address in it."""

T = TypeVar("T")
_Who = tuple[str, str]


class Limits:
    """The rates of one application: notations such as `120/minute` or `10/second;120/minute`; empty: no limit."""

    def __init__(self, client: redis.Redis, *, messages: str, sign_ins: str) -> None:
        """`client` must be quick to give up: a caller waits for it once in `REDIS_RETRY_SECONDS`."""
        self._redis = client
        self._messages = parse_many(messages) if messages else []
        self._sign_ins = parse_many(sign_ins) if sign_ins else []
        storage = RedisStorage("redis://", connection_pool=client.connection_pool, key_prefix=LIMIT_PREFIX)
        self._shared = FixedWindowRateLimiter(storage)
        self._away_until = 0.0

    def hit_messages(self, user: UserView) -> None:
        """Count a new message of a user.

        Raises:
            TooManyRequests: it is one too many; it was not counted.
        """
        wait_seconds = self._hit(self._messages, ("messages", str(user.id)))
        if wait_seconds:
            raise TooManyRequests(
                f"You have sent as many messages as you may for now; try again in {wait_seconds} s",
                retry_after_seconds=wait_seconds,
            )

    def hit_sign_in(self, address: str) -> None:
        """Count a try to sign in, before it is looked at, so that no number of tries at one moment gets past.

        Raises:
            TooManyRequests: it is one too many; it was not counted, and must not be looked at.
        """
        wait_seconds = self._hit(self._sign_ins, ("sign-ins", home_of(address)))
        if wait_seconds:
            raise TooManyRequests(
                f"There were too many tries to sign in from your address; try again in {wait_seconds} s",
                retry_after_seconds=wait_seconds,
            )

    def forgive_sign_in(self, address: str) -> None:
        """The try that was counted last was good: only those that fail are held against an address."""
        who = ("sign-ins", home_of(address))

        def give_back(counter: FixedWindowRateLimiter) -> None:
            for rate in self._sign_ins:
                counter.storage.incr(rate.key_for(*who), rate.get_expiry(), amount=-1)

        if self._sign_ins:
            self._ask(give_back)

    def _hit(self, rates: Sequence[RateLimitItem], who: _Who) -> int:
        """Whole seconds until there is room again; 0: there was, and it was taken."""
        return self._ask(lambda counter: _take(counter, rates, who)) if rates else 0

    def _ask(self, question: Callable[[FixedWindowRateLimiter], T]) -> T:
        """Ask Redis, or the memory of this process where Redis cannot be asked."""
        moment = time.monotonic()
        if moment >= self._away_until:
            if self._away_until:
                self._away_until = moment + REDIS_RETRY_SECONDS  # this one finds out, and no other waits meanwhile
            try:
                answer = question(self._shared)
            except redis.RedisError as error:
                self._away_until = time.monotonic() + REDIS_RETRY_SECONDS
                log.warning("limits.counted_in_memory", error=type(error).__name__)
            else:
                self._away_until = 0.0
                return answer
        return question(self._own)

    @cached_property
    def _own(self) -> FixedWindowRateLimiter:
        # Made when it is needed: it has a timer.
        return FixedWindowRateLimiter(MemoryStorage())


def _take(counter: FixedWindowRateLimiter, rates: Sequence[RateLimitItem], who: _Who) -> int:
    """Take one of each rate, or of none where one of them is used up. Returns as `_hit`."""
    full = [rate for rate in rates if not counter.test(rate, *who)]
    full = full or [rate for rate in rates if not counter.hit(rate, *who)]
    return max((_wait_seconds(counter, rate, who) for rate in full), default=0)


def _wait_seconds(counter: FixedWindowRateLimiter, rate: RateLimitItem, who: _Who) -> int:
    left_seconds = counter.get_window_stats(rate, *who).reset_time - time.time()
    return max(1, math.ceil(left_seconds + 0.5))  # Redis tells a TTL rounded to the next second, up or down


def home_of(address: str) -> str:
    """What is counted as one: an IPv4 address, or the /64 of an IPv6 address; anything else as it is."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return address
    if parsed.ipv4_mapped:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network((parsed.packed, _IPV6_HOME_BITS), strict=False))
