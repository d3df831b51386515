"""`sluicegate streams`: what is being generated, following it, and stopping it."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import UUID

import click

from webapp.cli.watch import watch

if TYPE_CHECKING:
    from webapp.cli.output import Cell
    from webapp.streams.manager import StreamSessionManager
    from webapp.streams.queries import SessionQueries
    from webapp.views import ReceiptView, SessionView

_LISTED = 100
_STOPPED_AT_ONCE = 8
_ALL = 1_000_000
_NONE_YET = "No stream yet: send a message on the page, or by POST /api/stream-message"
_NONE_MATCHES = "No stream matches: `sluicegate streams list` alone shows those that have ended, too"
_COLUMNS = ("Session", "State", "Model", "Started", "Length", "Took", "Viewers", "Attempt")
STYLES = {
    "QUEUED": "cyan",
    "LOADING": "blue",
    "GENERATING": "bold green",
    "COMPLETED": "dim",
    "TERMINATED": "yellow",
    "ERROR": "bold red",
}
"""Of a phase while a stream is active, and of its status afterwards."""


@click.group()
def streams() -> None:
    """List, watch and stop streams."""


streams.add_command(watch)


@streams.command("list")
@click.option("--active", is_flag=True, help="Only those that have not ended.")
@click.option("--user", "user_name", metavar="NAME", help="Only those that NAME began.")
@click.option("--model", metavar="NAME", help="Only those of one model.")
@click.option("--limit", type=click.IntRange(min=1), default=_LISTED, show_default=True, help="At most so many.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_streams(active: bool, user_name: str | None, model: str | None, limit: int, as_json: bool) -> None:
    """List streams, the newest first.

    At a terminal as a table, as wide as that; in a pipe a line for each, with tabs between session, status, phase or
    reason, model, length, attempt, viewers, start and end.

    \b
    Examples:
      sluicegate streams list --active
      sluicegate streams list --user alice --json
    """
    from webapp.cli.output import draw_table, print_json, print_rows
    from webapp.cli.services import open_services

    queries = open_services().queries
    found = queries.list_streams(active_only=active, user_name=user_name, model=model, limit=limit)
    if as_json:
        print_json([view.as_dict() for view in found])
    elif sys.stdout.isatty():
        narrowed = active or user_name or model
        draw_table(_COLUMNS, [_drawn(view) for view in found], _NONE_MATCHES if narrowed else _NONE_YET)
    else:
        print_rows(_row(view) for view in found)


@streams.command(short_help="Stop streams.")
@click.argument("ids", nargs=-1, type=click.UUID, metavar="[ID]...")
@click.option("--user", "user_name", metavar="NAME", help="All that NAME began.")
@click.option("--model", metavar="NAME", help="All of one model.")
@click.option("--all", "everything", is_flag=True, help="All there are.")
def stop(ids: tuple[UUID, ...], user_name: str | None, model: str | None, everything: bool) -> int:
    """Stop the streams with these IDs, or all active ones that --user and --model select.

    \b
    Examples:
      sluicegate streams stop 01a204f1-ab24-70fe-b6f4-fa6b87151910
      sluicegate streams stop --user alice --model llama3.2
      sluicegate streams stop --all
    """
    if bool(ids) + bool(user_name or model) + everything != 1:
        raise click.UsageError("say which: IDs, or --user and --model, or --all")
    from webapp.cli.services import open_services

    services = open_services()
    if user_name:
        services.accounts.require_user(user_name)  # a misspelt name must not look like a success
    chosen = list(ids) or _active(services.queries, user_name, model)
    with ThreadPoolExecutor(_STOPPED_AT_ONCE) as pool:
        failures = list(pool.map(partial(_stop_one, services.manager), chosen))
    if not chosen:
        click.echo("No active stream matches")
    return 1 if any(failures) else 0


def _active(queries: SessionQueries, user_name: str | None, model: str | None) -> list[UUID]:
    found = queries.list_streams(active_only=True, user_name=user_name, model=model, limit=_ALL)
    return [view.session_id for view in found]


def _stop_one(manager: StreamSessionManager, session_id: UUID) -> bool:
    """Stop one stream and say what came of it; whether that failed."""
    from webapp.cli.failures import explain
    from webapp.errors import Unavailable
    from webapp.streams.lifecycle import TerminationReason

    try:
        receipt = manager.terminate(session_id, TerminationReason.ADMIN)
    except Exception as error:
        later = f" ({error.detail})" if isinstance(error, Unavailable) and "recorded" in error.detail else ""
        click.echo(f"sluicegate: {session_id}: {explain(error)}{later}", err=True)
        return True
    click.echo(_outcome(receipt))
    return False


def _outcome(receipt: ReceiptView) -> str:
    verb = "had ended before" if receipt.already_ended else "stopped"
    return f"{receipt.session_id} {verb}: {receipt.status} ({receipt.reason}), {receipt.length} characters"


def _row(view: SessionView) -> tuple[Any, ...]:
    found = (view.session_id, view.status, view.reason or view.phase, view.model, view.length, view.attempt)
    return (*found, view.viewers, view.started_at, view.ended_at)


def _drawn(view: SessionView) -> tuple[Any, ...]:
    """As `_COLUMNS` has it; what has not ended has taken the time until now, and only that can have viewers."""
    from webapp.cli.output import Cell
    from webapp.cli.terminal import age, duration
    from webapp.models import now

    took = duration(((view.ended_at or now()) - view.started_at).total_seconds())
    viewers = view.viewers if view.active else None
    started = Cell(view.started_at, age(view.started_at))
    return (view.session_id, _state(view), view.model, started, view.length, took, viewers, view.attempt)


def _state(view: SessionView) -> Cell:
    from webapp.cli.output import Cell

    word = str(view.phase if view.active else view.status)
    reason = "" if view.active or (view.status == "COMPLETED" and view.reason == "stop") else f" ({view.reason})"
    return Cell(word + reason, style=STYLES[word])
