"""The figures: their names, what they are told in, and how processes of one host add them up."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from prometheus_client import Metric

from tests.figures import Figures, Moved
from tests.services import HOST, ROOT, clean_environment, free_port, wait_until
from webapp import metric_files, metrics
from webapp.errors import Unavailable
from webapp.metric_files import MetricFiles
from webapp.metrics import Exposition, Timings

LABELS = {"status", "reason", "phase", "step", "kind"}
UNITS = ("_seconds", "_characters", "_operations")
COUNTED = ("_total", "_streams", "_readers")
"""What is counted is named after what it counts, and has no unit."""


def count_everything() -> None:
    metrics.stream_started()
    metrics.stream_claimed(0.5)
    metrics.chunk_arrived(3)
    metrics.first_token(0.25)
    metrics.flushed(2, 3, 0.001)
    metrics.stream_ended(
        status="TERMINATED", reason="user", phase="GENERATING", partial_length=7, timings=Timings(0.004, 0.002, 0.010)
    )
    metrics.tokens_counted({"prompt_eval_count": 5, "eval_count": 9, "eval_duration": 1})
    metrics.reaped({"lost": 1}, 0.02)
    with metrics.reading(), metrics.running():
        pass


def told(exposition: Exposition | None = None) -> Figures:
    return Figures.parse((exposition or Exposition(lambda: (3, 1))).render("")[0].decode())


class TestNames:
    @pytest.fixture
    def families(self) -> list[Metric]:
        count_everything()
        return list(told().families.values())

    def test_names_have_units(self, families: list[Metric]) -> None:
        assert len(families) == 20
        for family in families:
            assert family.name.startswith("sluicegate_")
            assert re.fullmatch(r"[a-z_]+", family.name)
            assert family.documentation.endswith("."), family.name
            name = f"{family.name}_total" if family.type == "counter" else family.name
            expected = UNITS if family.type == "histogram" else COUNTED
            assert name.endswith(expected), name
            assert family.type == "counter" or not name.endswith("_total")
            assert family.type in ("counter", "gauge", "histogram")

    def test_labels_are_few_and_ours(self, families: list[Metric]) -> None:
        used = {label for family in families for sample in family.samples for label in sample.labels}
        assert used == LABELS | {"le"}

    def test_each_is_documented_and_no_other(self, families: list[Metric]) -> None:
        text = (ROOT / "docs" / "observability.md").read_text(encoding="utf-8")
        documented = re.findall(r"^\| `(sluicegate_\w+)` \| (\w+) \| ([^|]*)\|", text, re.MULTILINE)
        expected = {
            f"{family.name}_total" if family.type == "counter" else family.name: (
                family.type,
                {label for sample in family.samples for label in sample.labels} - {"le"},
            )
            for family in families
        }
        assert {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in documented} == expected


class TestCounting:
    """In one process, without `share`."""

    def test_an_ending(self) -> None:
        before = told()
        count_everything()
        moved = Moved(before, told())
        assert moved.by("sluicegate_streams_ended_total", status="TERMINATED", reason="user", phase="GENERATING") == 1
        assert moved.by("sluicegate_partial_length_characters_sum") == 7
        assert moved.by("sluicegate_stop_request_to_fence_seconds_sum") == pytest.approx(0.004)
        assert moved.by("sluicegate_stop_fence_to_upstream_closed_seconds_sum") == pytest.approx(0.002)
        assert moved.by("sluicegate_stop_request_to_commit_seconds_sum") == pytest.approx(0.010)
        assert moved.by("sluicegate_stop_request_to_commit_seconds_bucket", le="0.008") == 0
        assert moved.by("sluicegate_stop_request_to_commit_seconds_bucket", le="0.016") == 1
        assert (moved.by("sluicegate_tokens_total", kind="prompt"), moved.by("sluicegate_tokens_total")) == (5, 14)
        assert moved.by("sluicegate_streamed_chunks_total") == 1
        assert moved.by("sluicegate_streamed_characters_total") == 3

    def test_one_that_was_not_stopped_has_no_timings_and_a_complete_one_no_partial(self) -> None:
        before = told()
        metrics.stream_ended(
            status="COMPLETED", reason="stop", phase="GENERATING", partial_length=None, timings=Timings()
        )
        moved = Moved(before, told())
        assert moved.by("sluicegate_streams_ended_total") == 1
        assert moved.by("sluicegate_partial_length_characters_count") == 0
        assert moved.by("sluicegate_stop_request_to_commit_seconds_count") == 0

    def test_clocks_that_disagree_count_as_no_time(self) -> None:
        before = told()
        metrics.stream_ended(
            status="TERMINATED", reason="user", phase="QUEUED", partial_length=0, timings=Timings(-0.5, None, 1)
        )
        assert Moved(before, told()).by("sluicegate_stop_request_to_fence_seconds_sum") == 0

    def test_figures_of_an_upstream_are_not_trusted(self) -> None:
        before = told()
        metrics.tokens_counted({"prompt_eval_count": -5, "eval_count": "many"})
        assert Moved(before, told()).by("sluicegate_tokens_total") == 0

    def test_a_gauge_falls_also_after_an_error(self) -> None:
        def read() -> None:
            with metrics.reading():
                assert told().sum("sluicegate_readers") == 1
                raise KeyError

        with pytest.raises(KeyError):
            read()
        assert told().sum("sluicegate_readers") == 0


class TestTelling:
    @pytest.mark.parametrize(
        ("accept", "content_type"),
        [
            ("", "text/plain; version=0.0.4; charset=utf-8"),
            ("text/html, */*", "text/plain; version=0.0.4; charset=utf-8"),
            ("application/openmetrics-text; version=1.0.0", "application/openmetrics-text; version=1.0.0"),
        ],
    )
    def test_in_the_form_that_was_asked_for(self, accept: str, content_type: str) -> None:
        text, said = Exposition(lambda: (3, 1)).render(accept)
        assert said.startswith(content_type)
        assert text.endswith(b"# EOF\n") == said.startswith("application/openmetrics-text")

    def test_how_many_streams_there_are(self) -> None:
        figures = told(Exposition(lambda: (3, 1)))
        assert (figures.sum("sluicegate_active_streams"), figures.sum("sluicegate_queued_streams")) == (3, 1)

    def test_a_database_that_is_down_is_left_out(self) -> None:
        def count() -> tuple[int, int]:
            raise Unavailable("The database cannot be reached")

        figures = told(Exposition(count))
        assert not figures.has("sluicegate_active_streams")
        assert figures.has("sluicegate_streams_started_total")

    def test_a_database_that_is_silent_is_not_waited_for_nor_asked_twice(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(metrics, "COUNT_SECONDS", 0.1)
        asked, speak = [], threading.Event()

        def count() -> tuple[int, int]:
            asked.append(1)
            speak.wait(10)
            return 3, 1

        exposition = Exposition(count)
        began = time.monotonic()
        for _ in range(3):
            assert not told(exposition).has("sluicegate_active_streams")
        assert time.monotonic() - began < 1
        assert len(asked) == 1
        speak.set()
        wait_until(lambda: told(exposition).has("sluicegate_active_streams"), 2)

    def test_a_port_that_is_taken_is_tried_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(metrics, "PORT_RETRY_SECONDS", 0.05)
        port, servers = free_port(), []
        start = metrics.start_http_server
        monkeypatch.setattr(metrics, "start_http_server", lambda *args: servers.append(start(*args)) or servers[-1])
        for _ in range(2):
            Exposition(lambda: (3, 1)).serve(HOST, port)
        wait_until(lambda: servers, 5)
        assert Figures.scrape(f"http://{HOST}:{port}").sum("sluicegate_active_streams") == 3
        time.sleep(0.2)
        (first,) = servers
        first[0].shutdown()
        first[0].server_close()
        wait_until(lambda: len(servers) == 2, 5)
        ask = lambda: requests.get(f"http://{HOST}:{port}/metrics", timeout=5, proxies={"http": ""})  # noqa: E731
        assert wait_until(ask, 5, ignoring=(requests.ConnectionError,)).ok
        servers[1][0].shutdown()
        servers[1][0].server_close()


# Prometheus_client is imported before anything else, as a plug-in of Celery's does.
COUNTING = """
import prometheus_client, sys, os, pathlib
from webapp import metrics
metrics.share(pathlib.Path(sys.argv[1]))
metrics.stream_started()
metrics.first_token(0.3)
def wait(word):
    print(word, flush=True)
    return sys.stdin.readline()
