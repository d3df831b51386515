"""A network between a process and a service, which can stop to carry anything without telling either of them."""

from __future__ import annotations

import contextlib
import selectors
import socket
import struct
import threading
from types import TracebackType
from typing import Self

from tests.services import HOST, free_port

_RESET_AT_CLOSE = struct.pack("ii", 1, 0)


class Network:
    """Forwards TCP connections to a port of this host.

    While it is `cut` it takes no connection, and has reset those there were.

    While it is `silent` it takes connections and bytes and carries none of them; when it no longer is, whoever
    was connected is sent a reset. Nothing that was said in the silence arrives.
    """

    def __init__(self, port: int) -> None:
        self.port = free_port()
        self._to_port = port
        self._silent = threading.Event()
        self._speaks = threading.Event()
        self._speaks.set()
        self._listen()

    def _listen(self) -> None:
        self._listener = socket.create_server((HOST, self.port), backlog=512)
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    @property
    def url(self) -> str:
        """`redis://` URL of what is behind it."""
        return f"redis://{HOST}:{self.port}/0"

    def silence(self) -> None:
        """Carry nothing from now on."""
        self._speaks.clear()
        self._silent.set()

    def cut(self) -> None:
        """Reset what is connected, and take nothing new."""
        self._listener.close()
        self._silent.set()
        self._speaks.set()

    def mend(self) -> None:
        """Take and carry what is new, after a cut."""
        self._silent.clear()
        self._listen()

    def speak(self) -> None:
        """Reset what was connected, and carry what is new."""
        self._silent.clear()
        self._speaks.set()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # it was closed
            while True:
                client, _ = listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            stack.callback(_reset, client)
            if self._silent.is_set():
                self._speaks.wait()
                return
            server = socket.create_connection((HOST, self._to_port), timeout=5)
            stack.callback(_reset, server)
            self._carry(client, server)

    def _carry(self, client: socket.socket, server: socket.socket) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(client, selectors.EVENT_READ, server)
            selector.register(server, selectors.EVENT_READ, client)
            while True:
                ready = selector.select(0.05)
                if self._silent.is_set():
                    self._speaks.wait()
                    return
                for key, _ in ready:
                    source, target = key.fileobj, key.data
                    assert isinstance(source, socket.socket)
                    if not (said := source.recv(65_536)):
                        return
                    target.sendall(said)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.speak()
        self._listener.close()


def _reset(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_AT_CLOSE)
    connection.close()
