"""`sluicegate up`: everything on one machine, with one command."""

from __future__ import annotations

import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import click

from webapp.cli.terminal import StatusLine, paint

if TYPE_CHECKING:
    from webapp.config import Settings
    from webapp.embedded.supervisor import Program, Supervisor

OWNER = "owner"
"""The user that is made at the first start, and that the one-time sign-in token is for."""

_READY_SECONDS = 120
_POLL_SECONDS = 0.2
_STOP_SECONDS = 8.0  # the promise is 10
_PROGRAM_STOP_SECONDS = 5
_EMBEDDED_STOP_SECONDS = 2
_DRAIN_SECONDS = 1.0
_DESCRIPTORS = 16_384
_TAIL_LINES = 20
_EMBEDDED_LAYER, _PROGRAM_LAYER = 1, 2
_STEADY_SECONDS = 5.0
"""After which what was started again counts as running."""
_LABEL_WIDTH = 11
_NAME_COLOURS = ("cyan", "magenta", "blue", "green", "yellow", "bright_cyan", "bright_magenta")
_STATUS = StatusLine()
# An empty value of these means what no value means.
_EMPTY_IS_UNSET = ("DATABASE_URL", "REDIS_URL", "CELERY_BROKER_URL", "OLLAMA_BASE_URL", "PORT", "SLUICEGATE_DATA_DIR")


@click.command(short_help="Run everything on this machine.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    metavar="N",
    help="The page's port; 0: a free one.  [default: PORT or 8000]",
)
@click.option(
    "--data-dir",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where everything is written.  [default: var]",
)
@click.option(
    "--procfile",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="What to run.  [default: the checkout's]",
)
def up(port: int | None, data_dir: Path | None, procfile: Path | None) -> None:
    """Run everything that the Procfile names, with an embedded Valkey and a demo model where none is set.

    The last line that it prints has the page's address and a one-time sign-in token. Ctrl-C and SIGTERM stop it all
    within ten seconds; a second one ends it at once. What was being answered goes on at the next start.

    \b
    Examples:
      sluicegate up --port 9000
      OLLAMA_BASE_URL=http://gpu:11434 sluicegate up --data-dir /srv/sluicegate
    """
    from webapp.config import EMBEDDED_ENV_FILE, load_settings

    _take_options(port, data_dir)
    directory = load_settings().data_dir.absolute()
    os.environ["SLUICEGATE_DATA_DIR"] = str(directory)
    with _sole_use_of(directory):
        Deployment(load_settings(), directory / EMBEDDED_ENV_FILE, procfile).run()
    # Python's own teardown takes a third of a second of computing, which on a busy machine is seconds
    # of the ten that were promised; and there is nothing left to put away.
    sys.stdout.flush()
    os._exit(0)


def _take_options(port: int | None, data_dir: Path | None) -> None:
    """Into the environment, where this process and all that it starts find them."""
    for name in _EMPTY_IS_UNSET:
        if os.environ.get(name) == "":
            del os.environ[name]
    if port is not None:
        os.environ["PORT"] = str(port)
    if data_dir is not None:
        os.environ["SLUICEGATE_DATA_DIR"] = str(data_dir)


@contextmanager
def _sole_use_of(directory: Path) -> Iterator[None]:
    """Hold the data directory's lock, with what a killed `up` left over out of the way."""
    from webapp.embedded.runtime import lock_file
    from webapp.errors import ConfigurationError

    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = lock_file(directory / "up.lock")
    if lock is None:
        raise ConfigurationError(
            f"`sluicegate up` runs already with the data directory {directory}: "
            "stop it, or give this one its own with --data-dir and --port"
        )
    with lock:
        _end_leftovers(directory)
        yield


def _end_leftovers(directory: Path) -> None:
    from webapp.config import EMBEDDED_ENV_FILE
    from webapp.embedded.runtime import read_environment
    from webapp.embedded.supervisor import end_orphan
    from webapp.embedded.valkey import shut_down

    if end_orphan(directory):
        _say("Ended what a killed `sluicegate up` had left running", to_stderr=True)
    embedded = directory / EMBEDDED_ENV_FILE
    url = read_environment(embedded).get("REDIS_URL")
    if url and shut_down(url):
        _say("Ended the Valkey that a killed `sluicegate up` had left running", to_stderr=True)
    embedded.unlink(missing_ok=True)
    shutil.rmtree(directory / "metrics", ignore_errors=True)  # its counters begin with it


class _Stopped(Exception):
    """A signal asked for the end before everything ran."""


