"""Tables and JSON, for a person at a terminal and for a program in a pipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import click

_COLUMN_GAP = 2


class Cell(NamedTuple):
    """A field of a drawn table that is shown otherwise than it is written into a pipe; `style` is rich's."""

    value: Any
    shown: str | None = None
    style: str = ""


def print_json(value: Any) -> None:
    """Indented JSON; a moment as RFC 3339, anything else unknown as its text."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, default=_as_json))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], empty: str = "") -> None:
    """A drawn table at a terminal, or the text `empty` for none; elsewhere as `print_rows`."""
    if sys.stdout.isatty():
        draw_table(columns, list(rows), empty)
    else:
        print_rows(rows)


def print_rows(rows: Iterable[Sequence[Any]]) -> None:
    """One line a row, fields parted by tabs, without a heading."""
    for row in rows:
        click.echo("\t".join(_as_text(field.value if isinstance(field, Cell) else field) for field in row))


def draw_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], empty: str = "") -> None:
    """As wide as the terminal: of the columns, the first ones before the later, those that fit whole. Numbers stand
    to the right. Without a row, the text `empty` if there is one."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from webapp.cli.terminal import harmless, takes_colour

    if not rows and empty:
        click.echo(empty)
        return
    cells = [[field if isinstance(field, Cell) else Cell(field) for field in row] for row in rows]
    texts = [[harmless(_as_text(cell.value) if cell.shown is None else cell.shown) for cell in row] for row in cells]
    console = Console(color_system="auto" if takes_colour(sys.stdout) else None, highlight=False)
    fitting = _fitting(columns, texts, console.width)
    # The head's line takes one character of the gap.
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 0, 0, _COLUMN_GAP - 1))
    for number in fitting:
        numbers = all(isinstance(row[number].value, int | None) for row in cells)
        table.add_column(columns[number], justify="right" if numbers else "left", no_wrap=True)
    for row, text in zip(cells, texts, strict=True):
        table.add_row(*(Text(text[number], style=row[number].style, no_wrap=True) for number in fitting))
    console.print(table)
    if left_out := [column for number, column in enumerate(columns) if number not in fitting]:
        console.print(f"Not shown, for want of width: {', '.join(left_out)}", style="dim")


def _fitting(columns: Sequence[str], texts: Sequence[Sequence[str]], width: int) -> list[int]:
    """Which columns fit whole; an id that is cut is of no use to another command."""
    from rich.cells import cell_len

    fitting: list[int] = []
    left = width + _COLUMN_GAP
    for number, column in enumerate(columns):
        needed = max(cell_len(column), *(cell_len(row[number]) for row in texts), 0) + _COLUMN_GAP
        if needed <= left or not fitting:
            fitting.append(number)
            left -= needed
    return fitting


def _as_text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, datetime):
        return value.astimezone().isoformat(sep=" ", timespec="seconds")
    return " ".join(str(value).split()) or "-"


def _as_json(value: Any) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)