"""


class Process:
    """A process that shares its figures."""

    def __init__(self, directory: Path, script: str) -> None:
        self._popen = subprocess.Popen(
            [sys.executable, "-c", COUNTING + script, str(directory)],
            cwd=ROOT,
            env=clean_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def hear(self, word: str, after: str = "") -> None:
        assert self._popen.stdout is not None
        assert not after or after in self._popen.stdout.readline()
        assert self._popen.stdout.readline().strip() == word

    def go_on(self) -> None:
        assert self._popen.stdin is not None
        self._popen.stdin.write("\n")
        self._popen.stdin.flush()

    def kill(self) -> None:
        self._popen.kill()
        self._popen.communicate()


Begin = Callable[[str], Process]


class TestFiles:
    @pytest.fixture
    def directory(self, tmp_path: Path) -> Path:
        return tmp_path / "metrics"

    @pytest.fixture
    def begin(self, directory: Path) -> Iterator[Begin]:
        begun: list[Process] = []

        def make(script: str) -> Process:
            begun.append(Process(directory, script))
            begun[-1].hear("ready")
            return begun[-1]

        yield make
        for process in begun:
            process.kill()

    def test_processes_are_added_up(self, directory: Path, begin: Begin) -> None:
        for _ in range(2):
            begin("with metrics.reading(): wait('ready')")
        found = summed(directory)
        assert found["sluicegate_streams_started_total"] == 2
        assert found["sluicegate_first_token_seconds_count"] == 2
        assert found["sluicegate_first_token_seconds_sum"] == pytest.approx(0.6)
        assert found["sluicegate_readers"] == 2

    def test_the_dead_leave_their_counters_and_nothing_else(self, directory: Path, begin: Begin) -> None:
        alive = begin("with metrics.reading(): wait('ready')")
        for _ in range(3):
            begin("with metrics.reading(): wait('ready')").kill()
            found = summed(directory)
        assert found["sluicegate_streams_started_total"] == 4
        assert found["sluicegate_first_token_seconds_count"] == 4
        assert found["sluicegate_readers"] == 1
        assert len(list(directory.glob("*.db"))) == 8  # three of each living one, ours too, and two for all the dead
        alive.kill()
        for _ in range(2):
            found = summed(directory)
        assert (found["sluicegate_streams_started_total"], found.get("sluicegate_readers", 0)) == (4, 0)

    def test_they_do_so_before_anybody_reads(self, directory: Path, begin: Begin) -> None:
        for _ in range(3):
            begin("with metrics.reading(): wait('ready')").kill()
        begin("wait('ready')")
        found = summed(directory)
        assert (found["sluicegate_streams_started_total"], found["sluicegate_readers"]) == (4, 0)

    def test_a_fork_counts_for_itself(self, directory: Path, begin: Begin) -> None:
        """And its parent's death is not its own, although it has the parent's lock."""
        script = """
