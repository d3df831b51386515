"""Views: their members are the contract's, and their JSON is made in one place."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from uuid import UUID

import pytest

from webapp.streams.lifecycle import StreamPhase, StreamStatus, TerminationReason
from webapp.views import (
    ConversationView,
    MessageView,
    ReceiptView,
    SessionView,
    UserView,
    View,
    camel_case,
    timestamp,
)

MOMENT = datetime(2026, 2, 3, 4, 5, 6, 789, tzinfo=UTC)
SHOWN = "2026-02-03T04:05:06.000789Z"
ID = UUID("018f0000-0000-7000-8000-000000000001")
# As the wire contract lists them; more is welcome, less is a defect.
CONTRACT: dict[type[View], set[str]] = {
    ConversationView: {"id", "title", "role", "createdAt"},
    MessageView: {
        "id",
        "role",
        "content",
        "thinking",
        "status",
        "reason",
        "model",
        "sessionId",
        "length",
        "createdAt",
        "stats",
    },
    SessionView: {
        "sessionId",
        "conversationId",
        "messageId",
        "model",
        "status",
        "phase",
        "reason",
        "length",
        "attempt",
        "startedAt",
        "endedAt",
        "terminatedBy",
        "viewers",
    },
    ReceiptView: {
        "sessionId",
        "conversationId",
        "messageId",
        "status",
        "reason",
        "alreadyEnded",
        "partialResponse",
        "length",
        "thinkingLength",
        "sha256",
        "requestedAt",
        "fencedAt",
        "upstreamClosedAt",
        "committedAt",
    },
}


@dataclass(frozen=True, slots=True)
class Inner(View):
    some_id: UUID
    at: datetime | None


@dataclass(frozen=True, slots=True)
class Outer(View):
    inner: Inner
    many: list[Inner]
    status: StreamStatus
    free_form: dict[str, Any]


def receipt(**changes: Any) -> ReceiptView:
    values: dict[str, Any] = {
        "session_id": ID,
        "conversation_id": ID,
        "message_id": ID,
        "status": StreamStatus.TERMINATED,
        "reason": TerminationReason.USER,
        "already_ended": False,
        "partial_response": "שלום 👩‍👩‍👧‍👦",
        "length": 12,
        "thinking_length": 0,
        "sha256": "0" * 64,
        "requested_at": MOMENT,
        "fenced_at": MOMENT,
        "upstream_closed_at": None,
        "committed_at": MOMENT,
    }
    return ReceiptView(**(values | changes))


@pytest.mark.parametrize(
    ("name", "expected"),
    [("session_id", "sessionId"), ("sha256", "sha256"), ("upstream_closed_at", "upstreamClosedAt"), ("a_1b", "a1b")],
)
def test_names_are_in_camel_case(name: str, expected: str) -> None:
    assert camel_case(name) == expected


@pytest.mark.parametrize(
    "moment", [MOMENT, MOMENT.astimezone(timezone(timedelta(hours=5, minutes=30))), MOMENT.astimezone()]
)
def test_a_moment_is_in_utc_wherever_it_was_taken(moment: datetime) -> None:
    assert timestamp(moment) == SHOWN


def test_a_whole_second_keeps_its_microseconds() -> None:
    assert timestamp(MOMENT.replace(microsecond=0)) == "2026-02-03T04:05:06.000000Z"


def test_what_is_nested_is_plain_json() -> None:
    view = Outer(Inner(ID, MOMENT), [Inner(ID, None)], StreamStatus.ERROR, {"snake_case": 1})
    expected = {
        "inner": {"someId": str(ID), "at": SHOWN},
        "many": [{"someId": str(ID), "at": None}],
        "status": "ERROR",
        "freeForm": {"snake_case": 1},  # another's own words stay as they are
    }
    assert view.as_dict() == expected
    assert json.loads(json.dumps(view.as_dict())) == expected


@pytest.mark.parametrize("view", CONTRACT)
def test_a_view_has_every_member_of_the_contract(view: type[View]) -> None:
    names = {camel_case(field.name) for field in dataclasses.fields(view)}  # type: ignore[arg-type]
    assert names >= CONTRACT[view]


@pytest.mark.parametrize("view", [*CONTRACT, UserView])
def test_a_view_is_frozen_and_shows_no_secret(view: type[View]) -> None:
    assert view.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert not {field.name for field in dataclasses.fields(view)} & {"token", "token_hash"}  # type: ignore[arg-type]


def test_a_receipt_is_shown_whole() -> None:
    shown = receipt().as_dict()
    assert set(shown) == CONTRACT[ReceiptView]
    assert (shown["status"], shown["reason"], shown["alreadyEnded"]) == ("TERMINATED", "user", False)
    assert (shown["requestedAt"], shown["upstreamClosedAt"]) == (SHOWN, None)
    assert shown["partialResponse"] == "שלום 👩‍👩‍👧‍👦"


def test_equal_receipts_are_equal() -> None:
    assert receipt() == receipt()
    assert receipt() != receipt(length=11)


@pytest.mark.parametrize("status", StreamStatus)
def test_a_session_is_active_only_in_that_status(status: StreamStatus) -> None:
    view = SessionView(
        session_id=ID,
        conversation_id=ID,
        message_id=ID,
        model="m",
        status=status,
        phase=StreamPhase.QUEUED,
        reason=None,
        detail=None,
        length=0,
        thinking_length=0,
        attempt=0,
        started_at=MOMENT,
        ended_at=None,
        terminated_by=None,
        viewers=0,
        on_disconnect="continue",
    )
    assert view.active == (status is StreamStatus.ACTIVE)
    assert view.as_dict()["status"] == status.value
