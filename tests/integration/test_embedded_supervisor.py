"""What `sluicegate up` is built on: programs are started again, stopped in order, and never left over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from webapp.embedded.supervisor import Program, Supervisor, end_orphan

SLEEPER = "import time; time.sleep(600)"
# Does not end on SIGTERM, and says that it was asked.
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, lambda *_: None); [time.sleep(9) for _ in range(99)]"
# Writes its name at its end into the file that is its argument.
ORDERLY = """
import signal, sys, time
def end(*_):
    open(sys.argv[1], "a").write(sys.argv[2] + "\\n")
    sys.exit()
signal.signal(signal.SIGTERM, end)
time.sleep(600)
"""
PARENT = """
import sys
from pathlib import Path
from webapp.embedded.supervisor import Program, Supervisor
command = [sys.executable, "-c", "import time; time.sleep(600)"]
Supervisor(Path(sys.argv[1]), [Program("sleeper", command, 1, 2)], print).run()
"""


class Running:
    """A supervisor whose `run` is in a thread."""

    def __init__(self, directory: Path, programs: list[Program]) -> None:
        self.reports: list[str] = []
        self.supervisor = Supervisor(directory, programs, self.reports.append)
        self.thread = threading.Thread(target=self.supervisor.run)
        self.thread.start()
        await_true(lambda: len(self.supervisor.pids) == len(programs))

    def stop(self) -> float:
        """Stop everything; how long it took, in seconds."""
        began = time.monotonic()
        self.supervisor.stop()
        self.thread.join(20)
        assert not self.thread.is_alive()
        return time.monotonic() - began


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    started: list[Running] = []

    def _start(*programs: Program) -> Running:
        started.append(Running(tmp_path, list(programs)))
        return started[-1]

    yield _start
    for running in started:
        running.supervisor.kill()
        running.thread.join(20)


def program(name: str, code: str, *arguments: str, layer: int = 1, stop_seconds: int = 2) -> Program:
    return Program(name, [sys.executable, "-c", code, *arguments], layer, stop_seconds, steady_seconds=1)


def await_true(condition: Callable[[], bool], timeout_seconds: float = 15) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, "did not come true in time"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_killed_program_is_started_again_and_that_is_reported(start: Callable[..., Running]) -> None:
    running = start(program("sleeper", SLEEPER))
    first = running.supervisor.pids["sleeper"]
    os.kill(first, signal.SIGKILL)
    await_true(lambda: running.supervisor.pids.get("sleeper", first) != first)
    assert running.reports[0].startswith("sleeper ended (terminated by SIGKILL): starting it again")


def test_a_killed_supervisor_is_started_again_with_its_programs(start: Callable[..., Running], tmp_path: Path) -> None:
    running = start(program("sleeper", SLEEPER))
    first = running.supervisor.pids["sleeper"]
    os.kill(int((tmp_path / "supervisor.lock").read_text()), signal.SIGKILL)
    await_true(lambda: running.supervisor.pids.get("sleeper", first) != first)
    assert not alive(first)


def test_the_lowest_layer_is_stopped_last(start: Callable[..., Running], tmp_path: Path) -> None:
    order, script = tmp_path / "order", tmp_path / "orderly.py"
    script.write_text(ORDERLY)
    running = start(
        Program("database", [sys.executable, str(script), str(order), "database"], layer=1, stop_seconds=2),
        Program("worker", [sys.executable, str(script), str(order), "worker"], layer=2, stop_seconds=2),
    )
    time.sleep(0.5)  # until they have their handlers
    running.stop()
    assert order.read_text().split() == ["worker", "database"]


def test_a_program_that_does_not_end_is_killed_in_time(start: Callable[..., Running]) -> None:
    running = start(program("stubborn", STUBBORN, layer=2), program("sleeper", SLEEPER))
    pids = running.supervisor.pids.values()
    time.sleep(0.5)
    assert 2 <= running.stop() < 4
    assert not any(alive(pid) for pid in pids)
    assert running.reports == []


def test_killing_ends_everything_at_once(start: Callable[..., Running]) -> None:
    running = start(program("stubborn", STUBBORN))
    pids = running.supervisor.pids.values()
    running.supervisor.kill()
    running.thread.join(5)
    assert not running.thread.is_alive()
    await_true(lambda: not any(alive(pid) for pid in pids))


@pytest.mark.parametrize("word", ["100 %", "a ;b", "a #c", "it's", 'say "so"', "%(ENV_HOME)s"])
def test_an_argument_arrives_as_it_was_given(start: Callable[..., Running], tmp_path: Path, word: str) -> None:
    running = start(program("echo", "import sys, time; print(sys.argv[1], flush=True); time.sleep(600)", word))
    log = running.supervisor.log_of("echo")
    await_true(lambda: log.exists() and log.read_text().endswith("\n"))
    assert log.read_text() == word + "\n"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's end")
@pytest.mark.parametrize("with_supervisor", [False, True])
def test_nothing_is_left_after_the_parent_was_killed(tmp_path: Path, with_supervisor: bool) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], stdout=subprocess.DEVNULL)
    lock = tmp_path / "supervisor.lock"
    try:
        await_true(lambda: lock.exists() and lock.read_text().strip() != "")
        supervisor = int(lock.read_text())
        await_true(lambda: children_of(supervisor) != [])
        pids = [supervisor, *children_of(supervisor)]
    finally:
        parent.kill()
        parent.wait()
    with suppress(ProcessLookupError):
        if with_supervisor:
            os.kill(supervisor, signal.SIGKILL)
    await_true(lambda: not any(alive(pid) for pid in pids))


def test_an_orphan_is_ended_before_the_next_start(tmp_path: Path) -> None:
    # A supervisor whose lock is held, and that nobody is the parent of.
    code = "import sys, time; from pathlib import Path; from webapp.embedded.runtime import lock_file\n"
    code += "lock = lock_file(Path(sys.argv[1])); print(__import__('os').getpid(), file=lock, flush=True)\n"
    code += "time.sleep(600)"
    orphan = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "supervisor.lock")])
    try:
        lock = tmp_path / "supervisor.lock"
        await_true(lambda: lock.exists() and lock.read_text().strip() != "")
        assert end_orphan(tmp_path)
        assert orphan.wait(5) == -signal.SIGTERM
        assert not end_orphan(tmp_path)
    finally:
        orphan.kill()
        orphan.wait()


def children_of(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in children.read_text().split()]
