"""The whole system as local processes, and pytest-celery's nodes over them.

pytest-celery drives containers. Here a "container" is a process: `ProcessContainer` has a container's face, so that
`celery_setup.worker.kill()`, `wait_for_log()` and the like work where there is no Docker, and so that a suite with
Docker can put its own `*_cluster` fixtures in place of ours.

`Stack` starts the lines of the Procfile, each with a log of its own; `Client` and `Reader` are the API's user.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import shlex
import shutil
import signal as signals
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import celery
import psutil
import requests
from celery import Celery
from celery.utils.nodenames import host_format, nodename, nodesplit
from pytest_celery import CeleryTestBroker, CeleryTestContainer, CeleryTestNode, CeleryTestWorker

from tests.services import (
    HOST,
    ROOT,
    LocalProcess,
    ProcessFailed,
    ValkeyServer,
    WaitTimeout,
    clean_environment,
    free_port,
    wait_until,
)

COMMAND_TIMEOUT_SECONDS = 60.0
READ_TIMEOUT_SECONDS = 30.0


# Containers and nodes


class ProcessContainer(CeleryTestContainer):
    """A local process with the face that pytest-celery expects of a container.

    Nothing of the base class is used but its name, for a cluster takes nothing else.
    """

    def __init__(self, process: LocalProcess, *, identity: str | None = None) -> None:
        """`identity` stands for Docker's container id, whose first 12 characters are the host's name."""
        self.process = process
        self._identity = identity or uuid.uuid4().hex[:12]

    @property
    def id(self) -> str:
        return self._identity

    @property
    def name(self) -> str:
        return self.process.name

    @property
    def status(self) -> str:
        """Docker's words: `created`, `running`, `exited`."""
        if self.process.running:
            return "running"
        return "created" if self.process.returncode is None else "exited"

    @property
    def attrs(self) -> dict[str, Any]:
        return {"Config": {"Hostname": self.id, "Env": [f"{k}={v}" for k, v in self.env.items()]}}

    @property
    def env(self) -> dict[str, str]:
        return self.process.environment

    @property
    def ready_prompt(self) -> str | None:
        return self.process.ready_prompt

    def logs(self) -> str:
        """Everything since the first start, as Docker keeps it over restarts."""
        return self.process.log()

    def ready(self) -> bool:
        """Wait until the process is ready; raises where it ends instead."""
        self.process.await_ready()
        return True

    def kill(self, signal: str | int | None = None) -> None:
        """Signal the process; SIGKILL takes its children too, and is waited for, as with a container."""
        number = signal_number(signal or signals.SIGKILL)
        if number == signals.SIGKILL:
            self.process.kill()
        else:
            self.process.send_signal(number)

    def restart(self, timeout: float = 10) -> None:
        """Stop the process, with `timeout` seconds of grace, start it anew, and wait until it is ready."""
        self.process.restart(timeout)

    def stop(self, timeout: float = 10) -> None:
        self.process.stop(timeout)

    def pause(self) -> None:
        self.process.pause()

    def unpause(self) -> None:
        self.process.resume()

    def reload(self) -> None:
        """Nothing is cached."""

    def exec_run(self, command: str | Sequence[str]) -> tuple[int, bytes]:
        """Run a command in the process's directory and environment: its exit code, and what it printed."""
        words = shlex.split(command) if isinstance(command, str) else list(command)
        done = subprocess.run(
            words, env=self.env, cwd=self.process.directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        return done.returncode, done.stdout

    def teardown(self) -> None:
        """End the process, whatever state it is in."""
        if self.process.running:
            self.process.stop(timeout_seconds=5)


def signal_number(signal: str | int) -> int:
    """`"SIGTERM"`, `"TERM"` or 15, as Docker takes them."""
    if isinstance(signal, int):
        return signal
    name = signal.upper()
    return signals.Signals[name if name.startswith("SIG") else f"SIG{name}"].value


class ValkeyContainer(ProcessContainer):
    """A Valkey that is Celery's broker."""

    def __init__(self, server: ValkeyServer) -> None:
        super().__init__(server)
        self.server = server

    @property
    def celeryconfig(self) -> dict[str, Any]:
        return {
            "url": self.server.url,
            "host_url": self.server.url,
            "hostname": HOST,
            "port": self.server.port,
            "vhost": "0",
        }


class WorkerContainer(ProcessContainer):
    """A worker process; its Celery node name is `NAME@IDENTITY`, as a container's is `NAME@HOSTNAME`."""

    def __init__(self, process: LocalProcess, *, identity: str, queue: str = "") -> None:
        super().__init__(process, identity=identity)
        self._queue = queue

    def worker_name(self) -> str:
        return self.name

    def worker_queue(self) -> str:
        return self._queue

    def log_level(self) -> str:
        return self.env.get("SLUICEGATE_LOG_LEVEL", "INFO")

    def version(self) -> str:
        return str(celery.__version__)


class _QuickLogs(CeleryTestNode):
    """pytest-celery looks at logs once a second, and finds what a former run of a node said; this does neither."""

    container: ProcessContainer

    def wait_for_log(self, log: str, message: str = "", timeout: float = 60) -> None:
        """Wait until the node has said `log` since its last start."""
        wait_until(lambda: log in self.container.process.log_since_start(), timeout, message or f"{self.name()}: {log}")

    def assert_log_exists(self, log: str, message: str = "", timeout: float = 60) -> None:
        self.wait_for_log(log, message, timeout)

    def assert_log_does_not_exist(self, log: str, message: str = "", timeout: float = 0.5) -> None:
        try:
            self.wait_for_log(log, message, timeout)
        except WaitTimeout:
            return
        raise AssertionError(f"{self.name()} logged {log!r}")

    def pause(self) -> None:
        """Freeze the node."""
        self.container.pause()

    def unpause(self) -> None:
        """Let it go on."""
        self.container.unpause()


class BrokerNode(_QuickLogs, CeleryTestBroker):
    """The broker, in a test that uses `celery_setup`."""


class WorkerNode(_QuickLogs, CeleryTestWorker):
    """A worker, in a test that uses `celery_setup`."""

    def get_running_processes_info(
        self, columns: list[str] | None = None, filters: dict[str, str] | None = None
    ) -> list[dict[str, Any]]:
        """The worker's own processes, looked at from here; the original runs a module inside of the container."""
        if not self.container.process.running:
            return []
        process = psutil.Process(self.container.process.pid)
        rows = [one.as_dict(columns) for one in (process, *process.children(recursive=True))]
        return [row for row in rows if all(row.get(key) == value for key, value in (filters or {}).items())]


# The Procfile


def read_procfile(root: Path = ROOT) -> dict[str, str]:
    """Name to command line, as written."""
    lines = (line.strip() for line in (root / "Procfile").read_text().splitlines())
    pairs = (line.partition(":") for line in lines if line and not line.startswith("#"))
    return {name.strip(): command.strip() for name, _, command in pairs}


def procfile_command(name: str, environment: Mapping[str, str], root: Path = ROOT) -> tuple[list[str], dict[str, str]]:
    """A line as words, with its variables put in, and the assignments that stand before the command.

    A program named by a path that is not there (`.venv/bin/celery`, in another virtualenv) is looked for on the PATH.

    Raises:
        ProcessFailed: the Procfile has no such line.
    """
    lines = read_procfile(root)
    if name not in lines:
        raise ProcessFailed(f"the Procfile has no line {name!r}, only {', '.join(lines)}")
    words = [_with_variables(word, environment) for word in shlex.split(lines[name])]
    assignments = {}
    while words and re.match(r"[A-Za-z_]\w*=", words[0]):
        variable, _, value = words.pop(0).partition("=")
        assignments[variable] = value
    if words[0] == "exec":
        words.pop(0)
    if "/" in words[0] and not (root / words[0]).exists():
        words[0] = os.path.basename(words[0])
    return words, assignments


def _with_variables(word: str, environment: Mapping[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        return environment.get(match["plain"] or match["braced"]) or match["default"] or ""

    return re.sub(r"\$(?:(?P<plain>\w+)|\{(?P<braced>\w+)(?::-(?P<default>[^}]*))?\})", value, word)


# The system


class Stack:
    """The product's processes over one database, one Valkey and one upstream.

    Any number of web processes and workers may be started; the first web process is the one that `client()` speaks to.
    """

    def __init__(
        self,
        directory: Path,
        *,
        database_url: str,
        valkey: ValkeyServer,
        upstream_url: str,
        settings: Mapping[str, str] | None = None,
        services: Sequence[LocalProcess] = (),
        tokens: Mapping[str, str] | None = None,
        root: Path = ROOT,
    ) -> None:
        """`directory` takes logs and data; `settings` are environment variables over the stack's own; `services` are
        more processes, besides Valkey, that `heal` brings back; `tokens` are those of the users that the database has.
        """
        self.directory = directory
        self.root = root
        self.valkey = valkey
        self.services = list(services)
        self.webs: list[LocalProcess] = []
        self.workers: list[WorkerNode] = []
        self.others: dict[str, LocalProcess] = {}
        self.broker = BrokerNode(ValkeyContainer(valkey))
        self._tokens = dict(tokens or {})
        self._numbers: dict[str, int] = {}
        self._kept_workers = 0
        self._kept_webs = 0
        own = {
            "DATABASE_URL": database_url,
            "REDIS_URL": valkey.url,
            "OLLAMA_BASE_URL": upstream_url,
            "SLUICEGATE_DATA_DIR": str(directory / "data"),
            "SLUICEGATE_WORKER_CONCURRENCY": "200",
            # A test that is about limits sets them; no other should meet them.
            "SLUICEGATE_RATE_LIMIT": "",
            "SLUICEGATE_SIGN_IN_RATE_LIMIT": "",
            "SLUICEGATE_MAX_ACTIVE_STREAMS_PER_USER": "0",
        }
        self.environment = clean_environment(**own | dict(settings or {}))

    # Starting

    def release(self, timeout_seconds: float = COMMAND_TIMEOUT_SECONDS) -> None:
        """Run the Procfile's `release` line, the migrations, to its end.

        Raises:
            ProcessFailed: it said that it failed.
        """
        process = self._process("release", "release")
        process.start()
        if process.wait(timeout_seconds):
            raise ProcessFailed(f"release failed\n{process.log_tail()}")

    def start_web(self, *, settings: Mapping[str, str] | None = None) -> LocalProcess:
        """Start a web process on a port of its own, and wait until /healthz answers."""
        settings = {"PORT": str(free_port()), **(settings or {})}
        web = self._process("web", self._next_name("web"), settings=settings, kind=_WebProcess)
        web.start()
        web.await_ready()
        self.webs.append(web)
        return web

    def start_worker(
        self,
        name: str | None = None,
        *,
        concurrency: int | None = None,
        options: Sequence[str] = (),
        settings: Mapping[str, str] | None = None,
        wait: bool = True,
    ) -> WorkerNode:
        """Start a worker with a node name of its own; with `wait`, return when it consumes."""
        worker = self.new_worker(name, concurrency=concurrency, options=options, settings=settings)
        worker.container.process.start()
        self.workers.append(worker)
        if wait:
            worker.ready()
        return worker

    def new_worker(
        self,
        name: str | None = None,
        *,
        concurrency: int | None = None,
        options: Sequence[str] = (),
        settings: Mapping[str, str] | None = None,
    ) -> WorkerNode:
        """A worker that is not started yet, nor one of `workers`."""
        name, identity = name or self._next_name("worker"), uuid.uuid4().hex[:12]
        options = ["-n", f"{name}@{identity}", *options]
        if concurrency is not None:
            options += ["-c", str(concurrency)]
        process = self._process("worker", name, options=options, settings=settings, kind=_WorkerProcess)
        queue = _option(process.command, "-Q") or ""
        return WorkerNode(WorkerContainer(process, identity=identity, queue=queue), None)

    def start_reaper(self) -> LocalProcess:
        """Start the worker of the maintenance queue, and wait until it consumes."""
        return self._start_other("reaper", None, _WorkerProcess)

    def start_beat(self) -> LocalProcess:
        """Start beat, and wait until it says so."""
        return self._start_other("beat", None, _BeatProcess)

    def start_recovery(self) -> None:
        """Start both: somebody recovers what is lost, and ends what is over."""
        self.start_reaper()
        self.start_beat()

    def start_flower(self) -> LocalProcess:
        """Start Flower on a port of its own, with the credentials `owner:flower`, and wait until it answers."""
        settings = {"SLUICEGATE_FLOWER_PORT": str(free_port()), "SLUICEGATE_FLOWER_BASIC_AUTH": "owner:flower"}
        return self._start_other("flower", settings, _FlowerProcess)

    def _start_other(self, name: str, settings: Mapping[str, str] | None, kind: type[LocalProcess]) -> LocalProcess:
        """One of each kind: a second start finds the first."""
        process = self.others.get(name) or self._process(name, name, settings=settings, kind=kind)
        process.start()
        process.await_ready()
        self.others[name] = process
        return process

    def _process(
        self,
        line: str,
        name: str,
        *,
        options: Sequence[str] = (),
        settings: Mapping[str, str] | None = None,
        kind: type[LocalProcess] = LocalProcess,
    ) -> LocalProcess:
        environment = self.environment | dict(settings or {})
        words, assignments = procfile_command(line, environment, self.root)
        return kind(
            name,
            [*words, *options],
            log_path=self.directory / "logs" / f"{name}.log",
            environment=environment | assignments,
            directory=self.root,
        )

    def _next_name(self, kind: str) -> str:
        self._numbers[kind] = self._numbers.get(kind, 0) + 1
        return f"{kind}{self._numbers[kind]}"

    # Using

    @property
    def web(self) -> LocalProcess:
        """The first web process."""
        return self.webs[0]

    @property
    def worker(self) -> WorkerNode:
        """The first worker."""
        return self.workers[0]

    def url(self, web: LocalProcess | None = None) -> str:
        """Base URL of a web process, by default the first."""
        return _base_url(web or self.web)

    def cli(self, *arguments: str, timeout_seconds: float = COMMAND_TIMEOUT_SECONDS) -> str:
        """Run `sluicegate ARGUMENTS` and return what it printed.

        Raises:
            ProcessFailed: it exited with something else than 0.
        """
        done = self.cli_result(*arguments, timeout_seconds=timeout_seconds)
        if done.returncode:
            raise ProcessFailed(f"sluicegate {' '.join(arguments)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def cli_result(
        self, *arguments: str, timeout_seconds: float = COMMAND_TIMEOUT_SECONDS
    ) -> subprocess.CompletedProcess[str]:
        """Run `sluicegate ARGUMENTS` whatever comes of it."""
        program = shutil.which("sluicegate", path=self.environment["PATH"])
        if program is None:
            raise ProcessFailed("there is no program `sluicegate` in the virtualenv: install the project first")
        return subprocess.run(
            [program, *arguments],
            env=self.environment,
            cwd=self.root,
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
        )

    def user(self, name: str) -> str:
        """The token of a user, who is made if this is the first mention of the name."""
        if name not in self._tokens:
            self._tokens[name] = self.cli("users", "create", name).split()[-1]
        return self._tokens[name]

    def client(self, token: str | None = None, *, web: LocalProcess | None = None) -> Client:
        """An API client, by default of the user `tester`; of one of several web processes, if named."""
        return Client(self.url(web), token or self.user("tester"))

    # Keeping in order

    def heal(self) -> None:
        """Bring back what a former test has broken: what `keep` has seen runs, and no other web process or worker."""
        for service in (self.valkey, *self.services):
            service.resume()
            service.start()
            service.await_ready()
        for process in self._not_kept():
            process.kill()
        del self.workers[self._kept_workers :], self.webs[self._kept_webs :]
        for process in self.processes():
            process.resume()
            process.start()
        for process in self.processes():
            process.await_ready()

    def _not_kept(self) -> list[LocalProcess]:
        extra_workers = self.workers[self._kept_workers :]
        return [*self.webs[self._kept_webs :], *(worker.container.process for worker in extra_workers)]

    def keep(self) -> None:
        """Take what runs now as what `heal` restores."""
        self._kept_workers, self._kept_webs = len(self.workers), len(self.webs)

    def processes(self) -> list[LocalProcess]:
        """The product's processes, running or not."""
        return [*self.webs, *(worker.container.process for worker in self.workers), *self.others.values()]

    def stop(self, timeout_seconds: float = 3.0) -> None:
        """Ask all of them to end, and kill those that have not after `timeout_seconds`."""
        deadline = time.monotonic() + timeout_seconds
        for process in self.processes():
            process.resume()
            process.send_signal(signals.SIGTERM)
        for process in self.processes():
            if process.running:
                process.stop(max(0.0, deadline - time.monotonic()))


class _WebProcess(LocalProcess):
    """Ready when /healthz answers."""

    def is_ready(self) -> bool:
        try:
            return requests.get(f"{_base_url(self)}/healthz", timeout=2, proxies=NO_PROXIES).ok
        except requests.RequestException:
            return False


class _WorkerProcess(LocalProcess):
    """Ready when Celery says so in the log, or, where the log's level hides that, when the node answers a ping."""

    def is_ready(self) -> bool:
        if self.environment.get("SLUICEGATE_LOG_LEVEL", "INFO") in ("INFO", "DEBUG"):
            return " ready." in self.log_since_start()
        return self._answers_ping()

    def _answers_ping(self) -> bool:
        node = host_format(nodename(*nodesplit(_option(self.command, "-n") or "celery@%h")))
        broker = self.environment.get("CELERY_BROKER_URL") or self.environment["REDIS_URL"]
        with Celery(broker=broker, set_as_current=False) as app, app.connection_for_write() as connection:
            # A node takes up its tasks before it listens to remote control.
            return bool(app.control.ping([node], timeout=0.2, connection=connection))


class _FlowerProcess(LocalProcess):
    """Ready when its health check answers."""

    def is_ready(self) -> bool:
        url = f"http://{HOST}:{self.environment['SLUICEGATE_FLOWER_PORT']}/healthcheck"
        try:
            return requests.get(url, timeout=2, proxies=NO_PROXIES).ok
        except requests.RequestException:
            return False


class _BeatProcess(LocalProcess):
    """Ready when it has said anything: which words depends on the log's level."""

    def is_ready(self) -> bool:
        return bool(self.log_since_start().strip())


def _base_url(web: LocalProcess) -> str:
    return f"http://{HOST}:{web.environment['PORT']}"


def _option(command: Sequence[str], name: str) -> str | None:
    """The value of an option; of several, the last counts, as it does to the command."""
    values = [value for option, value in itertools.pairwise(command) if option == name]
    return values[-1] if values else None


# The API's user

NO_PROXIES = {"http": "", "https": ""}


class ApiError(AssertionError):
    """The API refused; `status` and `problem` say how."""

    def __init__(self, response: requests.Response) -> None:
        self.response = response
        self.status = response.status_code
        self.problem = _json_or_empty(response)
        request = response.request
        super().__init__(f"{request.method} {request.url}: {self.status} {response.text[:1000]}")

    @property
    def code(self) -> str | None:
        """The problem's stable code."""
        return self.problem.get("code")


def _json_or_empty(response: requests.Response) -> dict[str, Any]:
    try:
        value = response.json()
    except requests.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}


@dataclass(frozen=True)
class Event:
    """One server-sent event, its data parsed."""

    id: str | None
    event: str
    data: Any
    received_at: float  # time.monotonic()


class EventStream:
    """A stream that is being read. Iterate over it; `close()` works from any thread, also while another one reads."""

    def __init__(self, response: requests.Response) -> None:
        self.response = response
        self.comments = 0

    @property
    def session_id(self) -> str:
        """The session that the response's headers name."""
        return self.response.headers["X-Stream-Session-Id"]

    @property
    def conversation_id(self) -> str:
        """The conversation that the response's headers name."""
        return self.response.headers["X-Conversation-Id"]

    def __iter__(self) -> Iterator[Event]:
        fields: dict[str, list[str]] = {}
        for line in self._lines():
            if not line:
                if "data" in fields:
                    yield self._event(fields)
                fields = {}
            elif line.startswith(":"):
                self.comments += 1
            else:
                name, _, value = line.partition(":")
                fields.setdefault(name, []).append(value.removeprefix(" "))

    def _lines(self) -> Iterator[str]:
        rest = b""
        for chunk in self._chunks():
            *lines, rest = (rest + chunk).replace(b"\r\n", b"\n").split(b"\n")
            yield from (line.decode() for line in lines)

    def _chunks(self) -> Iterator[bytes]:
        # read1 answers with what there is; a read of a fixed size would hold events back until it is full.
        while chunk := self.response.raw.read1(65_536):
            yield chunk

    @staticmethod
    def _event(fields: dict[str, list[str]]) -> Event:
        identity = fields.get("id", [None])[-1]
        name = fields.get("event", ["message"])[-1]
        return Event(identity, name, json.loads("\n".join(fields["data"])), time.monotonic())

    def close(self) -> None:
        """Leave the stream."""
        with contextlib.suppress(ValueError, OSError, RuntimeError):  # it may have ended already
            self.response.raw.shutdown()
        self.response.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Client:
    """The API as one user sees it. May be used by several threads: no connection is shared."""

    def __init__(self, base_url: str, token: str | None) -> None:
        self.base_url = base_url
        self.token = token

    def request(self, method: str, path: str, **options: Any) -> requests.Response:
        """Any call; options are those of `requests`. Nothing is raised for a refusal."""
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        headers |= options.pop("headers", {})
        options.setdefault("timeout", READ_TIMEOUT_SECONDS)
        return requests.request(method, self.base_url + path, headers=headers, proxies=NO_PROXIES, **options)

    def call(self, method: str, path: str, body: Any = None, **options: Any) -> Any:
        """A call that must succeed; its JSON.

        Raises:
            ApiError: it was refused.
        """
        response = self.request(method, path, json=body, **options)
        if not response.ok:
            raise ApiError(response)
        return response.json() if response.content else None

    def post_message(
        self,
        content: str,
        *,
        conversation_id: str | None = None,
        model: str | None = None,
        options: dict[str, Any] | None = None,
        think: bool | None = None,
        on_disconnect: str | None = None,
        on_active: str | None = None,
        timeouts: Mapping[str, float] | None = None,
        idempotency_key: str | None = None,
    ) -> dict[str, Any]:
        """Ask for an answer; the 202's body: `sessionId`, `conversationId`, `messageId`, …"""
        body = _message(content, conversation_id, model, options, think, on_disconnect, on_active)
        body |= {"timeouts": dict(timeouts)} if timeouts else {}
        headers = {"Accept": "application/json"} | _key_header(idempotency_key)
        answer: dict[str, Any] = self.call("POST", "/api/stream-message", body, headers=headers)
        return answer

    def continue_stream(self, session_id: str, *, idempotency_key: str | None = None) -> dict[str, Any]:
        """Go on with an answer that has ended; the 202's body."""
        path, headers = f"/api/streams/{session_id}/continue", _key_header(idempotency_key)
        answer: dict[str, Any] = self.call("POST", path, headers=headers)
        return answer

    def retry_stream(self, session_id: str, *, idempotency_key: str | None = None) -> dict[str, Any]:
        """Ask for another answer to the same question; the 202's body."""
        path, headers = f"/api/streams/{session_id}/retry", _key_header(idempotency_key)
        answer: dict[str, Any] = self.call("POST", path, headers=headers)
        return answer

    def post_stream(
        self,
        content: str,
        *,
        conversation_id: str | None = None,
        model: str | None = None,
        options: dict[str, Any] | None = None,
        think: bool | None = None,
        on_disconnect: str | None = None,
        on_active: str | None = None,
        timeout_seconds: float = READ_TIMEOUT_SECONDS,
    ) -> EventStream:
        """Ask for an answer, as the very response."""
        body = _message(content, conversation_id, model, options, think, on_disconnect, on_active)
        return self._stream("POST", "/api/stream-message", timeout_seconds, json=body)

    def events(
        self, session_id: str, last_event_id: str | None = None, *, timeout_seconds: float = READ_TIMEOUT_SECONDS
    ) -> EventStream:
        """Follow a stream, from the start or from behind an event; a 204 is a stream without events."""
        headers = {"Last-Event-ID": last_event_id} if last_event_id else {}
        return self._stream("GET", f"/api/streams/{session_id}/events", timeout_seconds, headers=headers)

    def _stream(
        self, method: str, path: str, timeout_seconds: float, headers: dict[str, str] | None = None, **options: Any
    ) -> EventStream:
        headers = {"Accept": "text/event-stream", **(headers or {})}
        response = self.request(method, path, headers=headers, stream=True, timeout=timeout_seconds, **options)
        if not response.ok:
            raise ApiError(response)
        return EventStream(response)

    def terminate(self, session_id: str, conversation_id: str | None = None) -> dict[str, Any]:
        """Stop a stream; the receipt."""
        body = {"sessionId": session_id} | ({"conversationId": conversation_id} if conversation_id else {})
        receipt: dict[str, Any] = self.call("POST", "/api/terminate-stream", body)
        return receipt

    def stream(self, session_id: str) -> dict[str, Any]:
        """The session."""
        session: dict[str, Any] = self.call("GET", f"/api/streams/{session_id}")
        return session

    def messages(self, conversation_id: str) -> list[dict[str, Any]]:
        """A conversation's messages."""
        items: list[dict[str, Any]] = self.call("GET", f"/api/conversations/{conversation_id}/messages")["items"]
        return items

    def message(self, session: Mapping[str, Any]) -> dict[str, Any]:
        """The message that a session (or whatever names `conversationId` and `messageId`) writes."""
        messages = self.messages(session["conversationId"])
        return next(message for message in messages if message["id"] == session["messageId"])

    def follow(self, session_id: str, last_event_id: str | None = None, *, reconnect: bool = False) -> Reader:
        """A reader that has set out to follow a stream."""
        return Reader(lambda cursor: self.events(session_id, cursor), last_event_id, reconnect=reconnect).start()


def _key_header(idempotency_key: str | None) -> dict[str, str]:
    return {"Idempotency-Key": idempotency_key} if idempotency_key else {}


def _message(
    content: str,
    conversation_id: str | None,
    model: str | None,
    options: dict[str, Any] | None,
    think: bool | None,
    on_disconnect: str | None,
    on_active: str | None,
) -> dict[str, Any]:
    fields = {
        "content": content,
        "conversationId": conversation_id,
        "model": model,
        "options": options,
        "think": think,
        "onDisconnect": on_disconnect,
        "onActive": on_active,
    }
    return {name: value for name, value in fields.items() if value is not None}


class Reader:
    """A thread that follows a stream to its end and keeps what it was sent.

    With `reconnect` it goes on after a broken connection as an EventSource does: from behind the last id.
    """

    def __init__(
        self,
        open_stream: Callable[[str | None], EventStream],
        last_event_id: str | None = None,
        *,
        reconnect: bool = False,
    ) -> None:
        self.events: list[Event] = []
        self.thinking = ""
        self.text = ""
        self.last_event_id = last_event_id
        self.done: dict[str, Any] | None = None
        self.error: Exception | None = None
        self.connections = 0
        self._open_stream = open_stream
        self._reconnect = reconnect
        self._leaving = threading.Event()
        self._stream: EventStream | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> Self:
        """Set out."""
        self._thread.start()
        return self

    def _run(self) -> None:
        while not self._leaving.is_set():
            try:
                self._follow_once()
                self.error = None
            except Exception as error:  # whatever it was, it belongs to the test that looks at `error`
                self.error = error
            if self.done is not None or not self._reconnect:
                return
            self._leaving.wait(0.1)

    def _follow_once(self) -> None:
        with self._open_stream(self.last_event_id) as stream:
            self.connections += 1
            self._stream = stream
            for event in stream:
                self._take(event)
                if self._leaving.is_set():
                    return

    def _take(self, event: Event) -> None:
        self.events.append(event)
        self.last_event_id = event.id or self.last_event_id
        if event.event == "message":
            self.text += event.data["content"]
        elif event.event == "thinking":
            self.thinking += event.data["content"]
        elif event.event == "done":
            self.done = event.data

    @property
    def ids(self) -> list[str]:
        """The ids of the events that have one, in order."""
        return [event.id for event in self.events if event.id is not None]

    @property
    def sha256(self) -> str:
        """Of the content, as receipts and `done` have it."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def ended(self) -> bool:
        """Whether it follows no longer."""
        return not self._thread.is_alive()

    def of(self, kind: str) -> list[Event]:
        """The events of one kind; the pieces of the answer are of the kind `message`."""
        return [event for event in self.events if event.event == kind]

    def wait_for_text(self, length: int = 1, timeout_seconds: float = READ_TIMEOUT_SECONDS) -> str:
        """Wait until so many code points of content are there, and return what there is."""
        wait_until(lambda: len(self.text) >= length or self.ended, timeout_seconds, f"a text of {length} code points")
        if len(self.text) < length:
            raise WaitTimeout(f"the stream ended after {len(self.text)} code points, {self._what_there_is()}")
        return self.text

    def wait_until_done(self, timeout_seconds: float = READ_TIMEOUT_SECONDS) -> dict[str, Any]:
        """Wait for the end of the stream, and return the data of `done`."""
        self._thread.join(timeout_seconds)
        if self.done is None:
            raise WaitTimeout(f"no `done` within {timeout_seconds:g} s, {self._what_there_is()}")
        return self.done

    def _what_there_is(self) -> str:
        last = self.events[-1] if self.events else None
        return f"{len(self.events)} events, the last {last}, error {self.error!r}"

    def drop(self) -> None:
        """Break the connection; with `reconnect`, the reader comes back."""
        if self._stream is not None:
            self._stream.close()

    def leave(self, timeout_seconds: float = 5.0) -> None:
        """Break the connection for good, and wait until the thread has ended."""
        self._leaving.set()
        self.drop()
        self._thread.join(timeout_seconds)
