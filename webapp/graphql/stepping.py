"""Asynchronous generators without an event loop: stepped by hand, and blocking only as greenlets block.

Strawberry's subscriptions are asynchronous generators. Under gevent nothing in them has to wait for a loop, so a
coroutine runs from one `Said` to the next by `send(None)`, and whatever a `Said` holds reaches the one who steps it,
through every generator in between.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Generator
from contextlib import aclosing
from typing import Any, Final

SILENCE: Final = object()
"""Said by a source that has had nothing to give for a while."""


class Left(BaseException):
    """Thrown into what nobody steps any more. Not an Exception: no one in between may take it for an error."""


class Said:
    """Await it to hand a value to whoever steps this coroutine."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __await__(self) -> Generator[Any, None, None]:
        yield self._value


def stepped(source: Awaitable[AsyncGenerator[Any, None]]) -> Generator[Any, None, None]:
    """What an asynchronous generator yields, and each `SILENCE` in between; to close it closes the source."""
    play = _play(source)
    try:
        while True:
            try:
                said = play.send(None)
            except StopIteration:
                return
            yield said
    except GeneratorExit:
        _leave(play)
        raise


async def _play(source: Awaitable[AsyncGenerator[Any, None]]) -> None:
    async with aclosing(await source) as results:
        async for result in results:
            await Said(result)


def _leave(play: Any) -> None:
    # Not close(): before Python 3.13 that does not reach a generator which is itself waiting.
    try:
        play.throw(Left())
    except (Left, StopIteration):
        return
