"""Another process holds SQLite's write lock: for a moment, which is but a delay; for long, which is a clear refusal.

Nobody is ever told that the database is locked, and text flows on.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Final
from uuid import uuid4

import pytest
import requests

from tests.functional.ending import assert_ended
from tests.functional.nodes import Client, Stack
from tests.functional.refusals import Flow, assert_refused, before_signing_in, signed_in
from tests.functional.text import assert_one_text
from tests.services import wait_until
from tests.upstream import UpstreamProcess, expected_text

BUSY_SECONDS: Final = 2.0
SHORT_SECONDS: Final = 1.0
LONG_SECONDS: Final = 6.0
REFUSED_WITHIN_SECONDS: Final = BUSY_SECONDS + 2.0
PACE: Final = 40
LASTING: Final = f"pace={PACE},tokens={int((LONG_SECONDS + 2) * PACE)},alphabet=mixed"
ENDING: Final = f"pace={PACE},tokens={int(LONG_SECONDS / 2 * PACE)},alphabet=mixed"
BRIEF: Final = f"pace={PACE},tokens={int((SHORT_SECONDS + 1) * PACE)}"
ENDLESS: Final = f"pace={PACE},tokens=100000"
SECRETS: Final = ("locked", "OperationalError", "sqlite", "Traceback")

pytestmark = pytest.mark.usefixtures("recovery")


@pytest.fixture(scope="module")
def stack_database() -> str:
    return "sqlite"


@pytest.fixture(scope="module")
def stack_settings() -> Mapping[str, str]:
    return {
        "SLUICEGATE_DATABASE_BUSY_SECONDS": str(BUSY_SECONDS),
        "SLUICEGATE_LEASE_SECONDS": "3",
        "SLUICEGATE_LEASE_RENEW_SECONDS": "0.3",
        "SLUICEGATE_HEARTBEAT_SECONDS": "0.5",
    }


@contextmanager
def locked(stack: Stack) -> Iterator[None]:
    """Nobody else can write."""
    path = stack.environment["DATABASE_URL"].removeprefix("sqlite:///")
    connection = sqlite3.connect(path, timeout=10, isolation_level=None)
    try:
        connection.execute("BEGIN IMMEDIATE")
        yield
    finally:
        connection.close()


def begin(client: Client, *models: str) -> list[tuple[dict[str, Any], Any]]:
    """Streams under way, each with a reader."""
    sessions = [client.post_message("go on", model=f"name={uuid4().hex[:8]},{model}") for model in models]
    streams = [(session, client.follow(session["sessionId"])) for session in sessions]
    for _, reader in streams:
        reader.wait_for_text(20)
    return streams


def writes(stack: Stack, client: Client, session_id: str) -> dict[str, Callable[[], requests.Response]]:
    """One call of each kind that has something to write."""
    json_wanted = {"Accept": "application/json"}
    message = {"content": "hello", "model": "tokens=3"}
    browser, form = before_signing_in(stack, client)
    return {
        "send": lambda: client.request("POST", "/api/stream-message", json=message, headers=json_wanted),
        "create": lambda: client.request("POST", "/api/conversations", json={"title": "a title"}),
        "stop": lambda: client.request("POST", "/api/terminate-stream", json={"sessionId": session_id}),
        "sign in": lambda: browser.post(f"{stack.url()}/sign-in", data=form, timeout=20, allow_redirects=False),
    }


def reads(stack: Stack, client: Client, session_id: str) -> dict[str, Callable[[], requests.Response]]:
    """One call of each kind that has nothing to write."""
    browser = signed_in(stack, client)
    return {
        "page": lambda: browser.get(f"{stack.url()}/", timeout=20, allow_redirects=False),
        "list": lambda: client.request("GET", "/api/conversations"),
        "stream": lambda: client.request("GET", f"/api/streams/{session_id}"),
        "streams": lambda: client.request("GET", "/api/streams"),
        "graphql": lambda: client.request("POST", "/graphql", json={"query": "{ me { name } }"}),
        "healthz": lambda: client.request("GET", "/healthz"),
    }


def graphql_write(client: Client) -> requests.Response:
    query = 'mutation { createConversation(title: "a title") { id } }'
    return client.request("POST", "/graphql", json={"query": query})


def assert_discreet(*texts: str) -> None:
    """Nobody is told what is not theirs to know."""
    for text in texts:
        assert [word for word in SECRETS if word in text] == []


def assert_whole(stack: Stack, client: Client, upstream: UpstreamProcess, streams: list[tuple[Any, Any]]) -> None:
    for session, reader in streams:
        reader.wait_until_done()
        row = assert_ended(stack, upstream, session, [reader], "stop")
        assert reader.text == expected_text(row.model).content
        assert row.attempt == 1
        assert_one_text(stack, client, session, client.terminate(session["sessionId"]), [reader])


def assert_logs_are_quiet(stack: Stack) -> None:
    """No process has met what it did not reckon with."""
    for process in stack.processes():
        assert "Traceback" not in process.log()
        assert "worker.lost" not in process.log()


def test_a_short_lock(stack: Stack, client: Client, upstream: UpstreamProcess) -> None:
    """Everything succeeds, what writes a little later; streams begin, flow, and end."""
    streams = begin(client, BRIEF, f"pace={PACE},tokens={PACE}")
    stopped = begin(client, ENDLESS)[0]
    calls = writes(stack, client, stopped[0]["sessionId"]) | reads(stack, client, stopped[0]["sessionId"])
    flow = Flow([streams[0][1]], len(expected_text(BRIEF).content))
    with ThreadPoolExecutor(20) as threads:
        with locked(stack):
            asked = {name: threads.submit(call) for name, call in calls.items()}
            asked["graphql write"] = threads.submit(graphql_write, client)
            command = threads.submit(stack.cli_result, "users", "create", f"u{uuid4().hex[:8]}")
            over_at = time.monotonic() + SHORT_SECONDS
            wait_until(lambda: time.monotonic() > over_at, SHORT_SECONDS + 1)
            assert not any(asked[name].done() for name in ("send", "create", "sign in"))
        flow.stop()
        for name, answer in asked.items():
            assert (name, answer.result().status_code < 400) == (name, True)
            assert "errors" not in answer.result().text
        assert command.result().returncode == 0
    assert flow.longest_pause_seconds < 1
    begun = asked["send"].result().json()
    assert client.follow(begun["sessionId"]).wait_until_done()["reason"] == "stop"
    receipt = asked["stop"].result().json()
    assert_one_text(stack, client, stopped[0], receipt, [stopped[1]])
    assert_whole(stack, client, upstream, streams)
    assert_logs_are_quiet(stack)


def test_a_long_lock(stack: Stack, client: Client, upstream: UpstreamProcess) -> None:
    """What writes is refused in time, what reads is answered; what ended meanwhile is saved when the lock is gone."""
    streams = begin(client, LASTING, LASTING, ENDING, ENDING)
    stopped = begin(client, ENDLESS)[0]
    session_id = stopped[0]["sessionId"]
    refused, answered = writes(stack, client, session_id), reads(stack, client, session_id)
    flow = Flow([reader for _, reader in streams[:2]], len(expected_text(LASTING).content))
    with ThreadPoolExecutor(30) as threads, locked(stack):
        over_at = time.monotonic() + LONG_SECONDS
        asked = {name: threads.submit(call) for name, call in (refused | answered).items()}
        ready, told = threads.submit(client.request, "GET", "/readyz"), threads.submit(graphql_write, client)
        command = threads.submit(stack.cli_result, "users", "create", f"u{uuid4().hex[:8]}")
        for name in refused:
            assert_refused(name, asked[name].result(), REFUSED_WITHIN_SECONDS)
        for name in answered:
            assert (name, asked[name].result().status_code) == (name, 200)
            assert asked[name].result().elapsed.total_seconds() < 1
        (error,) = told.result().json()["errors"]
        assert (error["extensions"]["code"], error["extensions"]["status"]) == ("unavailable", 503)
        assert (ready.result().status_code, ready.result().elapsed.total_seconds() < 3.5) == (503, True)
        said = command.result()
        assert (said.returncode, said.stdout) == (1, "")
        assert "the database is busy" in said.stderr
        assert_discreet(*(answer.result().text for answer in asked.values()), told.result().text, ready.result().text)
        wait_until(lambda: time.monotonic() > over_at, LONG_SECONDS + 1)
        assert [reader.done for _, reader in streams] == [None] * 4
        assert [reader.text for _, reader in streams[2:]] == [expected_text(ENDING).content] * 2
    unlocked_at = time.monotonic()
    for _, reader in streams[2:]:
        reader.wait_until_done()
    assert time.monotonic() - unlocked_at < 3
    flow.stop()
    assert flow.longest_pause_seconds < 1
    receipt = client.terminate(session_id)
    assert_one_text(stack, client, stopped[0], receipt, [stopped[1]])
    assert_whole(stack, client, upstream, streams)
    assert client.request("GET", "/readyz").status_code == 200
    assert_logs_are_quiet(stack)
