"""Tables and JSON, for a person at a terminal and for a program in a pipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

import click

_COLUMN_GAP = 3


def print_json(value: Any) -> None:
    """Indented JSON; a moment as RFC 3339, anything else unknown as its text."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, default=_as_json))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A drawn table at a terminal; elsewhere one line a row, fields parted by tabs, without a heading."""
    cells = [[_as_text(value) for value in row] for row in rows]
    if not sys.stdout.isatty():
        for row in cells:
            click.echo("\t".join(row))
        return
    _draw(columns, cells)


def _draw(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    shown = _fitting(columns, cells, console.width)
    table = Table(*columns[:shown], box=SIMPLE)
    for row in cells:
        table.add_row(*(Text(cell, no_wrap=True) for cell in row[:shown]))
    console.print(table)
    if shown < len(columns):
        console.print(f"  Not shown, for want of width: {', '.join(columns[shown:])}", style="dim")


def _fitting(columns: Sequence[str], cells: Sequence[Sequence[str]], width: int) -> int:
    """How many columns, from the first on, fit whole; an id that is cut is of no use to another command."""
    used = 1
    for number, column in enumerate(columns):
        used += max(len(column), *(len(row[number]) for row in cells), 0) + _COLUMN_GAP
        if used > width:
            return max(1, number)
    return len(columns)


def _as_text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, datetime):
        return value.astimezone().isoformat(sep=" ", timespec="seconds")
    return " ".join(str(value).split()) or "-"


def _as_json(value: Any) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)
