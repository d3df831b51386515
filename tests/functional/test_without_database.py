"""While PostgreSQL is gone, or frozen: text flows on, endings wait, every call is refused soon; then all is made good.

SLUICEGATE_TEST_OUTAGE_SECONDS is how long it lasts.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import pytest
import requests

from tests.functional.ending import assert_ended
from tests.functional.nodes import Client, Stack
from tests.functional.refusals import Flow, assert_refused, signed_in
from tests.functional.text import assert_one_text
from tests.services import PostgresServer, wait_until
from tests.upstream import UpstreamProcess, expected_text

OUTAGE_SECONDS: Final = float(os.environ.get("SLUICEGATE_TEST_OUTAGE_SECONDS", "5"))
TIMEOUT_SECONDS: Final = 2.5
REFUSED_WITHIN_SECONDS: Final = TIMEOUT_SECONDS + 1.5
"""A unit of work, and a busy machine."""
READY_WITHIN_SECONDS: Final = 2.5 + 1
LEASE_SECONDS: Final = 3.0
PACE: Final = 40
LASTING: Final = f"pace={PACE},tokens={int((OUTAGE_SECONDS + 4) * PACE)},alphabet=mixed"
ENDING: Final = f"pace={PACE},tokens={int((OUTAGE_SECONDS / 2 + 1) * PACE)},alphabet=mixed"
EACH: Final = 6
RUSH: Final = 40
"""More at once than the pool has connections."""
WARNINGS_PER_SECOND: Final = 6
"""Of all processes together: what is said again and again while the database is gone."""

pytestmark = pytest.mark.usefixtures("recovery")


@pytest.fixture(scope="module")
def stack_database() -> str:
    return "postgresql"


@pytest.fixture(scope="module")
def stack_settings() -> Mapping[str, str]:
    return {
        "SLUICEGATE_DATABASE_TIMEOUT_SECONDS": str(TIMEOUT_SECONDS),
        "SLUICEGATE_LEASE_SECONDS": str(LEASE_SECONDS),
        "SLUICEGATE_LEASE_RENEW_SECONDS": "0.3",
        "SLUICEGATE_HEARTBEAT_SECONDS": "0.5",
        "SLUICEGATE_DATABASE_CHECK_SECONDS": "1",
    }


class Outage:
    """Time without the database; what is said in the logs meanwhile is kept."""

    def __init__(self, stack: Stack, begin: Callable[[], None], end: Callable[[], None]) -> None:
        self._logs = {path: path.stat().st_size for path in (stack.directory / "logs").glob("*.log")}
        self._begin, self._end = begin, end

    def __enter__(self) -> Outage:
        self.began_at = time.monotonic()
        self._begin()
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def sit_out(self) -> None:
        over_at = self.began_at + OUTAGE_SECONDS
        wait_until(lambda: time.monotonic() > over_at, OUTAGE_SECONDS + 1, "the outage is over")

    def lines(self) -> list[dict[str, Any]]:
        """What all processes have said since it began."""
        said: list[dict[str, Any]] = []
        for path, size_bytes in self._logs.items():
            with path.open("rb") as log:
                log.seek(size_bytes)
                said += [json.loads(line) for line in log if line.startswith(b"{")]
        return said


@pytest.fixture(params=["killed", "frozen"])
def outage(request: pytest.FixtureRequest, stack: Stack, postgres: PostgresServer) -> Iterator[Outage]:
    """Of each kind: nobody listens at its port; or the kernel accepts connections, and nothing ever answers."""

    def start() -> None:
        postgres.start()
        postgres.await_ready()

    begin, end = (postgres.kill, start) if request.param == "killed" else (postgres.pause, postgres.resume)
    yield Outage(stack, begin, end)
    postgres.resume()


def calls(client: Client, session_id: str) -> dict[str, Callable[[], requests.Response]]:
    """One of each kind; all of them need the database."""
    json_wanted = {"Accept": "application/json"}
    return {
        "send": lambda: client.request("POST", "/api/stream-message", json={"content": "hello"}, headers=json_wanted),
        "stream": lambda: client.request("POST", "/api/stream-message", json={"content": "hello"}),
        "stop": lambda: client.request("POST", "/api/terminate-stream", json={"sessionId": session_id}),
        "list": lambda: client.request("GET", "/api/conversations"),
        "follow": lambda: client.request("GET", f"/api/streams/{session_id}/events"),
        "graphql": lambda: client.request("POST", "/graphql", json={"query": "{ me { name } }"}),
    }


def assert_nothing_answers(stack: Stack, client: Client, browser: requests.Session, session_id: str) -> None:
    """Every call is refused, also where many come at once; who looks after the process is told so sooner."""
    ready = client.request("GET", "/readyz")
    assert (ready.status_code, ready.json()["checks"]["redis"]) == (503, "ok")
    assert ready.json()["checks"]["database"] != "ok"
    assert ready.elapsed.total_seconds() < READY_WITHIN_SECONDS
    assert client.request("GET", "/healthz").status_code == 200
    with ThreadPoolExecutor(RUSH + 10) as threads:
        asked = {name: threads.submit(call) for name, call in calls(client, session_id).items()}
        asked["page"] = threads.submit(browser.get, f"{stack.url()}/", timeout=10)
        asked |= {f"look{n}": threads.submit(client.request, "GET", "/api/streams") for n in range(RUSH)}
        ready_in_the_rush = threads.submit(client.request, "GET", "/readyz")
        for name, answer in asked.items():
            assert_refused(name, answer.result(), REFUSED_WITHIN_SECONDS)
        assert ready_in_the_rush.result().elapsed.total_seconds() < READY_WITHIN_SECONDS


def assert_quiet(outage: Outage) -> None:
    """What is wrong is said, without tracebacks, and not too often; and no worker was taken for lost."""
    lines = outage.lines()
    said = [line["event"] for line in lines]
    assert "database.unavailable" in said
    assert [line for line in lines if "exception" in line] == []
    assert "worker.lost" not in said
    warnings = [line["event"] for line in lines if line["level"] not in ("info", "debug")]
    assert len(warnings) < 4 * EACH + WARNINGS_PER_SECOND * OUTAGE_SECONDS, {e: warnings.count(e) for e in warnings}


def test_an_outage(stack: Stack, client: Client, upstream: UpstreamProcess, outage: Outage) -> None:
    models = {f"name=n{n},{model}": model for model in (LASTING, ENDING) for n in range(EACH)}
    sessions = {model: client.post_message("go on", model=model) for model in models}
    readers = {model: client.follow(session["sessionId"]) for model, session in sessions.items()}
    for reader in readers.values():
        reader.wait_for_text(20)
    browser = signed_in(stack, client)
    flow = Flow(list(readers.values())[:EACH], len(expected_text(LASTING).content))
    with outage:
        assert_nothing_answers(stack, client, browser, sessions[next(iter(models))]["sessionId"])
        outage.sit_out()
        assert [reader.done for reader in readers.values()] == [None] * (2 * EACH)
        for model, reader in readers.items():
            if models[model] == ENDING:
                assert reader.text == expected_text(model).content
    flow.stop()
    assert flow.longest_pause_seconds < 1.5
    back_at = time.monotonic()
    for model, reader in readers.items():
        if models[model] == ENDING:
            assert reader.wait_until_done(10)["reason"] == "stop"
    assert time.monotonic() - back_at < TIMEOUT_SECONDS + 3
    for model, session in sessions.items():
        row = assert_ended(stack, upstream, session, [readers[model]], "stop")
        assert readers[model].text == expected_text(model).content
        assert row.attempt == 1
        assert_one_text(stack, client, session, client.terminate(session["sessionId"]), [readers[model]])
    assert client.request("GET", "/readyz").status_code == 200
    with ThreadPoolExecutor(RUSH) as threads:
        looks = threads.map(lambda _: client.request("GET", "/api/streams").status_code, range(RUSH))
        assert list(looks) == [200] * RUSH
    assert_quiet(outage)
