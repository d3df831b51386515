"""The states of a session: it leaves ACTIVE once, and every reason leads to one status."""

from __future__ import annotations

import pytest

from webapp.streams.lifecycle import TRANSITIONS, StreamStatus, TerminationReason, sources_of

ENDS = (StreamStatus.COMPLETED, StreamStatus.TERMINATED, StreamStatus.ERROR)
# As the wire contract lists them.
REASONS = {
    StreamStatus.COMPLETED: {"stop", "length"},
    StreamStatus.TERMINATED: {
        "user",
        "admin",
        "superseded",
        "conversation_deleted",
        "revoked",
        "abandoned",
        "queue_timeout",
        "first_token_timeout",
        "idle_timeout",
        "max_duration",
        "shutdown",
    },
    StreamStatus.ERROR: {"upstream_error", "worker_lost", "internal"},
}


def test_the_table_speaks_of_every_status() -> None:
    assert set(TRANSITIONS) == set(StreamStatus) == {StreamStatus.ACTIVE, *ENDS}


def test_active_may_become_every_end() -> None:
    assert TRANSITIONS[StreamStatus.ACTIVE] == set(ENDS)


@pytest.mark.parametrize("end", ENDS)
def test_an_end_is_reached_from_active_alone_and_never_left(end: StreamStatus) -> None:
    assert sources_of(end) == {StreamStatus.ACTIVE}
    assert TRANSITIONS[end] == frozenset()


def test_nothing_becomes_active_again() -> None:
    assert sources_of(StreamStatus.ACTIVE) == frozenset()


@pytest.mark.parametrize("status", ENDS)
def test_every_reason_has_the_status_of_the_contract(status: StreamStatus) -> None:
    assert {reason.value for reason in TerminationReason if reason.status is status} == REASONS[status]


def test_no_reason_keeps_a_session_active() -> None:
    assert all(reason.status in ENDS for reason in TerminationReason)


def test_only_a_terminate_call_is_one() -> None:
    assert {reason.value for reason in TerminationReason if reason.by_terminate_call} == {"user", "admin"}


def test_every_reason_fits_its_column() -> None:
    assert max(len(reason) for reason in TerminationReason) <= 24
