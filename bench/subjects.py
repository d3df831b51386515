"""What is measured beside each other: the system, a naive proxy, resumable-stream, and the model's server itself.

Each is asked for a stream and told to stop it in the way that it offers. All of them speak to one model's server
(`bench/model.py`), and run as they are run in life: one web process each.
"""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil

from bench import wire
from bench.speed_report import NAIVE, OURS, RESUMABLE
from tests.functional.nodes import Stack
from tests.services import (
    HOST,
    ROOT,
    LocalProcess,
    PostgresServer,
    ValkeyServer,
    clean_environment,
    free_port,
    valkey_server,
    wait_until,
)

HEAD_SECONDS: Final = 30.0
SILENCE_SECONDS: Final = 60.0
NODE_PACKAGES: Final = ROOT / "bench/resumable_stream"
_numbers = itertools.count(1)


@dataclass
class Talk:
    """One stream that is being read."""

    name: str
    response: wire.Response
    session_id: str = ""

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it comes; ends with it, or when the reader itself has gone."""
        async for piece in self.response.pieces(SILENCE_SECONDS):
            yield piece


@dataclass
class Subject:
    """One of them, running."""

    name: str
    url: str
    processes: Mapping[str, Callable[[], list[psutil.Process]]] = field(default_factory=dict)
    """By what they are: web, worker, Valkey, database."""

    def request(self, model: str, stream_id: str) -> tuple[str, dict[str, str], dict[str, Any]]:
        """Path, headers and body that ask for a stream."""
        body = {"id": stream_id, "model": model, "messages": [{"role": "user", "content": "go on"}]}
        return "/chat", {}, body

    @asynccontextmanager
    async def talk(self, model: str) -> AsyncIterator[Talk]:
        """Ask for a stream, and be its first reader."""
        name = f"s{next(_numbers)}"
        path, headers, body = self.request(f"name={name},{model}", name)
        async with wire.request(self.url, "POST", path, headers, body, timeout_seconds=HEAD_SECONDS) as response:
            assert response.status == 200, await response.body(5)
            yield Talk(name, response, response.headers.get("x-stream-session-id", name))

    async def stop(self, talk: Talk) -> dict[str, Any] | None:
        """As it can be stopped: here, by going away. What it was answered; None where nobody answers."""
        talk.response.abort()
        return None

    def cpu_seconds(self) -> dict[str, float]:
        """That each kind of its processes has used."""
        return {kind: sum(sum(one.cpu_times()[:2]) for one in those()) for kind, those in self.processes.items()}

    def memory_kb(self) -> dict[str, float]:
        """PSS, which counts what processes share once."""
        return {
            kind: sum(one.memory_full_info().pss for one in those()) / 1024 for kind, those in self.processes.items()
        }


class Direct(Subject):
    """The model's server without anything between: the physical limit."""

    def request(self, model: str, stream_id: str) -> tuple[str, dict[str, str], dict[str, Any]]:
        return "/api/chat", {}, {"model": model, "messages": [{"role": "user", "content": "go on"}], "stream": True}


class ResumableStream(Subject):
    """With the stop that the bench's own server adds to it."""

    async def stop(self, talk: Talk) -> dict[str, Any]:
        body = {"id": talk.name}
        async with wire.request(self.url, "POST", "/stop", {}, body, timeout_seconds=HEAD_SECONDS) as answer:
            await answer.body(HEAD_SECONDS)
        return {}


@dataclass
class Sluicegate(Subject):
    """The whole of it, with sign-in, queue, log and database."""

    token: str = ""

    @contextmanager
    def frozen_workers(self) -> Iterator[None]:
        """No worker takes a stream, so that what is asked for stays queued; they go on behind the block."""
        frozen = self.processes["worker"]()
        try:
            for process in frozen:
                process.suspend()
            yield
        finally:
            for process in frozen:
                process.resume()

    def request(self, model: str, stream_id: str) -> tuple[str, dict[str, str], dict[str, Any]]:
        headers = {"Authorization": f"Bearer {self.token}", "Accept": "text/event-stream"}
        return "/api/stream-message", headers, {"content": "go on", "model": model}

    async def stop(self, talk: Talk) -> dict[str, Any]:
        headers, body = {"Authorization": f"Bearer {self.token}"}, {"sessionId": talk.session_id}
        path = "/api/terminate-stream"
        async with wire.request(self.url, "POST", path, headers, body, timeout_seconds=HEAD_SECONDS) as answer:
            receipt: dict[str, Any] = json.loads(await answer.body(HEAD_SECONDS))
            assert answer.status == 200, receipt
            return receipt

    @asynccontextmanager
    async def another_reader(self, talk: Talk) -> AsyncIterator[Talk]:
        """Somebody else who reads the same stream."""
        headers, path = {"Authorization": f"Bearer {self.token}"}, f"/api/streams/{talk.session_id}/events"
        async with wire.request(self.url, "GET", path, headers, timeout_seconds=HEAD_SECONDS) as response:
            yield Talk(talk.name, response, talk.session_id)


