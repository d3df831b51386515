"""What one reader is sent: the stream from a cursor to `done`, out of the log, the hub and the database.

The cursor is a position in the text, so every source can be asked for what lies beyond it, and a source
that fails is replaced by another without a gap and without a repetition.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Final
from uuid import UUID

import structlog
from redis.exceptions import RedisError

from webapp import metrics
from webapp.config import Settings
from webapp.errors import InvalidCursor, Unavailable
from webapp.models import OnDisconnect
from webapp.streams.events import (
    COMMENT,
    DONE,
    MESSAGE,
    PHASE,
    RECONNECT,
    SESSION,
    START,
    STREAM,
    THINKING,
    LogEntry,
    Position,
    done_position,
    encode_event,
    encode_json_event,
    phase_data,
)
from webapp.streams.hub import Signal, StreamHub, Subscription
from webapp.streams.lifecycle import StreamPhase
from webapp.streams.log import TokenLog
from webapp.streams.queries import SessionQueries
from webapp.views import SessionView

log = structlog.get_logger(__name__)

REPLAY_CODE_POINTS: Final = 4096
"""How much text one event carries when it comes out of the database."""
RETRY_SECONDS: Final = 0.5
ALONE_SECONDS: Final = 1.0
GONE_SECONDS: Final = 1.0
"""Between two looks whether a reader of several streams, who takes nothing, is there at all."""


class Follower:
    """One reader of one session. Iterate `events`; `close` from elsewhere ends it."""

    def __init__(
        self,
        session: SessionView,
        cursor: Position,
        *,
        queries: SessionQueries,
        token_log: TokenLog,
        hub: StreamHub,
        settings: Settings,
    ) -> None:
        self._session = session
        self._cursor = cursor
        self._queries = queries
        self._log = token_log
        self._hub = hub
        self._settings = settings
        self._subscription: Subscription | None = None
        self._closed = False
        self._finished = False
        self._gap = False
        self._in_trouble = False

    @property
    def session_id(self) -> UUID:
        return self._session.session_id

    @property
    def cursor(self) -> Position:
        """Up to where the reader has been sent all there is."""
        return self._cursor

    def _is_over(self) -> bool:
        """Whether there is nothing more to send: it was all sent, or the reader has gone."""
        return self._finished or self._closed

    def close(self) -> None:
        """The reader has gone: end `events` soon, also in the middle of a silence."""
        self._closed = True
        if self._subscription is not None:
            self._subscription.signal(Signal.CLOSED)

    def events(self) -> Iterator[bytes]:
        """Server-sent events, several in one piece where several are there; ends after `done`, or when closed."""
        with metrics.reading():
            yield from self._events()

    def _events(self) -> Iterator[bytes]:
        session = self._session
        yield RECONNECT + encode_json_event(
            SESSION,
            {
                "sessionId": str(session.session_id),
                "conversationId": str(session.conversation_id),
                "messageId": str(session.message_id),
                "model": session.model,
            },
        )
        if session.active:
            self._hub.arrive(self.session_id, abandonable=session.on_disconnect == OnDisconnect.TERMINATE)
            try:
                if session.phase is StreamPhase.QUEUED and self._cursor == START:
                    with suppress(Unavailable):  # the stream goes on without it
                        yield self._queued()
                yield from self._live()
            finally:
                self._hub.leave(self.session_id)
        else:
            yield from self._ended()

    def _ended(self) -> Iterator[bytes]:
        """The whole; after a pause, where the database goes away in this very moment."""
        while not self._is_over():
            try:
                yield from self._from_database()
            except Unavailable:
                yield COMMENT
                time.sleep(RETRY_SECONDS)

    def _queued(self) -> bytes:
        position = self._queries.queue_position(self.session_id)
        return encode_event(PHASE, phase_data(StreamPhase.QUEUED, max(1, self._session.attempt), position))

    # -- while the session lives ---------------------------------------------------------------

    def _live(self) -> Iterator[bytes]:
        while not self._is_over():
            try:
                if not self._hub.healthy:
                    yield from self._without_redis()
                    continue
                self._gap = False
                yield from self._from_log()
                if self._is_over():
                    return
                if self._gap:  # a log that Redis lost is being made anew
                    time.sleep(RETRY_SECONDS)
                else:
                    yield from self._from_hub()
            except (RedisError, Unavailable) as error:
                if self._hub.healthy and not self._in_trouble:  # else the hub has said it, once for all readers
                    log.warning("reader.waits", session_id=str(self.session_id), error=repr(error))
                self._in_trouble = True
                yield from self._without_redis()

    def _from_log(self) -> Iterator[bytes]:
        """What the log has beyond the cursor, page by page, at the reader's own pace."""
        read_to = self._cursor
        while page := self._log.read(self.session_id, read_to):
            self._in_trouble = False
            if piece := b"".join(self._advance(entry, None) for entry in page):
                yield piece
            if self._is_over():
                return
            read_to = page[-1].position

    def _from_hub(self) -> Iterator[bytes]:
        """What arrives from now on; returns when the reader is behind, has all, or is gone."""
        # The hub reads one position a log for all its followers: a cursor that lies beyond the log must not become it.
        log_end = self._log.last_position(self.session_id) or START
        subscription, begins = self._hub.attach(self.session_id, min(self._cursor, log_end))
        self._subscription = subscription
        try:
            if begins > self._cursor:
                yield from self._from_log()
            while not self._is_over():
                items, signal = subscription.take(self._settings.keepalive_seconds)
                if piece := b"".join(self._advance(item.entry, item.encoded) for item in items):
                    yield piece
                elif not items and signal is None:
                    yield self._sign_of_life()
                if self._gap:
                    return
                if signal is Signal.ENDED and not self._finished:
                    yield from self._from_database()
                if signal is Signal.CLOSED:
                    self._closed = True
                if signal is not None:
                    return
        finally:
            self._subscription = None
            self._hub.detach(self.session_id, subscription)

    def _sign_of_life(self) -> bytes:
        """A comment; while the session waits in the queue its place, which has changed."""
        if self._session.phase is StreamPhase.QUEUED and self._cursor == START:
            with suppress(Unavailable):
                return self._queued()
        return COMMENT

    def _advance(self, entry: LogEntry, encoded: bytes | None) -> bytes:
        """The entry's event, or what of it lies beyond the cursor, or nothing; moves the cursor."""
        if self._finished or entry.position <= self._cursor:
            return b""
        offset = self._cursor.offset
        if entry.start > offset or (entry.kind == DONE and entry.position.offset > offset):
            # Text is missing here, which only a log that was lost lacks. Once the session has ended, the database
            # has it; before, the log will have it again.
            self._gap = True
            return b"".join(self._from_database()) if entry.kind == DONE else b""
        self._cursor = entry.position
        self._finished = entry.kind == DONE
        return entry.after(offset).encode() if entry.is_text and entry.start < offset else encoded or entry.encode()

    def _without_redis(self) -> Iterator[bytes]:
        """Wait until Redis can be read; or, where the session has ended meanwhile, what the database has.

        The hub tries Redis, and asks the database, for all readers.
        """
        subscription = self._subscription = self._hub.wait_for_redis(self.session_id)
        try:
            while not self._closed:
                yield COMMENT
                _, signal = subscription.take(self._patience_seconds())
                if signal is Signal.ENDED:
                    yield from self._from_database()
                elif signal is Signal.CLOSED:
                    self._closed = True
                if signal is not None or self._hub.healthy:
                    return
        except Unavailable:
            time.sleep(RETRY_SECONDS)
        finally:
            self._subscription = None
            self._hub.wait_no_longer(subscription)

    def _patience_seconds(self) -> float:
        """Until the next comment; until the next try, where this reader has trouble that the hub knows nothing of."""
        return ALONE_SECONDS if self._hub.healthy else self._settings.keepalive_seconds

    # -- after the end -------------------------------------------------------------------------

    def _from_database(self) -> Iterator[bytes]:
        """The rest of a session that has ended, from the committed text."""
        _, thinking, content, data = self._queries.final_text(self.session_id)
        start = min(self._cursor.offset, len(thinking) + len(content))
        for kind, text, base in ((THINKING, thinking, 0), (MESSAGE, content, len(thinking))):
            for self._cursor, event in _text_events(kind, text, start, base):
                yield event
        position = done_position(len(thinking) + len(content))
        self._cursor, self._finished = position, True
        yield encode_event(DONE, data, position)


