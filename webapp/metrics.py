"""All figures for Prometheus, in one place, and the small functions by which the rest of the code counts.

Names have their unit; labels have few values, all of them ours: an enum's members or names in the code, never what a
client chooses (a model, a user). `share` has the processes of one host add up what they count; without it, as in a
command or a test, a process counts for itself.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import structlog
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    disable_created_metrics,
    start_http_server,
    values,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import choose_encoder

from webapp.metric_files import MetricFiles

log = structlog.get_logger(__name__)

COUNT_SECONDS: Final = 2.0
"""That a scrape waits for the database."""
PORT_RETRY_SECONDS: Final = 15.0

_STOP: Final = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.125, 0.25, 0.5, 1, 2, 4, 8, 16)
_WAIT: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_FLUSH: Final = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.125, 0.25, 0.5, 1, 2)
_PASS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_OPERATIONS: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500)
_CHARACTERS: Final = (0, 4, 16, 64, 256, 1024, 4096, 16_384, 65_536, 262_144)


@dataclass(frozen=True, slots=True)
class Timings:
    """Of a stop: how long each step took, in seconds; None where it was not taken."""

    request_to_fence_seconds: float | None = None
    fence_to_upstream_closed_seconds: float | None = None
    request_to_commit_seconds: float | None = None


class _Instruments:
    """Everything that is counted. Made once a process."""

    def __init__(self, registry: CollectorRegistry | None) -> None:
        def counter(name: str, meaning: str, *labels: str) -> Counter:
            return Counter(f"sluicegate_{name}", meaning, labels, registry=registry)

        def gauge(name: str, meaning: str) -> Gauge:
            return Gauge(f"sluicegate_{name}", meaning, registry=registry, multiprocess_mode="livesum")

        def histogram(name: str, meaning: str, buckets: Iterable[float]) -> Histogram:
            return Histogram(f"sluicegate_{name}", meaning, registry=registry, buckets=tuple(buckets))

        self.started = counter("streams_started_total", "Streams that were accepted.")
        self.ended = counter("streams_ended_total", "Streams that ended.", "status", "reason", "phase")
        self.partial_length = histogram(
            "partial_length_characters", "Content of streams that did not end as COMPLETED.", _CHARACTERS
        )
        self.stop_to_fence = histogram("stop_request_to_fence_seconds", "From a stop to its fence.", _STOP)
        self.stop_to_closed = histogram(
            "stop_fence_to_upstream_closed_seconds", "From a stop's fence until the upstream was closed.", _STOP
        )
        self.stop_to_commit = histogram("stop_request_to_commit_seconds", "From a stop to its commit.", _STOP)
        self.queue = histogram("queue_seconds", "From the acceptance of a stream to its first claim.", _WAIT)
        self.first_token = histogram("first_token_seconds", "From asking a model to its first text.", _WAIT)
        self.chunks = counter("streamed_chunks_total", "Pieces of text that upstreams sent.")
        self.characters = counter("streamed_characters_total", "Code points that upstreams sent.")
        self.tokens = counter("tokens_total", "Tokens as upstreams count them at an answer's own end.", "kind")
        self.readers = gauge("readers", "Readers that are being sent a stream.")
        self.worker_streams = gauge("worker_streams", "Streams that workers run.")
        self.flush_operations = histogram("flush_operations", "Operations that one flush wrote.", _OPERATIONS)
        self.flush_characters = histogram("flush_characters", "Code points that one flush wrote.", _CHARACTERS)
        self.flush_seconds = histogram("flush_seconds", "Until Redis had answered a flush.", _FLUSH)
        self.reaped = counter("reaper_handled_total", "What passes of the reaper saw to.", "step")
        self.reaper_pass = histogram("reaper_pass_seconds", "One pass of the reaper.", _PASS)


class _Chunks:
    """What arrived since the last flush: there are too many chunks to go to the shared files with each."""

    count = 0
    characters = 0


_registry: Final = CollectorRegistry()
_making: Final = threading.RLock()
_directory: Path | None = None


def share(directory: Path) -> None:
    """Count together with the other processes of this host, in files in `directory`.

    To be called before anything is counted. Where the directory cannot be used the process counts for itself, and
    says so.
    """
    global _directory
    _directory = directory


@cache
def _files() -> MetricFiles | None:
    try:
        return MetricFiles(_directory) if _directory else None
    except OSError as error:
        log.error("metrics.not_shared", directory=str(_directory), error=repr(error))
        return None


@cache
def _made() -> _Instruments:
    disable_created_metrics()  # a second series for each, which shared files do not have either
    files = _files()
    if files is None:
        return _Instruments(_registry)
    # prometheus_client looks at the environment when it is first imported, and somebody's plug-in may have done that
    # before us; so it is told here, where the instruments are made.
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(files.directory)
    values.ValueClass = values.MultiProcessValue(files.identity)
    return _Instruments(None)


def _instruments() -> _Instruments:
    with _making:  # two threads may be the first
        return _made()


# -- counting ----------------------------------------------------------------------------------------


def stream_started() -> None:
    """A stream was accepted."""
    _instruments().started.inc()


def stream_claimed(queued_seconds: float) -> None:
    """A worker has taken a stream for the first time."""
    _instruments().queue.observe(max(0.0, queued_seconds))


def stream_ended(*, status: str, reason: str, phase: str, partial_length: int | None, timings: Timings) -> None:
    """A stream's ending was committed. `partial_length`: the code points of an answer that is not complete."""
    made = _instruments()
    made.ended.labels(status, reason, phase).inc()
    if partial_length is not None:
        made.partial_length.observe(partial_length)
    _observe(made.stop_to_fence, timings.request_to_fence_seconds)
    _observe(made.stop_to_closed, timings.fence_to_upstream_closed_seconds)
    _observe(made.stop_to_commit, timings.request_to_commit_seconds)


