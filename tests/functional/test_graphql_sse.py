"""Subscriptions with the client that others use, the npm package graphql-sse, against the whole system."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.functional.nodes import COMMAND_TIMEOUT_SECONDS, Client, Stack
from tests.services import WaitTimeout, wait_until
from tests.upstream import UpstreamProcess, expected_text

DIRECTORY = Path(__file__).parent / "graphql_client"
MIXED = "pace=100,tokens=60,thinking=5,alphabet=mixed"
ENDLESS = "pace=50,tokens=100000"

Subscribe = Callable[..., "Subscriber"]


class Subscriber:
    """A process of Node that follows one stream; see `follow.mjs`."""

    def __init__(self, client: Client, session_id: str, after: str | None = None) -> None:
        command = ["node", "follow.mjs", f"{client.base_url}/graphql", str(client.token), session_id]
        self.said: list[dict[str, Any]] = []
        self._process = subprocess.Popen(
            command + ([after] if after else []),
            cwd=DIRECTORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        self.said.extend(map(json.loads, self._process.stdout))

    @property
    def events(self) -> list[dict[str, Any]]:
        """The results so far, which must be without errors."""
        return [one["data"]["streamEvents"] for one in self.said if "data" in one]

    @property
    def text(self) -> str:
        return "".join(one["content"] for one in self.events if one["__typename"] == "MessageEvent")

    @property
    def thinking(self) -> str:
        return "".join(one["content"] for one in self.events if one["__typename"] == "ThinkingEvent")

    def wait_for_text(self, length: int) -> None:
        wait_until(lambda: len(self.text) >= length, 20, f"{length} code points of text")

    def wait_until_complete(self) -> dict[str, Any]:
        """Wait until the client was told that the stream is complete; the `DoneEvent`, which came last."""
        self._thread.join(30)
        if not self.said or self.said[-1] != {"complete": True}:
            raise WaitTimeout(f"not complete: {self.said[-1:]}")
        assert [one["__typename"] for one in self.events].count("DoneEvent") == 1
        return self.events[-1]

    def leave(self) -> None:
        """Have the client dispose of its subscription, while the process goes on."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._thread.join(5)


@pytest.fixture(scope="session")
def node_modules() -> None:
    """What the lock file names, installed once and whenever it has changed."""
    if not shutil.which("npm") or not shutil.which("node"):
        pytest.skip("there is no npm: install Node.js")
    installed, lock = DIRECTORY / "node_modules" / ".package-lock.json", DIRECTORY / "package-lock.json"
    if installed.exists() and installed.stat().st_mtime >= lock.stat().st_mtime:
        return
    command = ["npm", "ci", "--prefer-offline", "--no-audit", "--no-fund", "--ignore-scripts"]
    subprocess.run(command, cwd=DIRECTORY, check=True, timeout=COMMAND_TIMEOUT_SECONDS)


@pytest.fixture
def subscribe(node_modules: None, stack: Stack, client: Client) -> Iterator[Subscribe]:
    """Makes subscribers, which end with the test."""
    made: list[Subscriber] = []

    def make(session_id: str, after: str | None = None, client: Client = client) -> Subscriber:
        made.append(Subscriber(client, session_id, after))
        return made[-1]

    yield make
    for subscriber in made:
        subscriber.end()


def test_the_lock_file_names_no_registry() -> None:
    """Or nobody behind another one could install from it."""
    assert "http" not in (DIRECTORY / "package-lock.json").read_text(encoding="utf-8")


def test_from_the_start_to_done(client: Client, subscribe: Subscribe) -> None:
    # Both are there before the first token: who comes later gets what lies behind in larger pieces.
    session = client.post_message("hello", model=f"{MIXED},load_seconds=1.5")
    subscriber, reader = subscribe(session["sessionId"]), client.follow(session["sessionId"])
    done = subscriber.wait_until_complete()
    message = client.message(session)
    assert (subscriber.thinking, subscriber.text) == (message["thinking"], message["content"]) == expected_text(MIXED)
    assert (done["status"], done["length"]) == ("COMPLETED", len(subscriber.text))
    assert done["sha256"] == reader.wait_until_done()["sha256"]
    assert subscriber.events[0]["__typename"] == "SessionEvent"
    assert [one["id"] for one in subscriber.events if one["id"]] == reader.ids


