"""The chaos suite's own eyes: a schedule is its seed's, and each way to break an invariant is seen, and named."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from bench import audit, schedule
from bench.schedule import FAULTS, ReaderPlan, StreamPlan
from bench.seen import Seen, Stop, Stream
from tests.functional.text import sha256

MODEL = "pace=3,tokens=4,thinking=2"
THINKING, CONTENT = "h0 h1 ", "t0 t1 t2 t3 "


def row_of(thinking: str, content: str, reason: str = "stop") -> SimpleNamespace:
    """A session's row with its message, as the audit reads it."""
    status = "COMPLETED" if reason == "stop" else "TERMINATED"
    told = {"length": len(content), "thinking_length": len(thinking), "sha256": sha256(content)}
    ending = {"status": status, "reason": reason, "message_status": status, "message_reason": reason}
    return SimpleNamespace(**told, **ending, content=content, thinking=thinking)


def done_of(row: SimpleNamespace) -> dict[str, Any]:
    """What readers and callers are told of it."""
    told = {name: getattr(row, name) for name in ("status", "reason", "length", "sha256")}
    return told | {"thinkingLength": row.thinking_length}


def reader_of(row: SimpleNamespace, **plan: float) -> Seen:
    """Somebody who read all of it, token by token."""
    seen, offset = Seen(ReaderPlan(0.0, **plan)), 0
    seen.take("session", None, {}, first=True)
    for name, text in (("thinking", row.thinking), ("message", row.content)):
        for token in text.split():
            offset += len(token) + 1
            seen.take(name, f"{offset}-0", {"content": f"{token} "}, first=False)
    seen.take("done", f"{offset}-9", done_of(row), first=False)
    return seen


def stream_of(row: SimpleNamespace, receipts: int = 2) -> Stream:
    """Its stream, as the crowd knows it."""
    plan = StreamPlan(0, 0, MODEL, 0.0, False, (), None, receipts)
    receipt = done_of(row) | {"partialResponse": row.content}
    return Stream(plan, 0.0, stops=[Stop(0.0, dict(receipt)) for _ in range(receipts)])


def found(stream: Stream, seen: Seen, row: SimpleNamespace) -> set[str]:
    """The checks that fail."""
    wrongs = itertools.chain(
        audit.wrong_text(stream, row), audit.wrong_seen(seen, row), audit.wrong_receipts(stream, row)
    )
    return {check for check, _ in wrongs}


def test_a_seed_is_one_schedule() -> None:
    load = schedule.Load(5, (5.0, 90.0), (2.0, 5.0), 0.1)

    def drawn(seed: int) -> list[object]:
        faults = schedule.faults(seed, 3.0, (0.1, 0.4), (1.0, 3.0), once=False)
        streams = (one for slot in range(5) for one in itertools.islice(schedule.streams(seed, slot, load), 20))
        return [*itertools.islice(faults, 100), *streams]

    assert drawn(7) == drawn(7)
    assert drawn(7) != drawn(8)


def test_every_kind_of_fault_comes_in_every_round() -> None:
    faults = schedule.faults(7, 3.0, (0.1, 0.4), (1.0, 3.0), once=True)
    for _ in range(3):
        assert {fault.kind for fault in itertools.islice(faults, len(FAULTS))} == FAULTS.keys()


@pytest.mark.parametrize("reason", ["stop", "user"])
def test_nothing_is_found_where_all_is_well(reason: str) -> None:
    row = row_of(THINKING, CONTENT if reason == "stop" else CONTENT[:6], reason)
    assert found(stream_of(row), reader_of(row), row) == set()


@pytest.mark.parametrize(
    ("saved", "reason"),
    [
        pytest.param((THINKING, "t0 t1 t3 "), "user", id="one missing"),
        pytest.param((THINKING, "t0 t1 t1 t2 "), "user", id="one twice"),
        pytest.param((THINKING, CONTENT[:-3]), "stop", id="not whole"),
        pytest.param(("h0 h0 h1 ", CONTENT), "stop", id="thinking twice"),
    ],
)
def test_what_is_saved_is_not_what_the_model_said(saved: tuple[str, str], reason: str) -> None:
    row = row_of(*saved, reason)
    assert found(stream_of(row), reader_of(row), row) == {audit.TOKENS}


def changed_receipt(stream: Stream, **changes: Any) -> None:
    receipt = stream.stops[0].receipt
    assert receipt is not None
    receipt.update(changes)


BREACHES: dict[str, tuple[Callable[[Stream, Seen], object], set[str]]] = {
    "saw something else": (lambda _, seen: setattr(seen, "content", "t0 t1 t2 x3 "), {audit.SEEN_IS_SAVED}),
    "saw less, and `done`": (lambda _, seen: setattr(seen, "content", CONTENT[:-3]), {audit.SEEN_IS_SAVED}),
    "saw more": (
        lambda _, seen: setattr(seen, "content", f"{CONTENT}t4 "),
        {audit.FENCE, audit.SEEN_IS_SAVED},
    ),
    "something after `done`": (
        lambda _, seen: seen.take("message", "21-0", {"content": "t4 "}, first=False),
        {audit.FENCE, audit.SEEN_IS_SAVED},
    ),
    "`done` twice": (
        lambda _, seen: seen.take("done", "18-10", seen.done, first=False),
        {audit.FENCE},
    ),
    "`done` says something else": (lambda _, seen: seen.done.update(length=1), {audit.SEEN_IS_SAVED}),
    "never saw `done`": (lambda _, seen: setattr(seen, "done", None), {audit.REACHED}),
    "two receipts": (lambda stream, _: changed_receipt(stream, committedAt="now"), {audit.RECEIPT}),
    "a receipt of another text": (
        lambda stream, _: [stop.receipt.update(partialResponse="t0 ") for stop in stream.stops],
        {audit.RECEIPT},
    ),
    "a call without an answer": (lambda stream, _: setattr(stream.stops[1], "receipt", None), {audit.LOST}),
}


@pytest.mark.parametrize("name", BREACHES)
def test_a_breach_is_seen_and_named(name: str) -> None:
    row = row_of(THINKING, CONTENT)
    stream, seen = stream_of(row), reader_of(row)
    breach, checks = BREACHES[name]
    breach(stream, seen)
    assert found(stream, seen, row) == checks


def test_ids_that_do_not_rise_or_count_are_seen() -> None:
    for identity in ("3-0", "7-0"):
        seen = Seen(ReaderPlan(0.0))
        seen.take("session", None, {}, first=True)
        seen.take("message", "3-0", {"content": "t0 "}, first=False)
        seen.take("message", identity, {"content": "t1 "}, first=False)
        assert {check for check, _ in audit.wrong_seen(seen, row_of("", CONTENT))} == {audit.ORDER, audit.REACHED}


def test_who_leaves_early_may_have_less_and_no_end() -> None:
    row = row_of(THINKING, CONTENT)
    seen = replace(reader_of(row, leaves_seconds=1.0), content="t0 ", done=None)
    assert found(stream_of(row), seen, row) == set()