def _observe(histogram: Histogram, seconds: float | None) -> None:
    if seconds is not None:
        histogram.observe(max(0.0, seconds))  # two clocks may disagree, Redis's and the host's


def tokens_counted(stats: Mapping[str, Any]) -> None:
    """An upstream has told how many tokens it read and wrote (Ollama's `prompt_eval_count` and `eval_count`)."""
    for kind, name in (("prompt", "prompt_eval_count"), ("answer", "eval_count")):
        count = stats.get(name)
        if isinstance(count, int | float) and count > 0:
            _instruments().tokens.labels(kind).inc(count)


def chunk_arrived(characters: int) -> None:
    """An upstream sent a piece of text. Counted with the next flush."""
    _Chunks.count += 1
    _Chunks.characters += characters


def first_token(seconds: float) -> None:
    """A model's first text came so long after it was asked."""
    _instruments().first_token.observe(seconds)


def flushed(operations: int, characters: int, seconds: float) -> None:
    """A flush was written to Redis."""
    made = _instruments()
    made.flush_operations.observe(operations)
    made.flush_characters.observe(characters)
    made.flush_seconds.observe(seconds)
    chunks, arrived, _Chunks.count, _Chunks.characters = _Chunks.count, _Chunks.characters, 0, 0
    made.chunks.inc(chunks)
    made.characters.inc(arrived)


def reaped(handled: Mapping[str, int], seconds: float) -> None:
    """A pass of the reaper is over."""
    made = _instruments()
    made.reaper_pass.observe(seconds)
    for step, count in handled.items():
        made.reaped.labels(step).inc(count)


@contextmanager
def reading() -> Iterator[None]:
    """Somebody is being sent a stream."""
    with _instruments().readers.track_inprogress():
        yield


@contextmanager
def running() -> Iterator[None]:
    """A worker runs a stream."""
    with _instruments().worker_streams.track_inprogress():
        yield


