"""The same text in four places: with the reader, in the receipt, in the database and in the token log."""

from __future__ import annotations

import hashlib
from typing import Any
from uuid import UUID

import redis

from tests.functional.nodes import Client, Reader, Stack
from webapp.streams.log import TokenLog


def log_text(stack: Stack, session_id: str) -> tuple[str, str]:
    """Thinking and content of a session's token log."""
    with redis.Redis.from_url(stack.valkey.url, protocol=2) as client:
        text, thinking_length = TokenLog(client, live_seconds=60, retention_seconds=60).text(UUID(session_id))
    return text[:thinking_length], text[thinking_length:]


def sha256(text: str) -> str:
    """As receipts have it."""
    return hashlib.sha256(text.encode()).hexdigest()


def assert_one_text(
    stack: Stack, client: Client, session: dict[str, Any], receipt: dict[str, Any], readers: list[Reader]
) -> None:
    """Seen = saved: every reader's text, the receipt's, the database's and the log's are identical."""
    final = receipt["partialResponse"]
    message = client.message(session)
    thinking, content = log_text(stack, session["sessionId"])
    assert message["content"] == final == content
    assert message["thinking"] == thinking
    assert (receipt["length"], receipt["sha256"]) == (len(final), sha256(final))
    assert receipt["thinkingLength"] == len(thinking)
    assert (message["status"], message["reason"]) == (receipt["status"], receipt["reason"])
    for reader in readers:
        done = reader.wait_until_done()
        assert reader.text == final
        assert reader.thinking == thinking
        assert [done[name] for name in ("status", "reason", "length", "thinkingLength", "sha256")] == [
            receipt[name] for name in ("status", "reason", "length", "thinkingLength", "sha256")
        ]
        assert len(reader.of("done")) == 1
        assert reader.events[-1].event == "done"


def text_beyond(client: Client, session_id: str, cursor: str) -> str:
    """All text, thinking and content, that a reader is sent who comes with this cursor."""
    with client.events(session_id, cursor) as stream:
        return "".join(event.data["content"] for event in stream if event.event in ("message", "thinking"))
