"""The garbage collector, told what stays.

What a process has made once it is ready, modules and mappings mostly, is there until its end. CPython's collector would
look at all of it again and again: for a tenth of a second each time, in which a web process answers nobody.
"""

from __future__ import annotations

import gc
from typing import Final

YOUNG_OBJECTS: Final = 10_000
"""Made between two looks at the youngest, instead of 700: what a request makes is then mostly gone by itself."""


def freeze_heap() -> None:
    """Leave out of every later collection what there is now. To be called once, when a process is ready."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, *gc.get_threshold()[1:])
