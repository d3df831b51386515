"""Tables and JSON, for a person at a terminal and for a program in a pipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

import click


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


def _draw(columns: Sequence[str], cells: Iterable[Sequence[str]]) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE)
    for number, column in enumerate(columns):
        # What a row is named by is what another command is given: it is never cut.
        table.add_column(column, no_wrap=number == 0, overflow="fold")
    for row in cells:
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)


def _as_text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, datetime):
        return value.astimezone().isoformat(sep=" ", timespec="seconds")
    return " ".join(str(value).split()) or "-"


def _as_json(value: Any) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)
