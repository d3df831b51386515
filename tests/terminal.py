"""A command at a terminal: a real pseudo-terminal, which the command finds as its own and as large as it is told."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import termios
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from tests.services import wait_until

CTRL_C = b"\x03"
COLOURS = ("NO_COLOR", "FORCE_COLOR", "TERM", "CI", "COLUMNS", "LINES")
"""Environment variables that decide about colours and widths, beside the terminal."""


class Terminal:
    """One command and the terminal that it runs at; a context manager that ends both."""

    def __init__(
        self,
        command: Sequence[str | Path],
        environment: Mapping[str, str],
        *,
        directory: Path | None = None,
        columns: int = 80,
        stdout: int | IO[bytes] | None = None,
    ) -> None:
        """`environment` is without `COLOURS` but for those that it sets itself; `stdout` elsewhere than here."""
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 25, columns, 0, 0))
        self.process = subprocess.Popen(
            list(command),
            env={"TERM": "xterm-256color"} | dict(environment),
            cwd=directory,
            stdin=slave,
            stdout=slave if stdout is None else stdout,
            stderr=slave,
            start_new_session=True,
            preexec_fn=_take_terminal,
        )
        os.close(slave)
        self._said = bytearray()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                piece = os.read(self._master, 65_536)
            except OSError:  # nobody has it open any more
                return
            if not piece:
                return
            self._said += piece

    @property
    def said(self) -> str:
        """All that was written to it so far, with line ends as the command wrote them."""
        return bytes(self._said).decode("utf-8", "replace").replace("\r\n", "\n")

    def wait_for(self, text: str, timeout_seconds: float = 30) -> None:
        """Wait until that was written, in one piece."""
        wait_until(lambda: text in self.said, timeout_seconds, f"{text!r} at the terminal: {self.said[-500:]!r}")

    def type(self, keys: bytes) -> None:
        """Press keys."""
        os.write(self._master, keys)

    def end(self, timeout_seconds: float = 30) -> int:
        """Wait for the command's end, and answer its exit status."""
        status = self.process.wait(timeout_seconds)
        self._reader.join(5)
        return status

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._reader.join(5)
        os.close(self._master)


def _take_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def without_colours(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without what decides about colours and widths."""
    return {name: value for name, value in environment.items() if name not in COLOURS}