# Starting them


@contextmanager
def model_server(directory: Path) -> Iterator[str]:
    """URL of a model's server."""
    port = free_port()
    command = [sys.executable, "-m", "bench.model", "--port", str(port)]
    process = LocalProcess("model", command, log_path=directory / "model.log", ready_prompt=str(port))
    process.start()
    process.await_ready()
    yield f"http://{HOST}:{port}"
    process.kill()


@contextmanager
def naive_proxy(directory: Path, model_url: str) -> Iterator[Subject]:
    """The baseline, with gunicorn's worker of the same kind as the system's own."""
    port = free_port()
    command = ["gunicorn", "-k", "gevent", "-w", "1", "--worker-connections", "4000", "-b", f"{HOST}:{port}"]
    process = LocalProcess(
        "naive",
        [str(Path(sys.executable).with_name(command[0])), *command[1:], "bench.naive_proxy:app"],
        log_path=directory / "naive.log",
        environment=clean_environment(MODEL_URL=model_url),
        ready_prompt="Booting worker",
    )
    process.start()
    process.await_ready()
    yield Subject(NAIVE, f"http://{HOST}:{port}", {"web": process.family})
    process.kill()


@contextmanager
def resumable_stream(directory: Path, model_url: str) -> Iterator[Subject | None]:
    """None where there is no npm, or where it cannot install what is needed."""
    npm, node = shutil.which("npm"), shutil.which("node")
    if npm is None or node is None:
        print("resumable-stream is left out: there is no npm", file=sys.stderr)
        yield None
        return
    place = directory / "resumable_stream"
    shutil.copytree(NODE_PACKAGES, place)
    install = [npm, "install", "--no-package-lock", "--no-audit", "--no-fund"]
    try:
        subprocess.run(install, cwd=place, capture_output=True, text=True, timeout=120, check=True)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        print(f"resumable-stream is left out: {error}\n{error.stderr}", file=sys.stderr)
        yield None
        return
    valkey, port = valkey_server(directory / "resumable-valkey"), free_port()
    environment = clean_environment(MODEL_URL=model_url, REDIS_URL=valkey.url, PORT=str(port))
    process = LocalProcess(
        "resumable", [node, "server.mjs"], log_path=directory / "node.log", environment=environment, directory=place
    )
    process.start()
    url = f"http://{HOST}:{port}"
    wait_until(lambda: _answers(url), 15, "the node server answers")
    yield ResumableStream(RESUMABLE, url, {"web": process.family, "Valkey": lambda: [psutil.Process(valkey.pid)]})
    process.kill()
    valkey.kill()


def _answers(url: str) -> bool:
    import requests

    try:
        return requests.get(url, timeout=1, proxies={"http": ""}).ok
    except requests.RequestException:
        return False


@contextmanager
def sluicegate(directory: Path, model_url: str, postgres: PostgresServer) -> Iterator[Sluicegate]:
    """One web process and one worker, with reaper and beat, over PostgreSQL and a Valkey that keeps its data."""
    valkey: ValkeyServer = valkey_server(directory / "valkey", append_only=True)
    stack = Stack(
        directory / "stack",
        database_url=postgres.create_database(),
        valkey=valkey,
        upstream_url=model_url,
        settings={"SLUICEGATE_WORKER_CONCURRENCY": "1500", "SLUICEGATE_LOG_LEVEL": "INFO"},
    )
    stack.release()
    worker = stack.start_worker(wait=False)
    stack.start_recovery()
    stack.start_web()
    worker.ready()
    kinds = {
        "web": stack.web.family,
        "worker": worker.container.process.family,
        "reaper": stack.others["reaper"].family,
        "beat": stack.others["beat"].family,
        "Valkey": lambda: [psutil.Process(valkey.pid)],
        "database": lambda: psutil.Process(postgres.pid).children(recursive=True),
    }
    yield Sluicegate(OURS, stack.url(), kinds, token=stack.user("tester"))
    stack.stop(timeout_seconds=0)
    valkey.kill()
