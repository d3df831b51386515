"""A TCP proxy with faults, to be put between the product and a server.

It passes everything on until it is told otherwise: to refuse, to swallow (a black hole), to break what is connected, or
to lose one answer: what the client said is passed on, the server does it, and the client hears nothing but a break.
"""

from __future__ import annotations

import contextlib
import re
import select
import socket
import struct
import threading
import time
from types import TracebackType
from typing import Final, Self

from tests.services import HOST, free_port, wait_until

POLL_SECONDS: Final = 0.02
CHUNK_BYTES: Final = 65_536
_PARSED: Final = re.compile(rb"(_pg3_\d+)\0([^\0]+)\0")
_PREPARED: Final = re.compile(rb"_pg3_\d+")
_TRANSACTION_ENDS: Final = re.compile(rb"\b(COMMIT|ROLLBACK)\b")


class Loss:
    """One answer that is to be lost."""

    def __init__(self, pattern: bytes) -> None:
        self.pattern = re.compile(pattern, re.DOTALL)
        self.happened = threading.Event()
        """Set once the server has answered, and the client will not hear of it."""
        self._claimed = threading.Lock()

    def claims(self, said: bytes) -> bool:
        """Whether this is what is waited for; true once only."""
        return self.pattern.search(said) is not None and self._claimed.acquire(blocking=False)

    def wait(self, timeout_seconds: float = 10.0) -> None:
        """Wait until it has happened."""
        assert self.happened.wait(timeout_seconds), f"nobody has said {self.pattern.pattern!r}"


class TcpProxy:
    """Listens on a port of its own, and passes on to `target_port`."""

    def __init__(self, target_port: int) -> None:
        self.port = free_port()
        self._target_port = target_port
        self._listener: socket.socket | None = None
        self._losses: list[Loss] = []
        self._holding = False
        self._generation = 0
        self._closed = False
        self._lock = threading.Lock()
        self._listen()
        threading.Thread(target=self._accept, name="proxy", daemon=True).start()

    # Faults

    def pass_on(self) -> None:
        """As if nothing had been: what was held goes on, and new connections are accepted."""
        self._holding = False
        self._listen()

    def reset(self) -> None:
        """Break every connection; new ones are accepted."""
        self._generation += 1

    def refuse(self) -> None:
        """Break every connection, and refuse new ones."""
        with self._lock:
            if self._listener is not None:
                self._listener.close()
                self._listener = None
        self.reset()

    def swallow(self) -> None:
        """Be a black hole: connections stay and are made, and nothing comes through in either direction."""
        self._holding = True

    def lose_answer(self, pattern: bytes) -> Loss:
        """Lose the answer to the next thing said that matches, and break its connection.

        `pattern` is searched for in all that one client has said since its transaction began, prepared statements
        of PostgreSQL written out: `rb"UPDATE accounts.*COMMIT"` loses the answer to the commit of such a transaction,
        `rb"UPDATE accounts"` that to a statement which is one by itself.
        """
        loss = Loss(pattern)
        self._losses.append(loss)
        return loss

    def close(self) -> None:
        """End it, and every connection."""
        self._closed = True
        self.refuse()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Its threads: one that accepts, and one for each connection

    def _listen(self) -> None:
        with self._lock:
            if self._listener is None:
                # The port is taken for as long as `_accept` still looks at the listener that was closed.
                self._listener = wait_until(
                    lambda: socket.create_server((HOST, self.port), backlog=200), 5, ignoring=(OSError,)
                )

    def _accept(self) -> None:
        while not self._closed:
            listener = self._listener
            if listener is None:
                time.sleep(POLL_SECONDS)
                continue
            with contextlib.suppress(OSError, ValueError):  # it was closed meanwhile
                if select.select([listener], [], [], POLL_SECONDS)[0]:
                    client, _ = listener.accept()
                    threading.Thread(target=self._serve, args=(client, self._generation), daemon=True).start()

    def _serve(self, client: socket.socket, generation: int) -> None:
        while self._holding and generation == self._generation:
            time.sleep(POLL_SECONDS)
        try:
            server = socket.create_connection((HOST, self._target_port), timeout=10)
        except OSError:
            _break(client)
            return
        with contextlib.suppress(OSError):
            self._pump(client, server, generation)
        _break(client)
        _break(server)

    def _pump(self, client: socket.socket, server: socket.socket, generation: int) -> None:
        talk = _Talk()
        loss: Loss | None = None
        while generation == self._generation:
            ready = select.select([client, server], [], [], POLL_SECONDS)[0]
            if self._holding:
                time.sleep(POLL_SECONDS)
                continue
            if client in ready:
                said = client.recv(CHUNK_BYTES)
                transaction = talk.heard(said)
                loss = next((one for one in self._losses if one.claims(transaction)), loss)
                if not said:
                    return
                server.sendall(said)
            if server in ready:
                answer = server.recv(CHUNK_BYTES)
                if loss is not None:
                    loss.happened.set()
                    return
                if not answer:
                    return
                talk.answered()
                client.sendall(answer)


class _Talk:
    """What one client has said since its transaction began."""

    def __init__(self) -> None:
        self._said = b""
        self._statements: dict[bytes, bytes] = {}

    def heard(self, said: bytes) -> bytes:
        self._statements |= dict(_PARSED.findall(said))
        known = [self._statements.get(name, b"") for name in _PREPARED.findall(said)]
        transaction = self._said + b"\n".join([*known, said])
        self._said = b"" if _TRANSACTION_ENDS.search(said) else transaction
        return transaction

    def answered(self) -> None:
        """Where no transaction was begun, each statement is one."""
        if b"BEGIN" not in self._said:
            self._said = b""


def _break(connection: socket.socket) -> None:
    """Close with a reset."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