class Deployment:
    """One run of everything: prepared, started, watched, stopped."""

    def __init__(self, settings: Settings, environment_file: Path, procfile: Path | None) -> None:
        self._settings = settings
        self._directory = settings.data_dir
        self._environment_file = environment_file
        self._procfile = procfile
        self._embedded: dict[str, str] = {}
        self._release_command: list[str] | None = None
        self._programs: list[Program] = []
        self._supervisor: Supervisor | None = None
        self._failure: Exception | None = None
        self._signals = 0
        self._stop_deadline = float("inf")
        self._stopping_since = 0.0
        self._began = time.monotonic()
        self._fallen: dict[str, tuple[int, float]] = {}
        """What has ended: the process id that it has since, and since when; 0 while it has none."""

    def run(self) -> None:
        """Return when everything has been stopped on request.

        Raises:
            SluicegateError: it could not be started; whatever ran is stopped.
        """
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as nohup asks
                signal.signal(number, self._on_signal)
        try:
            self._prepare()
            self._release()
            self._serve()
        except _Stopped:
            pass
        finally:
            self._environment_file.unlink(missing_ok=True)

    # -- before anything runs --------------------------------------------------------------------

    def _prepare(self) -> None:
        from webapp.cli.procfile import find_procfile, read_procfile
        from webapp.config import mask_url
        from webapp.embedded.runtime import write_environment

        _tell("Data", str(self._directory))
        commands = read_procfile(self._procfile or find_procfile())
        self._choose_ports(with_flower="flower" in commands)
        self._embed_valkey()
        self._embed_model()
        _tell("Database", mask_url(self._settings.effective_database_url))
        self._add_programs(commands)
        drain_seconds = min(self._settings.drain_seconds, _DRAIN_SECONDS)
        os.environ |= {"SLUICEGATE_DRAIN_SECONDS": str(drain_seconds), **self._embedded}
        ports = {"PORT": str(self._settings.port), "SLUICEGATE_FLOWER_PORT": str(self._settings.flower_port)}
        write_environment(self._environment_file, self._embedded | ports)
        _raise_descriptor_limit()

    def _choose_ports(self, *, with_flower: bool) -> None:
        from webapp.embedded.runtime import free_port, port_problem
        from webapp.errors import ConfigurationError

        host, port = self._settings.host, self._settings.port
        if port == 0:
            port = free_port(host)
            os.environ["PORT"] = str(port)
        elif problem := port_problem(host, port):
            raise ConfigurationError(problem)
        flower_port = self._settings.flower_port
        if with_flower and (flower_port in (0, port) or port_problem(host, flower_port)):
            flower_port = free_port(host)
            os.environ["SLUICEGATE_FLOWER_PORT"] = str(flower_port)
        self._settings = self._settings.model_copy(update={"port": port, "flower_port": flower_port})

    def _embed_valkey(self) -> None:
        from webapp.config import mask_url

        if self._settings.redis_url:
            _require_redis(self._settings)
            _tell("Redis", mask_url(self._settings.redis_url))
            return
        from webapp.embedded.valkey import EmbeddedValkey

        valkey = EmbeddedValkey(self._directory / "valkey")
        self._add("valkey", valkey.prepare(), _EMBEDDED_LAYER, steady_seconds=1)
        self._embedded["REDIS_URL"] = valkey.url
        _tell("Redis", f"REDIS_URL is not set, so an embedded Valkey runs on port {valkey.port}")

    def _embed_model(self) -> None:
        from webapp.config import mask_url
        from webapp.embedded.runtime import free_port

        url = self._settings.ollama_base_url
        if _is_given("OLLAMA_BASE_URL") or get(f"{url}/api/version")[0] == 200:
            _tell("Model", f"Ollama at {mask_url(url)}")
            return
        port = free_port()
        command = [sys.executable, "-m", "webapp.embedded.demo_model", "--port", str(port)]
        self._add("demo", command, _EMBEDDED_LAYER, steady_seconds=1)
        self._embedded["OLLAMA_BASE_URL"] = f"http://127.0.0.1:{port}"
        _tell("Model", f"no Ollama at {url}, so a demo model answers, which is no language model")
        _tell("", "(set OLLAMA_BASE_URL)")

    def _add_programs(self, commands: dict[str, list[str]]) -> None:
        from webapp.cli.procfile import RELEASE
        from webapp.errors import ConfigurationError

        self._release_command = commands.pop(RELEASE, None)
        for name, command in commands.items():
            if any(program.name == name for program in self._programs):
                raise ConfigurationError(f"the Procfile may not name a process {name!r}: an embedded part is so named")
            self._add(name, command, _PROGRAM_LAYER)

    def _add(self, name: str, command: list[str], layer: int, steady_seconds: int = 5) -> None:
        from webapp.embedded.supervisor import Program

        stop_seconds = _EMBEDDED_STOP_SECONDS if layer == _EMBEDDED_LAYER else _PROGRAM_STOP_SECONDS
        self._programs.append(Program(name, command, layer, stop_seconds, steady_seconds))

    # -- the release step --------------------------------------------------------------------------

    def _release(self) -> None:
        from webapp.errors import ConfigurationError

        if self._release_command is None:
            return
        log = self._directory / "log" / "release.log"
        log.parent.mkdir(exist_ok=True)
        _STATUS.show("The release step: bringing the database's tables to this version")
        with log.open("w") as output:
            process = subprocess.Popen(
                self._release_command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )
            while process.poll() is None:
                if self._signals:
                    process.terminate()
                    process.wait()
                    _STATUS.clear()
                    raise _Stopped
                time.sleep(_POLL_SECONDS)
        _STATUS.clear()
        if process.returncode != 0:
            _show_tail(log)
            raise ConfigurationError(f"the release step failed; its output is above and in {log}")

    # -- while everything runs ----------------------------------------------------------------------

    def _serve(self) -> None:
        from webapp.embedded.supervisor import Supervisor

        self._supervisor = Supervisor(self._directory, self._programs, self._report)
        coloured = zip(self._programs, itertools.cycle(_NAME_COLOURS), strict=False)
        _tell("Starting", ", ".join(paint(sys.stdout, one.name, fg=colour) for one, colour in coloured))
        _tell("Logs", str(self._supervisor.log_directory / "NAME.log"))
        thread = threading.Thread(target=self._supervise, args=[self._supervisor], name="supervisor")
        thread.start()
        try:
            if not self._signals:
                self._announce(thread)
                self._watch(thread)
        except _Stopped:
            pass
        finally:
            _STATUS.clear()
            self._stop()
            self._watch(thread)
        if self._failure:
            raise self._failure
        _say(f"Stopped after {time.monotonic() - self._stopping_since:.1f} s", to_stderr=True)

    def _report(self, line: str) -> None:
        """What the supervisor says about a program that ended: its name first."""
        name, _, rest = line.partition(" ")
        if self._has(name):
            self._fallen[name] = (0, 0.0)
            name = paint(sys.stderr, name, fg="red", bold=True)
            _say(f"{name} {paint(sys.stderr, rest, fg='yellow')}", to_stderr=True)
        else:
            _say(paint(sys.stderr, line, fg="red"), to_stderr=True)

    def _tell_returns(self) -> None:
        """Say of what had ended that it runs again, once it has done so for a while."""
        if not self._fallen or self._supervisor is None or self._signals:
            return
        pids, moment = self._supervisor.pids, time.monotonic()
        for name, (pid, since) in list(self._fallen.items()):
            if pids.get(name, 0) != pid:
                self._fallen[name] = (pids.get(name, 0), moment)
            elif pid and moment - since > _STEADY_SECONDS:
                del self._fallen[name]
                _say(f"{paint(sys.stderr, name, fg='green', bold=True)} runs again", to_stderr=True)

    def _supervise(self, supervisor: Supervisor) -> None:
        try:
            supervisor.run()
        except Exception as error:
            self._failure = error

    def _announce(self, thread: threading.Thread) -> None:
        """Await readiness, then print the one line that everything before leads to."""
        from webapp.cli.services import open_accounts
        from webapp.cli.users import sign_in_url

        with open_accounts() as accounts:
            accounts.ensure_user(OWNER, operator=True)
            self._await_ready(thread)
            token = accounts.make_sign_in_token(OWNER)
        _STATUS.clear()
        if self._signals:
            return
        page = self._settings.effective_public_url
        _tell("Started", f"in {time.monotonic() - self._began:.1f} s; Ctrl-C stops it all")
        _tell("Page", f"{page} (the link below signs you in, once)")
        _tell("API", f"{page}/docs (its tokens: `sluicegate users create NAME`)")
        if self._has("flower"):
            address = f"http://{reachable(self._settings.host)}:{self._settings.flower_port}"
            _tell("Flower", f"{address} (workers and tasks; {self._flower_hint()})")
        # A program reads this line: colours for a terminal alone, whatever else asks for them.
        ready = "Sluicegate is ready:"
        ready = paint(sys.stdout, ready, fg="green", bold=True) if sys.stdout.isatty() else ready
        _say(f"{ready} {sign_in_url(page, token)} - one-time sign-in token of {OWNER}: {token}")

    def _await_ready(self, thread: threading.Thread) -> None:
        from webapp.errors import ConfigurationError

        url = f"http://{reachable(self._settings.host)}:{self._settings.port}/readyz"
        deadline = time.monotonic() + _READY_SECONDS
        status, answer = 0, ""
        while status != 200:
            if self._signals or not thread.is_alive():
                raise _Stopped
            if time.monotonic() > deadline:
                self._show_why_not_ready(status, answer)
                raise ConfigurationError(f"not ready after {_READY_SECONDS} s; see the lines above")
            self._tell_returns()
            _STATUS.show(f"Waiting for {self._lacking(status, answer)}")
            time.sleep(_POLL_SECONDS)
            status, answer = get(url)

    def _lacking(self, status: int, answer: str) -> str:
        """What /readyz waits for, in the words of its answer."""
        with suppress(ValueError, AttributeError):
            checks = json.loads(answer)["checks"] if status else {}
            if lacking := [name for name, state in checks.items() if state != "ok"]:
                return ", ".join(lacking)
        return "web"

    def _show_why_not_ready(self, status: int, answer: str) -> None:
        assert self._supervisor is not None  # noqa: S101
        if status:
            _say(f"/readyz answers {status}: {' '.join(answer.split())[:1000]}", to_stderr=True)
        for name in ("worker", "reaper") if status else ("web",):
            if self._has(name):
                _show_tail(self._supervisor.log_of(name))

    def _watch(self, thread: threading.Thread) -> None:
        """Return when everything has ended; what overstays the time for stopping is killed."""
        while thread.is_alive():
            thread.join(_POLL_SECONDS)
            self._tell_returns()
            if time.monotonic() > self._stop_deadline and self._supervisor:
                self._stop_deadline = float("inf")
                self._supervisor.kill()

    def _stop(self) -> None:
        if self._supervisor is not None and self._stop_deadline == float("inf"):
            self._stopping_since = time.monotonic()
            self._stop_deadline = self._stopping_since + _STOP_SECONDS
            self._supervisor.stop()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1
        if self._supervisor is None:
            return
        if self._signals == 1:
            erase = b"\r\x1b[K" if sys.stderr.isatty() else b""
            os.write(sys.stderr.fileno(), erase + b"Stopping\n")  # print may have been what was interrupted
            self._stop()
        else:
            self._supervisor.kill()

    def _has(self, name: str) -> bool:
        return any(program.name == name for program in self._programs)

    def _flower_hint(self) -> str:
        from webapp.cli.flower import CREDENTIALS_FILE

        if self._settings.flower_basic_auth:
            return "sign in as set in SLUICEGATE_FLOWER_BASIC_AUTH"
        return f"sign in as {self._directory / CREDENTIALS_FILE} says"


