"""What a chaos run is going to do: every stream, reader, stop and fault, drawn from the seed before it begins.

Nothing here looks at the system or at a clock, so one seed is one schedule. What the machine makes of it, which
greenlet runs first and how many tokens are out when a signal arrives, is not repeated by it.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

FIRST_SECONDS: Final = 0.06
"""Between the first streams of two slots."""
FAST_PACE: Final = 50.0
STOPPED_SHARE: Final = 0.65
EARLY_STOP_SHARE: Final = 0.12
"""Of the stopped ones: in their first second, so that queued and loading streams are stopped too."""
UNWATCHED_SHARE: Final = 0.1
"""That nobody reads from the beginning."""
FAILING_SHARE: Final = 0.03
"""Whose model fails by itself."""

FAULTS: Final = {
    "worker SIGKILL": 2,
    "worker SIGTERM": 2,
    "worker SIGQUIT": 1,
    "worker SIGSTOP beyond its lease": 1,
    "web SIGKILL": 3,
    "web SIGTERM": 3,
    "web SIGSTOP": 1,
    "beat SIGKILL": 2,
    "reaper SIGKILL": 2,
    "Valkey SIGKILL": 2,
    "Valkey SIGKILL and emptied": 2,
    "Valkey FLUSHALL": 1,
    "Valkey SIGSTOP": 1,
    "PostgreSQL SIGKILL": 2,
    "PostgreSQL fast shutdown": 1,
    "PostgreSQL SIGSTOP": 2,
    "upstream SIGKILL": 1,
    "upstream SIGSTOP": 1,
}
"""Every kind, and how often it comes in one long round."""


@dataclass(frozen=True)
class Load:
    """What the streams of a run are like."""

    slots: int
    """Streams at once."""
    life_seconds: tuple[float, float]
    """How long a stream's model speaks, at least and at most, unless it is stopped."""
    paces: tuple[float, float]
    """Tokens a second of most models, at least and at most."""
    fast_share: float
    """Of models that say so much that a stop is sure to meet a token on its way."""


@dataclass(frozen=True)
class ReaderPlan:
    """One reader: when it comes (seconds after the message was accepted), when it is cut off, when it leaves."""

    arrives_seconds: float
    drops_seconds: tuple[float, ...] = ()
    leaves_seconds: float | None = None
    """None: it stays until `done`."""


@dataclass(frozen=True)
class StreamPlan:
    """One message, its answer's script, its readers, and who stops it when."""

    slot: int
    ordinal: int
    model: str
    pause_seconds: float
    """After the slot's former stream has ended."""
    as_response: bool
    """Whether the answer to the POST is the first reader's stream."""
    readers: tuple[ReaderPlan, ...]
    stop_seconds: float | None
    stoppers: int

    @property
    def name(self) -> str:
        return f"{self.slot}.{self.ordinal}"


@dataclass(frozen=True)
class FaultPlan:
    """One fault: what, on which of those that there are, for how long, and how long after the last is over."""

    number: int
    kind: str
    target: int
    seconds: float
    rest_seconds: float


def streams(seed: int, slot: int, load: Load) -> Iterator[StreamPlan]:
    """The streams of one slot, one after another, without end."""
    draw = random.Random(f"{seed}/stream/{slot}")
    # Not all at once at the beginning: a system at its limit is another bench's matter.
    yield _stream(draw, slot, 0, load, slot * FIRST_SECONDS)
    for ordinal in itertools.count(1):
        yield _stream(draw, slot, ordinal, load, draw.uniform(0, 1.5))


def _stream(draw: random.Random, slot: int, ordinal: int, load: Load, pause_seconds: float) -> StreamPlan:
    seconds = draw.uniform(*load.life_seconds)
    model = _model(draw, f"{slot}.{ordinal}", seconds, load)
    stop = None
    if draw.random() < STOPPED_SHARE:
        stop = draw.uniform(0, 1) if draw.random() < EARLY_STOP_SHARE else draw.uniform(0.5, seconds)
    return StreamPlan(
        slot,
        ordinal,
        model,
        pause_seconds=pause_seconds,
        as_response=draw.random() < 0.3,
        readers=tuple(_readers(draw, seconds)),
        stop_seconds=stop,
        stoppers=draw.choice((1, 1, 1, 2, 3)),
    )


def _model(draw: random.Random, name: str, seconds: float, load: Load) -> str:
    """A script of the tests' upstream that lasts about so long."""
    pace = FAST_PACE if draw.random() < load.fast_share else round(draw.uniform(*load.paces), 1)
    tokens = max(5, round(seconds * pace))
    words = [f"name=c{name}", f"pace={pace}", f"tokens={tokens}"]
    if draw.random() < 0.5:
        words.append("alphabet=mixed")
    if draw.random() < 0.2:
        words.append(f"thinking={draw.randint(2, 12)}")
    if draw.random() < 0.2:
        words.append(f"load_seconds={draw.uniform(0.2, 1.0):.1f}")
    if draw.random() < FAILING_SHARE:
        words.append(f"{draw.choice(('reset_at', 'close_at', 'error_at'))}={draw.randrange(1, tokens)}")
    return ",".join(words)


def _readers(draw: random.Random, seconds: float) -> Iterator[ReaderPlan]:
    if draw.random() >= UNWATCHED_SHARE:
        drops = tuple(sorted(draw.uniform(0, seconds) for _ in range(draw.choice((0, 0, 1, 2)))))
        yield ReaderPlan(0.0, drops)
    while draw.random() < 0.3:
        arrives = draw.uniform(0, seconds)
        yield ReaderPlan(arrives, leaves_seconds=draw.choice((None, draw.uniform(0.5, seconds))))


def faults(
    seed: int,
    lease_seconds: float,
    rest_seconds: tuple[float, float],
    stop_seconds: tuple[float, float],
    *,
    once: bool,
) -> Iterator[FaultPlan]:
    """The faults, one after another, without end: rounds of every kind, each in an order of its own.

    `rest_seconds`: between two; `stop_seconds`: that a process is stopped for; `once`: each kind once a round.
    """
    draw = random.Random(f"{seed}/faults")
    number = 0
    while True:
        kinds = [kind for kind, often in FAULTS.items() for _ in range(1 if once else often)]
        draw.shuffle(kinds)
        for kind in kinds:
            number += 1
            seconds = draw.uniform(*stop_seconds) + (lease_seconds if "lease" in kind else 0)
            yield FaultPlan(number, kind, draw.randrange(1_000), seconds, draw.uniform(*rest_seconds))