class ManyFollowers:
    """One reader of several sessions over one connection: each piece is preceded by a `stream` event that names its
    session, and whose `id` is where that session's reader stands. Iterate `events`; `close` from elsewhere ends it.
    """

    def __init__(self, followers: Sequence[Follower]) -> None:
        self._followers = followers
        self._pieces: queue.Queue[tuple[Follower, Position, bytes | None]] = queue.Queue(len(followers))
        self._closed = False

    def close(self) -> None:
        """The reader has gone."""
        self._closed = True
        for follower in self._followers:
            follower.close()

    def events(self) -> Iterator[bytes]:
        """Ends after each session's `done`, when closed, or where one of the sessions cannot be read on: a reader that
        lacks a `done` comes back with its cursors."""
        for follower in self._followers:
            threading.Thread(target=self._pump, args=(follower,), name="follow", daemon=True).start()
        named, running = None, len(self._followers)
        try:
            while running and not self._closed:
                follower, stands_at, piece = self._pieces.get()
                if piece is None:
                    running -= 1
                elif piece == COMMENT or follower is named:
                    yield piece
                else:
                    named = follower
                    yield encode_json_event(STREAM, {"sessionId": str(follower.session_id)}, stands_at) + piece
        finally:
            self.close()

    def _pump(self, follower: Follower) -> None:
        stands_at = follower.cursor
        try:
            for piece in follower.events():
                self._put(follower, stands_at, piece)
                stands_at = follower.cursor
        except Exception:
            log.exception("reader.failed", session_id=str(follower.session_id))
            self.close()
        finally:
            self._put(follower, stands_at, None)

    def _put(self, follower: Follower, stands_at: Position, piece: bytes | None) -> None:
        """Waits for a slow reader, and not for one that has gone."""
        while not self._closed:
            with suppress(queue.Full):
                self._pieces.put((follower, stands_at, piece), timeout=GONE_SECONDS)
                return
        with suppress(queue.Full):
            self._pieces.put_nowait((follower, stands_at, None))  # `events` may be waiting for one


def check_cursor(cursor: Position, session: SessionView) -> bool:
    """Whether there is anything for a reader at this cursor: not where it has had `done` already.

    Raises:
        InvalidCursor: it lies beyond the end of a stream that has ended.
    """
    total = session.length + session.thinking_length
    if session.active:
        return True
    if cursor.offset > total:
        raise InvalidCursor(f"The position {str(cursor)!r} lies beyond the stream's end, which is at {total}")
    return cursor != done_position(total)


def _text_events(kind: str, text: str, cursor: int, base: int) -> Iterator[tuple[Position, bytes]]:
    """The events of one kind of text that begins at offset `base`, beyond a cursor, each with its position."""
    for start in range(max(0, cursor - base), len(text), REPLAY_CODE_POINTS):
        piece = text[start : start + REPLAY_CODE_POINTS]
        position = Position(base + start + len(piece), 0)
        yield position, encode_json_event(kind, {"content": piece}, position)
