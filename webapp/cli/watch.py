"""`sluicegate streams watch`: one stream, as it is written."""

from __future__ import annotations

import json
import logging
import signal
import sys
import threading
import time
from collections.abc import Generator
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any, TextIO, cast
from uuid import UUID

import click

from webapp.cli.terminal import StatusLine, harmless, paint

if TYPE_CHECKING:
    from webapp.app import Services
    from webapp.streams.events import SentEvent
    from webapp.streams.follow import Follower
    from webapp.streams.hub import StreamHub
    from webapp.views import SessionView

_LOOK_SECONDS = 1.0
"""Between two looks at what a silent stream waits for."""
_REPORT_SECONDS = 1.0
_NOT_COMPLETED = 3
_INTERRUPTED = 130
_COLOURS = {"COMPLETED": "green", "TERMINATED": "yellow", "ERROR": "red"}


@click.command(short_help="Follow a stream to its end.")
@click.argument("session_id", metavar="ID", type=click.UUID)
@click.option("--from-now", is_flag=True, help="Leave out what has been written already.")
@click.option("--json", "as_json", is_flag=True, help="Print every event, as one line of JSON each.")
def watch(session_id: UUID, from_now: bool, as_json: bool) -> int:
    """Follow the stream ID from its beginning to its end, whether that has come or not.

    The answer goes to standard output, and into a pipe exactly as it is saved; the thinking, and how it ended, go to
    standard error. A terminal is sent no control character of theirs. Whoever watches is a viewer: a stream that ends
    when nobody reads it goes on meanwhile. Ctrl-C stops the watching, and not the stream.

    \b
    Exit status:
      0    the answer is complete
      1    it could not be followed
      3    it was terminated, or ended with an error
      130  Ctrl-C: the stream goes on

    \b
    Examples:
      sluicegate streams watch 01a204f1-ab24-70fe-b6f4-fa6b87151910
      sluicegate streams watch --from-now ID > rest.txt
      sluicegate streams watch --json ID | jq .data
    """
    from webapp.cli.services import open_services

    services = open_services()
    logging.getLogger("webapp.streams").setLevel(logging.ERROR)  # what it waits for is said here
    session = _find(services, session_id)
    reader = _EventLines(services, session) if as_json else _Reader(services, session)
    follower = _follower(services, session, from_now=from_now)
    interrupted = _closed_by_ctrl_c(follower)
    try:
        events = cast("Generator[bytes, None, None]", follower.events())
        with closing(events) as pieces:  # which says that this viewer leaves
            for piece in pieces:
                reader.take(piece)
        if interrupted.is_set() and not reader.ending:
            reader.leave()
            return _INTERRUPTED
    finally:
        reader.status.clear()
        if not reader.ending:
            _let_go(services.hub)
    return 0 if reader.ending.get("status") == "COMPLETED" else _NOT_COMPLETED