def test_from_the_middle_to_the_exact_rest(client: Client, subscribe: Subscribe) -> None:
    session = client.post_message("hello", model=MIXED)
    first = subscribe(session["sessionId"])
    first.wait_for_text(50)
    live = subscribe(session["sessionId"], next(one["id"] for one in first.events[5:] if one["id"]))
    first.wait_until_complete()
    live.wait_until_complete()
    whole, ids = first.thinking + first.text, [one["id"] for one in first.events if one["id"]]
    assert whole.endswith(live.thinking + live.text)
    for cursor in (ids[len(ids) // 3], ids[-2]):
        rest = subscribe(session["sessionId"], cursor)
        rest.wait_until_complete()
        assert rest.thinking + rest.text == whole[int(cursor.split("-")[0]) :]
    nothing = subscribe(session["sessionId"], ids[-1])
    wait_until(lambda: nothing.said, 10, "the client is told something")
    assert nothing.said == [{"complete": True}]


def test_terminated_in_the_middle(client: Client, subscribe: Subscribe, upstream: UpstreamProcess) -> None:
    session = client.post_message("hello", model=ENDLESS)
    subscriber = subscribe(session["sessionId"])
    subscriber.wait_for_text(40)
    query = """mutation($id: ID!) {terminateStream(input: {sessionId: $id}) {
      ... on TerminationReceipt {status reason length sha256 partialResponse}}}"""
    asked = {"query": query, "variables": {"id": session["sessionId"]}}
    receipt = client.call("POST", "/graphql", asked)["data"]["terminateStream"]
    done = subscriber.wait_until_complete()
    assert (done["status"], done["reason"]) == (receipt["status"], receipt["reason"]) == ("TERMINATED", "user")
    assert (done["length"], done["sha256"]) == (receipt["length"], receipt["sha256"])
    assert subscriber.text == receipt["partialResponse"] == client.message(session)["content"]
    assert upstream.open_count() == 0


def test_a_client_that_leaves_is_a_viewer_no_more(client: Client, subscribe: Subscribe) -> None:
    """Also in a silence, where nothing is written that could fail."""
    session = client.post_message("hello", model="pace=100,silence_at=10:60")
    subscriber = subscribe(session["sessionId"])
    subscriber.wait_for_text(20)
    wait_until(lambda: client.stream(session["sessionId"])["viewers"] == 1, 10, "the subscriber is a viewer")
    subscriber.leave()
    wait_until(lambda: client.stream(session["sessionId"])["viewers"] == 0, 5, "there is no viewer")
    assert client.stream(session["sessionId"])["status"] == "ACTIVE"
    client.terminate(session["sessionId"])


def test_curl(client: Client) -> None:
    """As the documents have it; and the connection is closed, for it was watched for the reader's leaving."""
    session = client.post_message("hello", model="pace=100,tokens=12")
    query = """subscription ($id: ID!) {streamEvents(sessionId: $id) {
      __typename ... on MessageEvent {id content} ... on DoneEvent {id status length}}}"""
    command = ["curl", "-siNG", f"{client.base_url}/graphql", "-H", f"Authorization: Bearer {client.token}"]
    command += ["-H", "Accept: text/event-stream", "--data-urlencode", f"query={query}"]
    command += ["--data-urlencode", f"variables={json.dumps({'id': session['sessionId']})}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    head, _, body = done.stdout.replace("\r\n", "\n").partition("\n\n")
    assert "Connection: close" in head.split("\n")
    assert body.count('"MessageEvent"') == 12
    assert body.endswith("event: complete\ndata:\n\n")


def test_a_silence_disturbs_nobody(stack: Stack, client: Client, subscribe: Subscribe) -> None:
    """The client takes comments for what they are; and a stream goes on after them."""
    web = stack.start_web(settings={"SLUICEGATE_KEEPALIVE_SECONDS": "0.3"})
    session = client.post_message("hello", model="pace=100,tokens=20,silence_at=10:2")
    subscriber = subscribe(session["sessionId"], client=stack.client(web=web))
    assert subscriber.wait_until_complete()["status"] == "COMPLETED"
    assert subscriber.text == client.message(session)["content"]


def test_a_web_process_that_stops_breaks_the_stream_off(stack: Stack, client: Client, subscribe: Subscribe) -> None:
    """It does not say that it is complete: the client is to come back, and gets exactly the rest."""
    session = client.post_message("hello", model="pace=50,tokens=150")
    subscriber = subscribe(session["sessionId"])
    subscriber.wait_for_text(60)
    stack.web.restart()
    wait_until(lambda: "error" in subscriber.said[-1], 10, "the client is told of the break")
    cursor = next(one["id"] for one in reversed(subscriber.events) if one["id"])
    rest = subscribe(session["sessionId"], cursor)
    rest.wait_until_complete()
    assert subscriber.text + rest.text == client.message(session)["content"]
