"""Small facts about a running `sluicegate up`: its ports, its lock, and the file that tells others."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from dotenv import dotenv_values

from webapp.errors import ConfigurationError

# Below the range from which systems take ports for outgoing connections (32768 on Linux, 49152
# elsewhere): a server that is started again must find its port as it left it.
_FIRST_PORT, _LAST_PORT = 20_000, 32_000
_ATTEMPTS = 200


def free_port(host: str = "127.0.0.1") -> int:
    """A random TCP port on which nothing listens now.

    Raises:
        ConfigurationError: none was found.
    """
    for _ in range(_ATTEMPTS):
        port = _FIRST_PORT + secrets.randbelow(_LAST_PORT - _FIRST_PORT)
        if port_problem(host, port) is None:
            return port
    raise ConfigurationError(f"found no free port on {host}")


def port_problem(host: str, port: int) -> str | None:
    """Why a server could not listen there: one sentence with its remedy; None if it could."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return _explained(error, host, port)
    return None


def _explained(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} is taken: stop what listens there, or set PORT"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"port {port} may not be used by this user: set PORT to one above 1023"
    return f"cannot listen on {host} port {port} ({error.strerror or error}): set SLUICEGATE_HOST and PORT"


def write_private(path: Path, text: str) -> None:
    """Replace a file at once by one that only this user can read."""
    temporary = path.with_name(path.name + ".new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(text)
    temporary.replace(path)


def write_environment(path: Path, values: Mapping[str, str]) -> None:
    """Write variables where `webapp.config` reads them."""
    write_private(path, "".join(f"{name}={value}\n" for name, value in values.items()))


def read_environment(path: Path) -> dict[str, str]:
    """The variables that `write_environment` wrote; empty if there is no such file."""
    if not path.is_file():
        return {}
    return {name: value for name, value in dotenv_values(path, interpolate=False).items() if value}


def lock_file(path: Path) -> IO[str] | None:
    """Take an exclusive lock that lasts as long as this process; None if another process holds it.

    The file is returned open, to be kept so, and empty, to be written to.
    """
    file = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    file.truncate(0)
    return file
