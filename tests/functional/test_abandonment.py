"""What becomes of a stream that nobody watches: it goes on, or, where that was asked for, ends after a grace."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.functional.ending import assert_ended, rows_of
from tests.functional.nodes import Client, Reader, Stack
from tests.services import wait_until
from tests.upstream import UpstreamProcess, expected_text

GRACE_SECONDS = 2.0
REPORT_SECONDS = GRACE_SECONDS / 4
"""Between two reports of a web process on who is watching."""
REAP_SECONDS = 2.0
LATE_SECONDS = 3.0
"""That a machine may be late which does other things as well."""
NOTICED_SECONDS = 1.0

SPEAKS = "pace=40,tokens=100000,alphabet=mixed"
FALLS_SILENT = "pace=100,tokens=50,silence_at=10:60"
LOADS = "load_seconds=60"
TOO_MUCH = "pace=100,tokens=60,width=100000,silence_at=50:60"
"""More than the kernel holds for a connection whose reader does not read."""
MODELS = {"speaks": SPEAKS, "silent": FALLS_SILENT, "loads": LOADS}


@pytest.fixture(scope="module")
def stack_database() -> str:
    return "sqlite"


@pytest.fixture(scope="module")
def stack_settings() -> Mapping[str, str]:
    return {"SLUICEGATE_ABANDON_GRACE_SECONDS": str(GRACE_SECONDS), "SLUICEGATE_LEASE_RENEW_SECONDS": "0.1"}


@pytest.fixture(scope="module")
def module_stack(module_stack: Stack) -> Stack:
    """With a reaper, and a second web process where streams end with their readers unless a request says otherwise."""
    module_stack.start_web(settings={"SLUICEGATE_ON_DISCONNECT": "terminate"})
    module_stack.start_recovery()
    module_stack.keep()
    return module_stack


@pytest.fixture
def other(stack: Stack) -> Client:
    """The API at the second web process."""
    return stack.client(web=stack.webs[1])


def begin(client: Client, name: str, model: str, on_disconnect: str | None = "terminate") -> dict[str, Any]:
    return client.post_message("go on", model=f"name={name},{model}", on_disconnect=on_disconnect)


def leave(stack: Stack, session: dict[str, Any], *readers: Reader) -> datetime:
    """Have all of a stream's readers leave, which is noticed soon; the moment at which the last has gone."""
    client = stack.client()
    wait_until(lambda: client.stream(session["sessionId"])["viewers"] == len(readers), 5, "all readers are known")
    for reader in readers:
        reader.leave()
    left_at = datetime.now(UTC)
    wait_until(
        lambda: client.stream(session["sessionId"])["viewers"] == 0, NOTICED_SECONDS, "they are known to be gone"
    )
    # The grace begins only now.
    abandon_at = rows_of(stack, session["sessionId"])[0].abandon_at
    assert abandon_at is not None
    assert abandon_at >= left_at + timedelta(seconds=GRACE_SECONDS)
    return left_at


def assert_abandoned(
    stack: Stack, client: Client, upstream: UpstreamProcess, session: dict[str, Any], since: datetime
) -> str:
    """It ends, not before its grace was over, and not long after. Returns the partial."""
    wait_until(lambda: client.stream(session["sessionId"])["status"] != "ACTIVE", 12, "nobody watches, so it ends")
    late = client.follow(session["sessionId"])
    row = assert_ended(stack, upstream, session, [late], "abandoned")
    assert row.ended_at is not None
    grace_seconds = (row.ended_at - since).total_seconds()
    assert GRACE_SECONDS - 0.01 <= grace_seconds < GRACE_SECONDS + REPORT_SECONDS + REAP_SECONDS + LATE_SECONDS
    receipt = client.terminate(session["sessionId"])
    assert (receipt["status"], receipt["alreadyEnded"]) == ("TERMINATED", True)
    return late.text


def test_nobody_is_there(stack: Stack, client: Client, other: Client, upstream: UpstreamProcess) -> None:
    """It speaks, is silent, or loads its model; its readers leave, or who sent it does, or nobody ever came."""
    unread = {what: begin(client, f"unread-{what}", model) for what, model in MODELS.items()}
    by_setting = begin(other, "by-setting", FALLS_SILENT, None)
    read = {what: begin(client, f"read-{what}", model) for what, model in MODELS.items()}
    readers = {what: client.follow(session["sessionId"]) for what, session in read.items()}
    for what in ("speaks", "silent"):
        readers[what].wait_for_text(30)
    left_at = {what: leave(stack, session, readers[what]) for what, session in read.items()}
    with client.post_stream("go on", model=f"name=posted,{FALLS_SILENT}", on_disconnect="terminate") as posted:
        next(event for event in posted if event.event == "message")
    posted_left_at = datetime.now(UTC)
    for what, session in read.items():
        partial = assert_abandoned(stack, client, upstream, session, left_at[what])
        assert partial.startswith(readers[what].text)
        assert partial.startswith("t0") is (what != "loads")
    for session in (*unread.values(), by_setting):
        assert_abandoned(stack, client, upstream, session, rows_of(stack, session["sessionId"])[0].started_at)
    assert_abandoned(stack, client, upstream, client.stream(posted.session_id), posted_left_at)
    assert [one.outcome for one in upstream.requests()] == ["disconnected"] * 8


