"""The files in which the processes of one host keep their figures, so that each of them can tell the sum.

prometheus_client gives every process memory-mapped files of its own in one directory and adds them up. Here is what
it leaves to others: which process still lives, and what becomes of the figures of one that does not. A process
holds a lock on a file of its name for as long as it lives: unlike a process id, that is free at the very moment of
the death, means nothing else afterwards, and is the same in every container that shares the directory. A dead
process's gauges go; its counters are added to those of all the dead before it, so the files do not grow in number.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import struct
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

import structlog
from prometheus_client import Metric
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import MultiProcessCollector

from webapp.errors import Unavailable

log = structlog.get_logger(__name__)

FILE_BYTES: Final = 262_144
"""Room that is really on the disk: a write into a hole of a file, on a full disk, would kill the process."""
LOCK_WAIT_SECONDS: Final = 2.0
_ENDED: Final = "ended"
_LASTING: Final = ("counter", "histogram")
_OWN: Final = (*_LASTING, "gauge_livesum")


class MetricFiles:
    """One directory of figures, as one process sees it."""

    def __init__(self, directory: Path) -> None:
        """Raises `OSError` where the directory cannot be written."""
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self._pid = 0
        self._name = ""
        self._lock: IO[bytes] | None = None
        self.identity()

    def identity(self) -> str:
        """The name of this process in the names of its files; a fork gets a name of its own."""
        pid = os.getpid()
        if pid != self._pid:
            self._name, self._pid = f"{pid}-{secrets.token_hex(4)}", pid
            self._lock = _hold(self._lock_path(self._name))
            for kind in _OWN:
                _reserve(self._path(kind, self._name))
        return self._name

    def collect(self) -> Iterable[Metric]:
        """What all processes together have counted, dead ones included.

        Raises:
            Unavailable: another process reads just now, and does not come to an end.
        """
        with self._alone():
            self._bury([name for name in self._names() if self._is_dead(name)])
            files = [str(path) for path in self.directory.glob("*.db")]
            return list(MultiProcessCollector.merge(files, accumulate=True))

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """While the dead are added to each other nobody may read, or a figure would count twice and fall again."""
        with (self.directory / "reading.lock").open("ab") as lock:
            deadline = time.monotonic() + LOCK_WAIT_SECONDS
            while not _try_lock(lock):
                if time.monotonic() > deadline:
                    raise Unavailable("The metrics are being read by another process")
                time.sleep(0.01)
            yield

    def _names(self) -> set[str]:
        """The processes that have files, by name."""
        found = {path.stem.rpartition("_")[2] for path in self.directory.glob("*.db")}
        return (found | {path.stem for path in self.directory.glob("*-*.lock")}) - {_ENDED}

    def _is_dead(self, name: str) -> bool:
        try:
            with self._lock_path(name).open("rb") as lock:
                return _try_lock(lock)
        except FileNotFoundError:
            return True

    def _bury(self, names: Sequence[str]) -> None:
        """Keep what the dead have counted, and remove their files."""
        for kind in _LASTING if names else ():
            self._add_up(kind, [self._path(kind, name) for name in names])
        for name in names:
            for kind in _OWN:
                self._path(kind, name).unlink(missing_ok=True)
            self._lock_path(name).unlink(missing_ok=True)

    def _add_up(self, kind: str, paths: Sequence[Path]) -> None:
        total, new = self._path(kind, _ENDED), self.directory / f"{kind}_{_ENDED}.new"
        new.unlink(missing_ok=True)
        if total.exists():
            shutil.copyfile(total, new)
        sums = MmapedDict(str(new))
        for path in paths:
            for key, value in _values(path):
                sums.write_value(key, sums.read_value(key)[0] + value, 0.0)
        sums.close()
        new.replace(total)

    def _path(self, kind: str, name: str) -> Path:
        return self.directory / f"{kind}_{name}.db"

    def _lock_path(self, name: str) -> Path:
        return self.directory / f"{name}.lock"


def _values(path: Path) -> list[tuple[str, float]]:
    """What a file of a dead process holds; nothing, where a crash of the machine has left it broken."""
    try:
        found = [(key, value) for key, value, _, _ in MmapedDict.read_all_values_from_file(str(path))]
        for key, _ in found:
            json.loads(key)
    except FileNotFoundError:
        return []
    except (RuntimeError, ValueError, struct.error) as error:
        log.warning("metrics.file_broken", file=path.name, error=type(error).__name__)
        return []
    return found


def _reserve(path: Path) -> None:
    """Make a file that is as large as its content will be, all of it zero, which prometheus_client takes for empty."""
    with path.open("ab") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, FILE_BYTES)
        else:
            file.write(bytes(FILE_BYTES))


def _hold(path: Path) -> IO[bytes]:
    """A new file, locked for as long as this process lives."""
    while True:
        file = path.open("ab")
        fcntl.flock(file, fcntl.LOCK_EX)
        # One who reads may have met the file before it was locked, and taken it away.
        if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
            return file
        file.close()


def _try_lock(file: IO[bytes]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
