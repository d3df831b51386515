"""Readers of streams whose tokens say when they were sent, and crowds of them."""

from __future__ import annotations

import asyncio
import re
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final

from bench import wire
from bench.model import TOKEN_CHARACTERS
from bench.subjects import Subject, Talk

TOKEN: Final = re.compile(rb"~(\d{13}) ")
AT_ONCE: Final = 10
"""Streams of a crowd that are begun, or stopped, at the same time."""


class Reading:
    """A reader of one stream: how old each token was when it came, in seconds."""

    def __init__(self, talk: Talk) -> None:
        self.talk = talk
        self.tokens = 0
        self.received = False
        """Whether it was sent anything at all."""
        self.first_at = self.done_at = 0.0
        self.ages: list[float] = []
        self.keeps = False
        """Whether ages are noted."""
        self._rest = b""
        self._grown = asyncio.Event()
        self._task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        try:
            async for piece in self.talk.pieces():
                self._take(piece, time.monotonic())
        except wire.BROKEN:
            pass
        finally:
            self.done_at = self.done_at or time.monotonic()
            self._grown.set()

    def _take(self, piece: bytes, moment: float) -> None:
        self.received = True
        data = self._rest + piece
        sent = TOKEN.findall(data)
        # A token may be cut by the end of what has come; nothing else in the stream looks like the beginning of one.
        cut = data.rfind(b"~", max(0, len(data) - TOKEN_CHARACTERS))
        self._rest = data[cut:] if cut >= 0 and len(data) - cut < TOKEN_CHARACTERS else b""
        if sent:
            self.tokens += len(sent)
            self.first_at = self.first_at or moment
            if self.keeps:
                self.ages += [moment - int(one) / 1e6 for one in sent]
        if b"event: done" in data or b'"done":true' in data:
            self.done_at = self.done_at or moment
        self._grown.set()

    async def until(self, true: Callable[[], bool], seconds: float = 60.0) -> None:
        """Wait for what this reader sees.

        Raises:
            TimeoutError: it does not come to it. AssertionError: the stream ended instead.
        """
        async with asyncio.timeout(seconds):
            while not true():
                assert not self.done_at, f"a stream ended after {self.tokens} tokens"
                self._grown.clear()
                await self._grown.wait()

    async def ended(self, seconds: float = 120.0) -> None:
        """Wait for its end."""
        async with asyncio.timeout(seconds):
            await self._task

    def leave(self) -> None:
        """Read no more."""
        self._task.cancel()


@asynccontextmanager
async def reading(subject: Subject, model: str) -> AsyncIterator[Reading]:
    """A stream and its reader."""
    async with subject.talk(model) as talk:
        reader = Reading(talk)
        try:
            yield reader
        finally:
            reader.leave()


@asynccontextmanager
async def crowd(subject: Subject, streams: int, model: str) -> AsyncIterator[list[Reading]]:
    """So many at once, all of them speaking; they are stopped at the end, whatever happens meanwhile."""
    async with AsyncExitStack() as stack:
        readers: list[Reading] = []
        try:
            for begun in range(0, streams, AT_ONCE):
                some = range(min(AT_ONCE, streams - begun))
                entering = (stack.enter_async_context(reading(subject, model)) for _ in some)
                readers += await asyncio.gather(*entering)
            for reader in readers:
                await reader.until(lambda reader=reader: reader.tokens > 0)
            yield readers
        finally:
            await _stop_all(subject, [reader for reader in readers if not reader.done_at])


async def _stop_all(subject: Subject, readers: Sequence[Reading]) -> None:
    """What cannot be stopped is told, and hides no error that came before."""
    for begun in range(0, len(readers), AT_ONCE):
        stopping = [subject.stop(reader.talk) for reader in readers[begun : begun + AT_ONCE]]
        for answer in await asyncio.gather(*stopping, return_exceptions=True):
            if isinstance(answer, Exception):
                print(f"a stream of {subject.name} was not stopped: {answer!r}", file=sys.stderr)