def test_somebody_is_there(stack: Stack, client: Client, other: Client, upstream: UpstreamProcess) -> None:
    """One who comes back in time, one who stays while another leaves, one who hardly reads; or it needs nobody."""
    silent = f"{FALLS_SILENT},thinking=3"
    reloaded, shared = begin(client, "reloaded", silent), begin(client, "shared", silent)
    slow = begin(client, "slow", TOO_MUCH)
    alone = [begin(client, "alone", silent, None), begin(other, "alone-too", silent, "continue")]
    first, second = client.follow(shared["sessionId"]), other.follow(shared["sessionId"])
    wait_until(lambda: client.stream(shared["sessionId"])["viewers"] == 2, 5, "both are known, wherever they are")

    with slow_reader(stack, client, slow) as read_slowly:
        before = client.follow(reloaded["sessionId"])
        before.wait_for_text(20)
        left_at = leave(stack, reloaded, before)
        first.leave()
        wait_until(
            lambda: other.stream(shared["sessionId"])["viewers"] == 1, NOTICED_SECONDS, "one is known to be gone"
        )
        wait_until(lambda: (datetime.now(UTC) - left_at).total_seconds() > 0.6 * GRACE_SECONDS, 5)
        after = client.follow(reloaded["sessionId"], before.last_event_id)
        wait_until(lambda: client.stream(reloaded["sessionId"])["viewers"] == 1, 5, "the reader is back")

        # Whatever could end one of these ends this one, which is left behind after them at both web processes.
        control = begin(client, "control", silent)
        watching = [client.follow(control["sessionId"]), other.follow(control["sessionId"])]
        control_left_at = leave(stack, control, *watching)
        assert_abandoned(stack, client, upstream, control, control_left_at)

        kept = [reloaded, shared, slow, *alone]
        assert [client.stream(one["sessionId"])["status"] for one in kept] == ["ACTIVE"] * len(kept)
        assert [client.stream(one["sessionId"])["viewers"] for one in kept] == [1, 1, 1, 0, 0]
        receipts = [client.terminate(one["sessionId"]) for one in kept]
        assert before.text + after.text == receipts[0]["partialResponse"]
        assert read_slowly() == receipts[2]["partialResponse"]
    second.wait_until_done()
    assert second.text == receipts[1]["partialResponse"]
    assert_ended(stack, upstream, shared, [second], "user")


@contextmanager
def slow_reader(stack: Stack, client: Client, session: dict[str, Any]) -> Iterator[Any]:
    """One whose connection is full: it takes a byte now and then. Yields what reads the rest: the content of all."""
    url = urlsplit(stack.url())
    path = f"/api/streams/{session['sessionId']}/events"
    request = f"GET {path} HTTP/1.0\r\nHost: {url.netloc}\r\nAuthorization: Bearer {client.token}\r\n\r\n"
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(20)
        connection.connect((url.hostname, url.port))
        connection.sendall(request.encode())
        taken = [connection.recv(1)]
        stopped = threading.Event()

        def sip() -> None:
            while not stopped.wait(0.2):
                taken.append(connection.recv(1))

        def read_the_rest() -> str:
            stopped.set()
            thread.join()
            while piece := connection.recv(65_536):
                taken.append(piece)
            return _content(b"".join(taken))

        thread = threading.Thread(target=sip)
        thread.start()
        try:
            yield read_the_rest
        finally:
            stopped.set()
            thread.join()


def _content(response: bytes) -> str:
    """The content of the messages in a whole response."""
    events = [event.splitlines() for event in response.decode().split("\n\n")]
    data = [line for lines in events for line in lines if line.startswith("data: ") and not _named(lines)]
    return "".join(json.loads(line.removeprefix("data: "))["content"] for line in data)


def _named(lines: list[str]) -> bool:
    return any(line.startswith("event:") for line in lines)


def test_nobody_needs_to_be_there(stack: Stack, client: Client, other: Client, upstream: UpstreamProcess) -> None:
    """By default, and where a request says so, a stream runs on to its end: longer than any grace."""
    model = f"pace=10,tokens={int(10 * (GRACE_SECONDS + REPORT_SECONDS + REAP_SECONDS))}"
    sessions = [begin(client, "default", model, None), begin(other, "override", model, "continue")]
    for session in sessions:
        wait_until(lambda one=session: client.stream(one["sessionId"])["status"] != "ACTIVE", 15)
        reader = client.follow(session["sessionId"])
        assert_ended(stack, upstream, session, [reader], "stop")
        assert reader.text == expected_text(model).content


def test_nobody_is_there_while_it_is_queued(stack: Stack, client: Client, upstream: UpstreamProcess) -> None:
    """No worker runs: one that nobody ever read, and one whose reader left, end unbegun; one that is read waits."""
    stack.worker.container.process.kill()
    unread, read, waiting = (begin(client, name, "tokens=5") for name in ("unread", "read", "waiting"))
    reader = client.follow(waiting["sessionId"])
    left_at = leave(stack, read, client.follow(read["sessionId"]))
    assert assert_abandoned(stack, client, upstream, read, left_at) == ""
    started_at = rows_of(stack, unread["sessionId"])[0].started_at
    assert assert_abandoned(stack, client, upstream, unread, started_at) == ""
    assert client.stream(waiting["sessionId"])["status"] == "ACTIVE"
    assert upstream.requests() == []
    client.terminate(waiting["sessionId"])
    assert_ended(stack, upstream, waiting, [reader], "user")
