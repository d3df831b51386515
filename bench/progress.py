"""What a bench is at: the last line of a terminal, which is written over and counts the seconds; nothing elsewhere.

It is drawn once a second, and where medians are measured that is too seldom to move one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Final

from webapp.cli.terminal import StatusLine

LINE: Final = StatusLine()
"""The one line. What a bench prints while it runs goes through `LINE.say`."""


class Steps:
    """So many steps of a run; each is shown as it begins."""

    def __init__(self, total: int, what: str = "") -> None:
        """`what` stands before the number of each."""
        self._total = total
        self._what = what
        self._numbers: Iterator[int] = itertools.count(1)

    def begin(self, name: str) -> None:
        """The next one."""
        LINE.show(f"{self._what}{next(self._numbers)} of {self._total}: {name}")