def _closed_by_ctrl_c(follower: Follower) -> threading.Event:
    """Have Ctrl-C end the follower; a second one ends the command. The event is set with the first.

    An exception that may come at any point could come where a library drops it. And the closing is a thread's: the one
    that is interrupted may hold the very lock that this takes.
    """
    interrupted = threading.Event()

    def close() -> None:
        interrupted.set()
        follower.close()

    def on_ctrl_c(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Thread(target=close, daemon=True).start()

    signal.signal(signal.SIGINT, on_ctrl_c)
    return interrupted


def _find(services: Services, session_id: UUID) -> SessionView:
    from webapp.errors import NotFound

    try:
        return services.queries.view(session_id)
    except NotFound:
        message = f"there is no stream {session_id}: `sluicegate streams list` shows those there are"
        raise click.ClickException(message) from None


def _follower(services: Services, session: SessionView, *, from_now: bool) -> Follower:
    from webapp.streams.events import START, Position
    from webapp.streams.follow import Follower

    return Follower(
        session,
        Position(session.thinking_length + session.length, 0) if from_now else START,
        queries=services.queries,
        token_log=services.log,
        hub=services.hub,
        settings=services.settings.model_copy(update={"keepalive_seconds": _LOOK_SECONDS}),
    )


def _let_go(hub: StreamHub) -> None:
    """End the hub, and let it report first that this viewer has gone."""
    from webapp.streams.hub import REPORT_PAUSE_SECONDS

    reporting = [thread for thread in threading.enumerate() if thread.name == "hub.report"]
    if reporting:
        time.sleep(1.5 * REPORT_PAUSE_SECONDS)  # after a report it hears of nobody for so long
    hub.close()
    for thread in reporting:
        thread.join(_REPORT_SECONDS)


class _Reader:
    """Puts the answer on standard output, and what belongs to it on standard error."""

    def __init__(self, services: Services, session: SessionView) -> None:
        self.status = StatusLine()
        self.ending: dict[str, Any] = {}
        """The data of `done`."""
        self._services = services
        self._session_id = session.session_id
        self._phase = ""
        self._length = 0
        self._open: TextIO | None = None
        """Where a line has been begun."""
        self._answering = False

    def take(self, piece: bytes) -> None:
        """Events that were sent in one piece; without any in it, nothing has happened for a while."""
        from webapp.streams.events import decode_events

        events = list(decode_events(piece))
        for event in events:
            self._show(event)
        if not events:
            self._wait()

    def leave(self) -> None:
        """Say that the stream goes on without this reader."""
        self._end_line()
        self._aside(f"Left; the stream goes on, and `sluicegate streams stop {self._session_id}` stops it")

    def _show(self, event: SentEvent) -> None:
        if event.kind == "thinking":
            self._write(sys.stderr, event.data["content"], dim=True)
        elif event.kind == "message":
            if not self._answering:
                self._end_line()
                self._answering = True
            self._write(sys.stdout, event.data["content"])
            self._length += len(event.data["content"])
            if not sys.stdout.isatty():
                self.status.show(f"{self._length:,} characters")
        elif event.kind == "phase":
            self._phase = event.data["phase"]
            self._wait(event.data.get("position"))
        elif event.kind == "done":
            self.ending = event.data
            self._end_line()
            self._tell_ending()

    def _wait(self, position: int | None = None) -> None:
        """Say what for, unless that would stand in the middle of a line."""
        if self._open is not None and self._open.isatty():
            return
        if not self._services.hub.healthy:
            self.status.show("Waiting for Redis, which cannot be read")
        elif self._phase == "QUEUED":
            self.status.show(self._place(position))
        elif not self._length:
            self.status.show("Waiting for the model to load" if self._phase == "LOADING" else "Waiting for the model")

    def _place(self, position: int | None) -> str:
        from webapp.errors import Unavailable

        with suppress(Unavailable):
            waiting = self._services.queries.queue_position(self._session_id) if position is None else position
            return f"Queued, {waiting:,} before it" if waiting else "Queued, the next in turn"
        return "Queued"

    def _tell_ending(self) -> None:
        status, reason = self.ending["status"], self.ending["reason"]
        line = f"{paint(sys.stderr, status, fg=_COLOURS[status], bold=True)} ({reason}), {_counted(self.ending)}"
        if detail := self._detail() if status == "ERROR" else None:
            line += f": {harmless(' '.join(detail.split()))}"
        self._aside(line)

    def _detail(self) -> str | None:
        from webapp.errors import Unavailable

        with suppress(Unavailable):  # the ending is known without it
            return self._services.queries.view(self._session_id).detail
        return None

    def _aside(self, line: str) -> None:
        self.status.clear()
        click.echo(line, err=True, color=True)

    def _end_line(self) -> None:
        """A person's next line begins on a line of its own; a pipe is given no character that is not the answer's."""
        self.status.clear()
        if self._open is not None and (self._open is sys.stderr or self._open.isatty()):
            print(file=self._open, flush=True)
        self._open = None

    def _write(self, stream: TextIO, text: str, **style: Any) -> None:
        if stream.isatty():
            self.status.clear()
        painted = paint(stream, harmless(text), **style) if stream.isatty() else text
        # In UTF-8, whatever the locale says: as it is saved.
        stream.flush()
        stream.buffer.write(painted.encode())
        stream.flush()
        self._open = None if text.endswith("\n") else stream


class _EventLines(_Reader):
    """Puts every event on standard output, a line each."""

    def _show(self, event: SentEvent) -> None:
        self.status.clear()
        line = json.dumps({"event": event.kind, "id": event.id, "data": event.data}, ensure_ascii=False)
        self._write(sys.stdout, line + "\n")
        if event.kind == "done":
            self.ending = event.data
        elif event.kind == "phase":
            self._phase = event.data["phase"]


def _counted(ending: dict[str, Any]) -> str:
    text = f"{ending['length']:,} characters"
    return f"{text}, after {ending['thinkingLength']:,} of thinking" if ending["thinkingLength"] else text