# -- telling -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reading:
    """Some of the figures of this host, as they stand."""

    chunks: int
    characters: int
    readers: int
    first_token_upper_bounds_seconds: tuple[float, ...]
    first_token_counts: tuple[int, ...]
    """One for each bound, of what is above the bound before it; one more for what is above all of them."""


class Exposition:
    """What `/metrics` tells: the figures of this host, and how many streams there are in the database."""

    def __init__(self, count_streams: Callable[[], tuple[int, int]]) -> None:
        """`count_streams`: how many are active, and how many of those no worker has."""
        self.registry = CollectorRegistry()
        self.registry.register(_Figures())
        self.registry.register(_Population(count_streams))

    def render(self, accept: str) -> tuple[bytes, str]:
        """The text and its content type, which is OpenMetrics for those who ask for it.

        Raises:
            Unavailable: the figures of this host cannot be read now.
        """
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type

    def read(self) -> Reading:
        """What the operations page shows of the figures; the database is not asked.

        Raises:
            Unavailable: as for `render`.
        """
        samples = [sample for family in _Figures().collect() for sample in family.samples]
        total = {sample.name: int(sample.value) for sample in samples if not sample.labels}
        at_most = sorted(
            (float(sample.labels["le"]), int(sample.value))
            for sample in samples
            if sample.name == "sluicegate_first_token_seconds_bucket"
        )
        return Reading(
            chunks=total.get("sluicegate_streamed_chunks_total", 0),
            characters=total.get("sluicegate_streamed_characters_total", 0),
            readers=total.get("sluicegate_readers", 0),
            first_token_upper_bounds_seconds=tuple(bound for bound, _ in at_most[:-1]),
            first_token_counts=tuple(
                count - before for (_, count), (_, before) in zip(at_most, [(0.0, 0), *at_most], strict=False)
            ),
        )

    def serve(self, host: str, port: int) -> None:
        """Serve the same at a port of its own, from a thread. One that is taken is tried again: where several
        workers run on one host, one of them answers for all, and another takes its place."""
        threading.Thread(target=self._serve, args=(host, port), name="metrics", daemon=True).start()

    def _serve(self, host: str, port: int) -> None:
        said = False
        while True:
            try:
                start_http_server(port, host, self.registry)
                return
            except OSError as error:
                if not said:
                    log.error("metrics.port_unusable", host=host, port=port, error=repr(error))
                said = True
            time.sleep(PORT_RETRY_SECONDS)


class _Figures:
    """What the processes of this host have counted."""

    def collect(self) -> Iterable[Metric]:
        _instruments()
        files = _files()
        return _registry.collect() if files is None else files.collect()


class _Population:
    """How many streams there are; left out where the database does not say so in time."""

    def __init__(self, count_streams: Callable[[], tuple[int, int]]) -> None:
        self._count_streams = count_streams
        self._asking = threading.Lock()

    def collect(self) -> Iterable[Metric]:
        counts = self._counts()
        if counts is not None:
            active, queued = counts
            yield GaugeMetricFamily("sluicegate_active_streams", "Streams that have not ended.", active)
            yield GaugeMetricFamily("sluicegate_queued_streams", "Streams that no worker has claimed.", queued)

    def _counts(self) -> tuple[int, int] | None:
        """Asked in a thread, for a database that is down may be silent for long; one question at a time."""
        if not self._asking.acquire(blocking=False):
            return None
        answer: list[tuple[int, int]] = []
        thread = threading.Thread(target=self._ask, args=(answer,), name="metrics.count", daemon=True)
        thread.start()
        thread.join(COUNT_SECONDS)
        return answer[0] if answer else None

    def _ask(self, answer: list[tuple[int, int]]) -> None:
        try:
            answer.append(self._count_streams())
        except Exception as error:
            log.warning("metrics.without_database", error=type(error).__name__)
        finally:
            self._asking.release()
