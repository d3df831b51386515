"""One stream's trouble is its own: a stop, and a reader that does not read, delay nobody else."""

from __future__ import annotations

import itertools
import socket
import statistics
import threading
import time
from collections.abc import Sequence
from typing import Any

import psutil
import pytest

from tests.functional.nodes import Client, Reader, Stack
from tests.functional.text import assert_one_text, sha256
from tests.services import wait_until

STREAMS = 50
PACE = 10
STOPPED = 10
PHASE_SECONDS = 4.0


def gaps(readers: Sequence[Reader], since: float, until: float) -> list[float]:
    """The seconds between one token and the next, of all readers, in a span of time."""
    found = []
    for reader in readers:
        moments = [event.received_at for event in reader.of("message") if since <= event.received_at < until]
        found += [later - earlier for earlier, later in itertools.pairwise(moments)]
    return found


def percentile(values: Sequence[float], hundredth: int) -> float:
    return statistics.quantiles(values, n=100)[hundredth - 1]


def test_a_stop_leaves_no_gap_in_the_others(stack: Stack, client: Client) -> None:
    """The distribution of the gaps between tokens is the same while ten of fifty streams are stopped."""
    model = f"pace={PACE},tokens=100000"
    sessions = [client.post_message("go on", model=f"name=n{number},{model}") for number in range(STREAMS)]
    readers = [client.follow(session["sessionId"]) for session in sessions]
    for reader in readers:
        reader.wait_for_text(20)
    pause = threading.Event()

    calm_from = time.monotonic()
    pause.wait(PHASE_SECONDS)
    calm_until = time.monotonic()
    receipts = []
    for session in sessions[:STOPPED]:
        receipts.append(client.terminate(session["sessionId"]))
        pause.wait(PHASE_SECONDS / STOPPED)
    stops_until = time.monotonic()

    others = readers[STOPPED:]
    calm, stops = gaps(others, calm_from, calm_until), gaps(others, calm_until, stops_until)
    assert min(len(calm), len(stops)) > len(others) * PHASE_SECONDS * PACE * 0.6
    for hundredth in (50, 95, 99):
        assert percentile(stops, hundredth) < percentile(calm, hundredth) * 1.5 + 0.05
    assert max(stops) < max(calm) + 0.25

    for session, receipt, reader in zip(sessions, receipts, readers, strict=False):
        assert_one_text(stack, client, session, receipt, [reader])
    for session, reader in zip(sessions[STOPPED:], others, strict=True):
        assert not reader.ended
        client.terminate(session["sessionId"])


TOKENS = 120_000
FAST_PACE = 4_000
SILENT_SECONDS = 60.0


@pytest.mark.timeout(240)
def test_a_reader_that_does_not_read(stack: Stack, client: Client) -> None:
    """It costs bounded memory and slows nobody; when it reads on, it gets everything."""
    session = client.post_message("go on", model=f"pace={FAST_PACE},tokens={TOKENS}")
    quick = client.follow(session["sessionId"])
    with socket.create_connection(_address(stack)) as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 131_072)  # not more is held for it by the kernel
        began = time.monotonic()
        lazy.sendall(_request(session, str(client.token)))
        wait_until(lambda: len(quick.text) > 100_000, 30, "the stream is well under way")
        before = _web_memory(stack)
        neighbour = client.post_message("and I?", model="pace=50,tokens=100")
        beside = client.follow(neighbour["sessionId"])
        done = quick.wait_until_done(120)
        beside.wait_until_done(60)
        threading.Event().wait(max(0.0, began + SILENT_SECONDS - time.monotonic()))
        grown = _web_memory(stack) - before
        text = _read_to_the_end(lazy)

    assert sha256(text) == done["sha256"] == quick.sha256
    assert done["length"] == len(text) > 700_000
    assert grown < 32 * 1024 * 1024
    assert percentile(gaps([beside], 0, time.monotonic()), 95) < 0.25


def _address(stack: Stack) -> tuple[str, int]:
    host, _, port = stack.url().removeprefix("http://").partition(":")
    return host, int(port)


def _request(session: dict[str, Any], token: str) -> bytes:
    return (
        f"GET /api/streams/{session['sessionId']}/events HTTP/1.1\r\nHost: sluicegate\r\n"
        f"Authorization: Bearer {token}\r\n\r\n"
    ).encode()


def _web_memory(stack: Stack) -> int:
    """Bytes that the web processes hold."""
    return sum(process.memory_info().rss for process in stack.web.family() if isinstance(process, psutil.Process))


def _read_to_the_end(connection: socket.socket) -> str:
    """The text of all that comes until the server closes."""
    import http.client
    import json

    response = http.client.HTTPResponse(connection)
    response.begin()
    pieces = []
    kind = "message"
    for line in response:
        if line.startswith(b"event: "):
            kind = line[7:].strip().decode()
        elif line.startswith(b"data: ") and kind == "message":
            pieces.append(json.loads(line[6:])["content"])
        elif line == b"\n":
            kind = "message"
    return "".join(pieces)
