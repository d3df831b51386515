"""`sluicegate up` as a person runs it: an empty directory, one command, one line with a link, and a clean end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from tests.terminal import CTRL_C, Terminal, without_colours
from webapp.config import Settings
from webapp.embedded.runtime import free_port, read_environment

PROGRAM = Path(sys.executable).with_name("sluicegate")
START_SECONDS = 90
pytestmark = pytest.mark.timeout(300)
STOP_SECONDS = 10
READY = re.compile(r"Sluicegate is ready: (?P<url>http\S+/sign-in\?token=(?P<token>[\w.-]{20,}))")


class Up:
    """One `sluicegate up` with a data directory of its own."""

    def __init__(self, directory: Path, port: int, *, at_a_terminal: bool = False) -> None:
        self.directory = directory
        self.port = port
        self.base = f"http://127.0.0.1:{port}"
        ours = {Settings.variable_of(name) for name in Settings.model_fields}
        self.environment = without_colours({name: value for name, value in os.environ.items() if name not in ours})
        self.output, self.errors = directory / "stdout", directory / "stderr"
        command = [PROGRAM, "up", "--port", str(port), "--data-dir", str(directory / "data")]
        if at_a_terminal:
            self.terminal = Terminal(command, self.environment, directory=directory, columns=200)
            self.process = self.terminal.process
            return
        with self.output.open("w") as output, self.errors.open("w") as errors:
            self.process = subprocess.Popen(command, cwd=directory, env=self.environment, stdout=output, stderr=errors)

    def await_ready(self) -> re.Match[str]:
        """The last line, once there is one that says ready."""
        wait_until(lambda: "is ready" in self.output.read_text() or self.process.poll() is not None, START_SECONDS)
        found = READY.match(self.output.read_text().splitlines()[-1])
        assert found, self.output.read_text() + self.errors.read_text()
        return found

    def run(self, *arguments: str) -> str:
        """The output of a command given in another terminal."""
        command = [PROGRAM, *arguments]
        environment = self.environment | {"SLUICEGATE_DATA_DIR": str(self.directory / "data")}
        done = subprocess.run(command, cwd=self.directory, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def children(self) -> dict[str, int]:
        """Program to process id, as the supervisor last reported them."""
        log = (self.directory / "data" / "log" / "supervisord.log").read_text()
        return {name: int(pid) for name, pid in re.findall(r"spawned: '(\w+)' with pid (\d+)", log)}

    def processes(self) -> list[str]:
        """All processes that were started for this data directory and live."""
        return [" ".join(command) for command in map(self._command, psutil.process_iter()) if command]

    def _command(self, process: psutil.Process) -> list[str]:
        try:
            mine = process.environ().get("SLUICEGATE_DATA_DIR") == str(self.directory / "data")
            return process.cmdline() if mine and process.status() != psutil.STATUS_ZOMBIE else []
        except psutil.Error:
            return []

    def end(self, number: signal.Signals = signal.SIGTERM) -> float:
        """Stop it; the seconds that took."""
        began = time.monotonic()
        self.process.send_signal(number)
        self.process.wait(60)
        return time.monotonic() - began


def wait_until(condition: Callable[[], Any], timeout_seconds: float) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, "did not come true in time"
        time.sleep(0.1)


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Up]:
    started = Up(tmp_path, free_port())
    yield started
    if started.process.poll() is None:
        started.process.terminate()
        try:
            started.process.wait(30)
        finally:
            started.process.kill()


def test_a_day_in_its_life(up: Up) -> None:
    ready = up.await_ready()
    assert up.output.read_text().splitlines()[-1].split()[-1] == ready["token"]
    assert requests.get(f"{up.base}/readyz", timeout=5).status_code == 200
    _a_user_can_use_it(up)
    _a_second_one_is_refused(up)
    assert all(line.startswith("ok") for line in up.run("doctor").splitlines())
    _what_dies_is_started_again(up)
    _it_stops_at_once_and_leaves_nothing(up)


def _a_user_can_use_it(up: Up) -> None:
    token = up.run("users", "create", "alice").split()[-1]
    headers = {"Authorization": f"Bearer {token}", "Accept": "application/json"}
    started = requests.post(f"{up.base}/api/stream-message", json={"content": "Hello"}, headers=headers, timeout=10)
    assert started.status_code == 202
    session_id = started.json()["sessionId"]
    listed = json.loads(up.run("streams", "list", "--active", "--json"))
    assert [item["sessionId"] for item in listed] == [session_id]
    assert f"{session_id} stopped" in up.run("streams", "stop", session_id)
    assert up.run("streams", "list", "--active") == ""


def _a_second_one_is_refused(up: Up) -> None:
    second = Up(up.directory, free_port())
    assert second.process.wait(20) == 1
    assert "runs already" in second.errors.read_text()
    assert up.process.poll() is None


def _what_dies_is_started_again(up: Up) -> None:
    before = up.children()
    assert {"valkey", "demo", "web", "worker", "reaper", "beat", "flower"} <= set(before)
    for name in ("worker", "valkey", "web"):
        os.kill(before[name], signal.SIGKILL)
    wait_until(lambda: all(up.children()[name] != before[name] for name in ("worker", "valkey", "web")), 20)
    wait_until(lambda: _ready(up), 60)
    wait_until(lambda: "worker runs again\n" in up.errors.read_text(), 20)
    said = up.errors.read_text()
    log = up.directory / "data" / "log" / "worker.log"
    assert said.count(f"worker ended (terminated by SIGKILL): starting it again; see {log}\n") == 1
    assert "\x1b" not in said + up.output.read_text()


def _ready(up: Up) -> bool:
    try:
        return requests.get(f"{up.base}/readyz", timeout=5).status_code == 200
    except requests.RequestException:
        return False


def _it_stops_at_once_and_leaves_nothing(up: Up) -> None:
    assert len(up.processes()) > 5
    assert read_environment(up.directory / "data" / "embedded.env")["REDIS_URL"]
    assert up.end() < STOP_SECONDS
    assert up.process.returncode == 0
    assert up.processes() == []
    assert not (up.directory / "data" / "embedded.env").exists()


def test_a_stop_before_it_is_ready_is_as_clean(up: Up) -> None:
    wait_until(lambda: "Starting" in up.output.read_text(), START_SECONDS)
    assert up.end(signal.SIGINT) < STOP_SECONDS
    assert up.process.returncode == 0
    assert up.processes() == []


def test_after_a_kill_nothing_is_left_and_it_starts_again(up: Up, tmp_path: Path) -> None:
    up.await_ready()
    up.process.kill()
    up.process.wait()
    again = Up(tmp_path, up.port, at_a_terminal=True)
    with again.terminal:
        again.terminal.wait_for("one-time sign-in token of owner: ", START_SECONDS)
        assert len([command for command in again.processes() if "demo_model" in command]) == 1
        began = time.monotonic()
        again.terminal.type(CTRL_C)
        assert again.terminal.end() == 0
        assert time.monotonic() - began < STOP_SECONDS
    assert again.processes() == []
    _it_was_told_well(again.terminal.said)


def _it_was_told_well(said: str) -> None:
    """At a terminal: in colours, with what is waited for on a line that is written over."""
    assert "Waiting for web (0 s)" in said
    lines = [line.rpartition("\x1b[K")[2] for line in said.strip().split("\n")]
    labels = [found[1] for line in lines if (found := re.match(r"\x1b\[1m(\w+):\x1b\[0m +\S", line))]
    assert labels == ["Data", "Redis", "Model", "Database", "Starting", "Logs", "Started", "Page", "API", "Flower"]
    ready, *rest = lines[-3:]
    assert ready.startswith("\x1b[32m\x1b[1mSluicegate is ready:\x1b[0m http")
    assert re.search(r": [\w.-]{20,}$", ready)
    assert rest[0] == "Stopping"
    stopped = re.fullmatch(r"Stopped after (\d\.\d) s", rest[1])
    assert stopped
    assert float(stopped[1]) > 0
