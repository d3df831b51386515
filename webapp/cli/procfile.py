"""The Procfile: a name and a command on each line."""

from __future__ import annotations

import re
import shlex
import sysconfig
from pathlib import Path

from webapp.errors import ConfigurationError

RELEASE = "release"
_LOCAL_PROGRAMS = ".venv/bin/"
_LINE = re.compile(r"([A-Za-z0-9_-]+)\s*:\s*(\S.*)")


def find_procfile() -> Path:
    """The Procfile beside the package, which is that of the checkout; else the working directory's.

    Raises:
        ConfigurationError: there is neither.
    """
    candidates = (Path(__file__).resolve().parents[2] / "Procfile", Path("Procfile"))
    for path in candidates:
        if path.is_file():
            return path
    raise ConfigurationError("there is no Procfile: run this in the checkout, or name one with --procfile")


def read_procfile(path: Path) -> dict[str, list[str]]:
    """Process name to its command, in the file's order.

    A leading `.venv/bin/` becomes the directory of this installation's own programs, so that the
    same file serves an installation elsewhere.

    Raises:
        ConfigurationError: the file cannot be read, or a line is not `name: command`.
    """
    commands: dict[str, list[str]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        found = _LINE.fullmatch(line.strip())
        if not found or found[1] in commands:
            raise ConfigurationError(f"{path}, line {number}: not `name: command`, or the name is there twice")
        commands[found[1]] = _command(found[2])
    return commands


def _command(line: str) -> list[str]:
    first, *rest = shlex.split(line)
    if first.startswith(_LOCAL_PROGRAMS):
        first = str(Path(sysconfig.get_path("scripts")) / first.removeprefix(_LOCAL_PROGRAMS))
    return [first, *rest]
