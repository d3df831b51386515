"""One stream's trouble is its own: a stop, and a reader that does not read, delay nobody else."""

from __future__ import annotations

import itertools
import os
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
ROUNDS = 3
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
    """The distribution of the gaps between tokens is the same while ten of fifty streams are stopped.

    The best of three rounds counts: what else the machine does can only add to the gaps, and a gap that a stop makes
    would be in each.
    """
    model = f"pace={PACE},tokens=100000"
    sessions = [client.post_message("go on", model=f"name=n{number},{model}") for number in range(STREAMS)]
    readers = [client.follow(session["sessionId"]) for session in sessions]
    for reader in readers:
        reader.wait_for_text(20)
    others = readers[ROUNDS * STOPPED :]
    disturbed = []
    for number in range(ROUNDS):
        stopped = range(number * STOPPED, (number + 1) * STOPPED)
        calm, stops = gaps_beside_stops(client, [sessions[index] for index in stopped], others)
        assert min(len(calm), len(stops)) > len(others) * PHASE_SECONDS * PACE * 0.6
        for index in stopped:
            receipt = client.terminate(sessions[index]["sessionId"])
            assert_one_text(stack, client, sessions[index], receipt, [readers[index]])
        longer = [
            (hundredth, percentile(calm, hundredth), percentile(stops, hundredth))
            for hundredth in (50, 95, 99)
            if percentile(stops, hundredth) >= percentile(calm, hundredth) * 1.5 + 0.05
        ]
        if max(stops) >= max(calm) + 0.25:
            longer.append((100, max(calm), max(stops)))
        if not longer:
            break
        disturbed.append(longer)
    assert len(disturbed) < ROUNDS, f"percentile, seconds before and beside the stops: {disturbed}"
    assert not any(reader.ended for reader in others)


def gaps_beside_stops(
    client: Client, sessions: Sequence[dict[str, Any]], others: Sequence[Reader]
) -> tuple[list[float], list[float]]:
    """The gaps of the others for some seconds, and for as long again while these sessions are stopped."""
    pause = threading.Event()
    calm_from = time.monotonic()
    pause.wait(PHASE_SECONDS)
    calm_until = time.monotonic()
    for session in sessions:
        client.terminate(session["sessionId"])
        pause.wait(PHASE_SECONDS / len(sessions))
    return gaps(others, calm_from, calm_until), gaps(others, calm_until, time.monotonic())


SILENT_SECONDS = float(os.environ.get("SLUICEGATE_TEST_SILENT_READER_SECONDS", "20"))
FAST_PACE = 4_000
TOKENS = 60_000
"""Some megabytes of events: more than the kernel holds for a reader."""


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
    assert done["length"] == len(text) > 5 * TOKENS
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
