"""Keeps a set of commands running through supervisord, and ends them in order.

`Supervisor` writes the configuration, starts supervisord as a child and reports what it does.
Run as a module, this file *is* supervisord, with two additions: on Linux it ends when its parent
does, and its children when it does, so that nothing is left over even after a SIGKILL; and it
holds a lock on its directory, by which an orphan is found.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from webapp.embedded.runtime import lock_file
from webapp.errors import ConfigurationError

_LOCK_FILE = "supervisor.lock"
_LOG_BYTES = 10_000_000
_LOG_COPIES = 3
_KILLED_AFTER_SECONDS = 2
_POLL_SECONDS = 0.2
_PR_SET_PDEATHSIG = 1

_SPAWNED = re.compile(r"spawned: '(?P<name>[^']+)' with pid (?P<pid>\d+)")
_ENDED = re.compile(r"(?:exited|stopped): (?P<name>\S+) \((?P<how>.*)\)")
_UNSTARTABLE = re.compile(r"spawnerr: (?P<how>(?!Exited too quickly).*)")


@dataclass(frozen=True)
class Program:
    """A command to be kept running; those of a lower `layer` start first and are stopped last."""

    name: str
    command: Sequence[str]
    layer: int
    stop_seconds: int
    steady_seconds: int = 5
    """Ending before that many seconds is a failed start: the next one waits a little longer each time."""


class Supervisor:
    """supervisord as a child of this process, with its programs.

    `report` is called with one line about each program that ended and is started again.
    """

    def __init__(self, directory: Path, programs: Sequence[Program], report: Callable[[str], None]) -> None:
        self._directory = directory.absolute()
        self._programs = list(programs)
        self._report = report
        self._process: subprocess.Popen[str] | None = None
        self._pids: dict[str, int] = {}
        self._stopping = False

    @property
    def log_directory(self) -> Path:
        """Where each program's output goes, into NAME.log."""
        return self._directory / "log"

    @property
    def pids(self) -> dict[str, int]:
        """Program name to process id, of those that run."""
        return dict(self._pids)

    def run(self) -> None:
        """Start everything and return when it has all been stopped; a supervisord that dies is started again.

        Raises:
            ConfigurationError: supervisord ended before it had started anything.
        """
        self.log_directory.mkdir(parents=True, exist_ok=True)
        while not self._stopping:
            self._process = process = self._launch()
            self._follow(process)
            self._after(process.wait())

    def stop(self) -> None:
        """Have everything end in order; `run` returns when it has. Safe in a signal handler."""
        self._stopping = True
        self._signal_supervisor(signal.SIGTERM)

    def kill(self) -> None:
        """Have everything end at once."""
        self._stopping = True
        self._signal_supervisor(signal.SIGKILL)  # first, or it would start them again
        self._kill_programs(signal.SIGKILL)

    def _after(self, returncode: int) -> None:
        if not self._stopping:
            if not self._pids:
                raise ConfigurationError(f"the supervisor did not start: {self._errors_file.read_text().strip()}")
            self._report(f"the supervisor ended ({_status(returncode)}): starting everything again")
            self._kill_programs(signal.SIGTERM)
            time.sleep(_KILLED_AFTER_SECONDS)
        self._kill_programs(signal.SIGKILL)

    @property
    def _errors_file(self) -> Path:
        return self.log_directory / "supervisord.err"

    def _launch(self) -> subprocess.Popen[str]:
        configuration = self._directory / "supervisord.conf"
        configuration.write_text(render(self._directory, self._programs), encoding="utf-8")
        command = [sys.executable, "-m", "webapp.embedded.supervisor", str(os.getpid()), "-n", "-c", str(configuration)]
        with self._errors_file.open("w") as errors:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                errors="replace",
                start_new_session=True,  # a Ctrl-C at the terminal is for us alone: we stop them in order
            )

    def _follow(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None  # noqa: S101
        if self._stopping:  # asked while it was being launched
            self._signal_supervisor(signal.SIGTERM)
        with process.stdout as lines:
            for line in lines:
                self._notice(line)

    def _notice(self, line: str) -> None:
        if found := _SPAWNED.search(line):
            self._pids[found["name"]] = int(found["pid"])
        elif found := _ENDED.search(line):
            self._pids.pop(found["name"], None)
            if not self._stopping:
                how = found["how"].removesuffix("; not expected").removesuffix("; expected")
                self._report(f"{found['name']} ended ({how}): starting it again; see {self.log_of(found['name'])}")
        elif found := _UNSTARTABLE.search(line):
            self._report(found["how"])

    def log_of(self, name: str) -> Path:
        """The file with a program's output."""
        return self.log_directory / f"{name}.log"

    def _signal_supervisor(self, number: signal.Signals) -> None:
        process = self._process
        if process is not None and process.poll() is None:
            process.send_signal(number)

    def _kill_programs(self, number: signal.Signals) -> None:
        """Signal each program's process group; nothing where supervisord has ended them."""
        for pid in list(self._pids.values()):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, number)