def _is_given(variable: str) -> bool:
    """Whether a person has set a variable to anything, there or in `.env`."""
    from webapp.embedded.runtime import read_environment

    return bool(os.environ.get(variable) or read_environment(Path(".env")).get(variable))


def _require_redis(settings: Settings) -> None:
    """One that is configured and does not answer is said now, and not after everything has waited for it."""
    from redis.exceptions import RedisError

    from webapp.config import mask_url
    from webapp.errors import ConfigurationError
    from webapp.queue import make_redis

    try:
        make_redis(settings).ping()
    except RedisError as error:
        url = mask_url(settings.redis_url)
        raise ConfigurationError(
            f"REDIS_URL: {url} cannot be reached: start it, or unset REDIS_URL ({error})"
        ) from None


def _raise_descriptor_limit() -> None:
    """Each stream takes a descriptor or two, and the usual limit is of the nineteen-nineties."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(_DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def reachable(host: str) -> str:
    """The address, as a URL spells it, at which this machine reaches what is bound to `host`."""
    host = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return f"[{host}]" if ":" in host else host


def get(url: str, timeout_seconds: float = 2) -> tuple[int, str]:
    """Status and body; 0 where nothing answers. Straight there, whatever proxy the environment names."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=timeout_seconds) as response:
            return response.status, response.read().decode("utf-8", "replace")
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode("utf-8", "replace")
    except (OSError, ValueError):
        return 0, ""


def _show_tail(log: Path) -> None:
    with suppress(OSError):
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:]:
            _say(f"{log.name}: {line}", to_stderr=True)


def _tell(label: str, text: str) -> None:
    """One line of what `up` does, under a label; or, without one, more of the line before."""
    start = f"{label}:" if label else ""
    _say(f"{paint(sys.stdout, start, bold=True)}{' ' * (_LABEL_WIDTH - len(start))}{text}")


def _say(line: str, *, to_stderr: bool = False) -> None:
    _STATUS.say(line, sys.stderr if to_stderr else sys.stdout)
