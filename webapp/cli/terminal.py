"""What a person at a terminal sees, and a program in a pipe does not: colours, a line that is written over."""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, TextIO

import click

_DUMB = ("dumb", "unknown")
_USUAL_WIDTH = 80
_TICK_SECONDS = 1.0
_ERASE = "\r\x1b[K"
_UNITS = ((86_400, "d"), (3600, "h"), (60, "min"))
# All that a terminal obeys instead of showing: C0 but line ends and tabs, DEL, C1, and what turns the direction of
# the text around it. Written as JSON writes it, so that JSON stays what it is.
_OBEYED = (*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_SPELT_OUT = {code: f"\\u{code:04x}" for code in _OBEYED if chr(code) not in "\n\t"}


def harmless(text: str) -> str:
    """The text with every character spelt out that would move, colour or disguise what a terminal shows."""
    return text.translate(_SPELT_OUT)


def takes_colour(stream: TextIO) -> bool:
    """Whether colours are wanted there: NO_COLOR and FORCE_COLOR decide, else whether it is a terminal that has any."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or _is_capable(stream)


def _is_capable(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") not in _DUMB


def paint(stream: TextIO, text: str, **style: Any) -> str:
    """The text in a style, as `click.style` names it, where the stream takes colours; else as it is."""
    return click.style(text, **style) if text and style and takes_colour(stream) else text


def age(moment: datetime) -> str:
    """How long ago, in the largest unit that is whole."""
    seconds = (datetime.now(UTC) - moment).total_seconds()
    return f"{duration(seconds)} ago" if seconds >= 1 else "now"


def duration(seconds: float) -> str:
    """In the largest unit that is whole, rounded down."""
    for unit_seconds, name in _UNITS:
        if seconds >= unit_seconds:
            return f"{int(seconds // unit_seconds)} {name}"
    return f"{int(seconds)} s"


class StatusLine:
    """The last line on standard error, which is written over and counts its seconds.

    Nothing of it is written where standard error is no terminal, nor in CI. What else is printed while it stands goes
    through `say`.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._text = ""
        self._drawn = ""
        self._began = 0.0
        self._ticker: threading.Thread | None = None

    def show(self, text: str) -> None:
        """Put a text there; the seconds go on from the first one since the last `clear`."""
        if os.environ.get("CI") or not _is_capable(sys.stderr):
            return
        with self._lock:
            if not self._text:
                self._began = time.monotonic()
            self._text = " ".join(harmless(text).split())
            self._draw()
            if self._ticker is None:
                self._ticker = threading.Thread(target=self._tick, name="status line", daemon=True)
                self._ticker.start()

    def clear(self) -> None:
        """Take it away."""
        with self._lock:
            self._text = ""
            self._erase()

    def say(self, line: str, stream: TextIO | None = None) -> None:
        """Print a line above it, by default on standard error."""
        with self._lock:
            self._erase()
            print(line, file=stream or sys.stderr, flush=True)
            if self._text:
                self._draw()

    def _tick(self) -> None:
        while True:
            time.sleep(_TICK_SECONDS)
            with self._lock:
                if self._text:
                    self._draw()

    def _draw(self) -> None:
        elapsed = f" ({time.monotonic() - self._began:.0f} s)"
        text = self._text[: max(0, _width() - 1 - len(elapsed))] + elapsed
        if text != self._drawn:
            self._drawn = text
            self._write(_ERASE + paint(sys.stderr, text, dim=True))

    def _erase(self) -> None:
        if self._drawn:
            self._drawn = ""
            self._write(_ERASE)

    @staticmethod
    def _write(text: str) -> None:
        with suppress(OSError, ValueError):  # whoever closes the terminal does not end what runs in it
            sys.stderr.write(text)
            sys.stderr.flush()


def _width() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or _USUAL_WIDTH
    except (OSError, ValueError):
        return _USUAL_WIDTH