def render(directory: Path, programs: Sequence[Program]) -> str:
    """supervisord's configuration for these programs."""
    _, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    descriptors = 1024 if hard_limit == resource.RLIM_INFINITY else min(1024, hard_limit)
    sections = [
        "; Written by `sluicegate up` at each start.",
        "[supervisord]",
        f"logfile={_value(directory / 'log' / 'supervisord.log')}",
        f"logfile_maxbytes={_LOG_BYTES}",
        f"logfile_backups={_LOG_COPIES}",
        f"pidfile={_value(directory / 'supervisord.pid')}",
        f"minfds={descriptors}",
        "minprocs=1",
        "nocleanup=true",
    ]
    for layer in sorted({program.layer for program in programs}):
        members = [program for program in programs if program.layer == layer]
        names = ",".join(program.name for program in members)
        sections += [f"[group:layer{layer}]", f"programs={names}", f"priority={layer}"]
        for program in members:
            sections += _section(directory, program)
    return "\n".join(sections) + "\n"


def _section(directory: Path, program: Program) -> list[str]:
    return [
        f"[program:{program.name}]",
        f"command={_value(shlex.join(program.command))}",
        "autorestart=true",
        "startretries=1000000000",
        f"startsecs={program.steady_seconds}",
        "stopsignal=TERM",
        f"stopwaitsecs={program.stop_seconds}",
        # The master of several processes ends its own; the group is for a stop that must be enforced.
        "killasgroup=true",
        "redirect_stderr=true",
        # supervisord expands this value, and only this one, twice.
        f"stdout_logfile={_value(Path(_value(directory / 'log' / (program.name + '.log'))))}",
        f"stdout_logfile_maxbytes={_LOG_BYTES}",
        f"stdout_logfile_backups={_LOG_COPIES}",
    ]


def _value(raw: str | Path) -> str:
    """A value as supervisord reads it: `%` begins an expansion, and ` ;` or ` #` a comment.

    Raises:
        ConfigurationError: it holds something that cannot be written there.
    """
    text = str(raw)
    if "\n" in text or "\r" in text:
        raise ConfigurationError(f"cannot run from a path or with an argument that has a line break: {text!r}")
    if isinstance(raw, Path):
        if re.search(r"\s[;#]", text):
            raise ConfigurationError(f"the data directory's path may not have ' ;' or ' #' in it: {text}")
    else:  # shlex.join has put these between single quotes: close them and open them again
        text = text.replace(" ;", " '';").replace(" #", " ''#")
    return text.replace("%", "%%")


def _status(returncode: int) -> str:
    return f"signal {-returncode}" if returncode < 0 else f"exit status {returncode}"


def end_orphan(directory: Path, timeout_seconds: float = 12) -> bool:
    """End a supervisord that a killed `sluicegate up` left over; whether there was one."""
    deadline = time.monotonic() + timeout_seconds
    found = False
    while not _take_and_release(directory):
        pid = _holder(directory)
        if pid and (not found or time.monotonic() > deadline):
            number = signal.SIGTERM if not found else signal.SIGKILL
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        found = True
        time.sleep(0.1)
    return found


def _take_and_release(directory: Path) -> bool:
    file = lock_file(directory / _LOCK_FILE)
    if file is None:
        return False
    file.close()
    return True


def _holder(directory: Path) -> int:
    text = (directory / _LOCK_FILE).read_text().strip()
    return int(text) if text.isdigit() else 0


def end_with_parent(number: signal.Signals = signal.SIGTERM) -> None:
    """Have the kernel signal this process when its parent ends; Linux only, elsewhere nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)


def _poll_briefly(poll: Callable[[float], Any], timeout_seconds: float) -> Any:
    """supervisord looks for signals and ended children once a poll, which is too seldom for a quick stop."""
    return poll(min(timeout_seconds, _POLL_SECONDS))


def main() -> None:
    """Be supervisord: the parent's process id, its options, and last its configuration file, in its directory."""
    from supervisor import supervisord
    from supervisor.options import ServerOptions

    class Options(ServerOptions):
        def __init__(self) -> None:
            super().__init__()
            self.poller.poll = partial(_poll_briefly, self.poller.poll)

        def setpgrp(self) -> None:
            """Called in each child between fork and exec."""
            os.setpgrp()
            end_with_parent()

    end_with_parent()
    if os.getppid() != int(sys.argv[1]):  # it ended while we were starting
        sys.exit(1)
    lock = lock_file(Path(sys.argv[-1]).parent / _LOCK_FILE)
    if lock is None:
        sys.exit("another supervisor runs in this directory")
    print(os.getpid(), file=lock, flush=True)
    options = Options()
    options.realize(sys.argv[2:], doc=__doc__)
    options.first, options.test = True, False
    supervisord.go(options)


if __name__ == "__main__":
    main()