child = os.fork()
if not child:
    metrics.stream_started()
    with metrics.reading():
        wait('ready')
        metrics.stream_started()
        wait('more')
        os._exit(0)
os.waitpid(child, 0)
wait('gone')
"""
        process = begin(script)
        found = summed(directory)
        assert (found["sluicegate_streams_started_total"], found["sluicegate_readers"]) == (2, 1)
        process.go_on()
        process.hear("more")
        process.go_on()
        process.hear("gone")
        found = summed(directory)
        assert (found["sluicegate_streams_started_total"], found["sluicegate_readers"]) == (3, 0)

    def test_a_file_that_a_crash_has_broken_is_left_out(self, directory: Path, begin: Begin) -> None:
        begin("wait('ready')").kill()
        (broken,) = directory.glob("counter_*.db")
        broken.write_bytes(broken.read_bytes()[:8] + bytes(4088))
        begin("wait('ready')")
        found = summed(directory)
        assert found["sluicegate_streams_started_total"] == 1
        assert found["sluicegate_first_token_seconds_count"] == 2

    def test_two_who_read_at_once_count_nothing_twice(self, directory: Path, begin: Begin) -> None:
        begin("wait('ready')")
        seen: list[float] = []
        for _ in range(4):
            begin("wait('ready')").kill()
            readers = [MetricFiles(directory) for _ in range(4)]
            threads = [
                threading.Thread(
                    target=lambda files: seen.append(figures(files)["sluicegate_streams_started_total"]), args=(files,)
                )
                for files in readers
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert seen == [2] * 4 + [3] * 4 + [4] * 4 + [5] * 4

    def test_one_who_stopped_reading_in_the_middle_keeps_nobody_waiting_for_ever(
        self, directory: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(metric_files, "LOCK_WAIT_SECONDS", 0.1)
        files = MetricFiles(directory)
        with files._alone(), pytest.raises(Unavailable):
            MetricFiles(directory).collect()
        assert list(files.collect()) == []

    def test_where_nothing_can_be_written_a_process_counts_for_itself(self, tmp_path: Path) -> None:
        directory = tmp_path / "taken"
        directory.write_text("")
        process = Process(directory, "wait('ready')")
        process.hear("ready", after="metrics.not_shared")
        process.kill()
        assert directory.read_text() == ""


def summed(directory: Path) -> dict[str, float]:
    """Name to value of all samples without labels, as another process reads them."""
    return figures(MetricFiles(directory))


def figures(files: Any) -> dict[str, float]:
    return {sample.name: sample.value for metric in files.collect() for sample in metric.samples if not sample.labels}
