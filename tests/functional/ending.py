"""What every ending leaves behind, however it came about: in the database, in Valkey, in the logs and at the upstream.

Looked up without the API, which shows nothing of a conversation that was deleted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from uuid import UUID

import redis
import sqlalchemy as sa
from sqlalchemy.orm import Session

from tests.functional.nodes import Reader, Stack
from tests.functional.text import sha256
from tests.services import wait_until
from tests.upstream import UpstreamProcess
from webapp.models import Message, StreamSession
from webapp.streams.lifecycle import TerminationReason
from webapp.streams.log import TokenLog

ENDINGS = ("stream.terminated", "stream.completed")
TIMINGS = ("request_to_fence_ms", "fence_to_upstream_closed_ms", "request_to_commit_ms")
RENEWALS = 3
"""A lease that is older than so many renewals take is renewed by nobody."""


def rows_of(stack: Stack, session_id: str) -> tuple[StreamSession, Message]:
    """The session's row and its message's."""
    engine = sa.create_engine(stack.environment["DATABASE_URL"], poolclass=sa.NullPool)
    with Session(engine, expire_on_commit=False) as s:
        row = s.get_one(StreamSession, UUID(session_id))
        return row, s.get_one(Message, row.message_id)


def assert_ended(
    stack: Stack,
    upstream: UpstreamProcess,
    session: dict[str, Any],
    readers: Sequence[Reader],
    reason: str,
    *,
    more_logs: Iterable[str] = (),
) -> StreamSession:
    """One ending, for this reason, of which everybody says the same, and behind which nothing is left.

    `readers` are those that have read it from its start; `more_logs` what commands have printed.
    """
    dones = [reader.wait_until_done() for reader in readers]
    wait_until(lambda: rows_of(stack, session["sessionId"])[0].published_at, 10, "the ending is published")
    row, message = rows_of(stack, session["sessionId"])
    status = TerminationReason(reason).status.value
    assert (row.status, row.reason) == (message.status, message.reason) == (status, reason)
    assert (row.length, row.thinking_length) == (len(message.content), len(message.thinking))
    assert row.sha256 == sha256(message.content)
    assert row.fenced_at is not None
    assert row.started_at <= row.fenced_at <= row.ended_at
    for reader, done in zip(readers, dones, strict=True):
        assert (reader.thinking, reader.text) == (message.thinking, message.content)
        assert (len(reader.of("done")), reader.events[-1].event) == (1, "done")
        assert done == {
            "status": status,
            "reason": reason,
            "messageId": str(message.id),
            "length": row.length,
            "thinkingLength": row.thinking_length,
            "sha256": row.sha256,
        }
    assert_upstream_free(upstream, row.model)
    assert_keys_are_done_with(stack, row, message)
    assert_said_once(stack, row, more_logs)
    return row


def assert_upstream_free(upstream: UpstreamProcess, model: str) -> None:
    """Nothing is being written for this model any more."""
    upstream.wait_until(lambda records: all(one.outcome for one in records if one.model == model), 3)


def assert_keys_are_done_with(stack: Stack, row: StreamSession, message: Message) -> None:
    """The log has the message, then one `done`, and nothing after it; it will go, and nobody holds a lease on it."""
    with redis.Redis.from_url(stack.valkey.url, protocol=2) as client:
        token_log = TokenLog(client, live_seconds=60, retention_seconds=60)
        entries = list(token_log.read_all(row.id))
        assert token_log.text(row.id) == (message.thinking + message.content, len(message.thinking))
        assert [entry.kind for entry in entries].count("done") == 1
        assert entries[-1].kind == "done"
        keys = client.keys(f"sg:{{{row.id}}}:*")
        assert keys
        # -1: it has none; -2: it has gone meanwhile, as that of the viewers does with the last of them.
        assert all(ttl_seconds != -1 and ttl_seconds <= 300 for ttl_seconds in map(client.ttl, keys))

        lapsed_seconds = RENEWALS * float(stack.environment.get("SLUICEGATE_LEASE_RENEW_SECONDS", "1"))

        def lease_has_lapsed() -> bool:
            state = token_log.state(row.id)
            age_seconds = state.lease_age_seconds if state else None
            return age_seconds is None or age_seconds > lapsed_seconds

        wait_until(lease_has_lapsed, 5, "nobody renews the lease")
        assert list(token_log.read_all(row.id)) == entries


def assert_said_once(stack: Stack, row: StreamSession, more_logs: Iterable[str] = ()) -> None:
    """Over all processes one line says that it ended, and says what is to be known of it."""

    def endings() -> list[dict[str, Any]]:
        lines = [line for line in _lines(stack, more_logs) if line.get("session_id") == str(row.id)]
        return [line for line in lines if line["event"] in ENDINGS]

    said, *more = wait_until(endings, 5, "it is said after `done`")
    assert more == []
    assert said["event"] == ("stream.completed" if row.status == "COMPLETED" else "stream.terminated")
    for name in ("reason", "phase", "length", "thinking_length", "attempt"):
        assert said[name] == getattr(row, name)
    for name in TIMINGS:
        assert said[name] is None or said[name] >= 0
    assert (said["request_to_commit_ms"] is not None) == (row.stop_reason == row.reason)


def _lines(stack: Stack, more_logs: Iterable[str]) -> Iterator[dict[str, Any]]:
    logs = [path.read_text(errors="replace") for path in (stack.directory / "logs").glob("*.log")]
    for log in (*logs, *more_logs):
        for line in log.splitlines():
            if line.startswith("{"):
                yield json.loads(line)
