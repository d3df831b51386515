"""HTTP and server-sent events over asyncio's streams: hundreds of readers in one thread, each cheap.

A request has a connection of its own. Reading is strict: a body that ends before its end is an error.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

CONNECT_SECONDS: Final = 2.0
BUFFER_BYTES: Final = 1 << 20

BROKEN: Final = (OSError, EOFError, TimeoutError)
"""What a connection that breaks, or was never made, raises here."""


@dataclass
class Response:
    """An answer whose body is still to be read."""

    status: int
    headers: dict[str, str]
    _reader: asyncio.StreamReader
    _writer: asyncio.StreamWriter

    def abort(self) -> None:
        """Break the connection; whoever reads from it is told so."""
        self._writer.transport.abort()

    async def pieces(self, silence_seconds: float) -> AsyncIterator[bytes]:
        """The body as it comes.

        Raises:
            EOFError, OSError: it ended before its end. TimeoutError: nothing came for so long.
        """
        if self.headers.get("transfer-encoding") == "chunked":
            while True:
                async with asyncio.timeout(silence_seconds):
                    size = int(await self._reader.readuntil(b"\r\n"), 16)
                    piece = await self._reader.readexactly(size + 2)
                if not size:
                    return
                yield piece[:-2]
        else:
            async with asyncio.timeout(silence_seconds):
                piece = await self._reader.readexactly(int(self.headers["content-length"]))
            yield piece

    async def body(self, timeout_seconds: float) -> bytes:
        """All of it."""
        if self.status == 204:
            return b""
        return b"".join([piece async for piece in self.pieces(timeout_seconds)])

    async def events(self, silence_seconds: float) -> AsyncIterator[tuple[str, str | None, Any]]:
        """Server-sent events: name, id, data. The body's proper end ends them."""
        rest = b""
        async for piece in self.pieces(silence_seconds):
            *blocks, rest = (rest + piece).split(b"\n\n")
            for block in blocks:
                fields = dict(line.split(b": ", 1) for line in block.split(b"\n") if b": " in line and line[0] != 58)
                if b"data" in fields:
                    identity = fields.get(b"id")
                    name = fields.get(b"event", b"message").decode()
                    yield name, identity.decode() if identity else None, json.loads(fields[b"data"])


@asynccontextmanager
async def request(
    base_url: str,
    method: str,
    path: str,
    headers: Mapping[str, str],
    body: Any = None,
    *,
    timeout_seconds: float,
) -> AsyncIterator[Response]:
    """Send a request, and wait so long for the head of its answer; the connection is closed behind the block."""
    parts = urlsplit(base_url)
    async with asyncio.timeout(CONNECT_SECONDS):
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=BUFFER_BYTES)
    try:
        data = b"" if body is None else json.dumps(body).encode()
        lines = {"Host": parts.netloc, "Connection": "close", "Content-Length": str(len(data)), **headers}
        if data:
            lines["Content-Type"] = "application/json"
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        writer.write(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + data)
        async with asyncio.timeout(timeout_seconds):
            raw = await reader.readuntil(b"\r\n\r\n")
        first, *rest = raw.decode("latin-1").strip().split("\r\n")
        pairs = (line.partition(":") for line in rest)
        answered = {name.strip().lower(): value.strip() for name, _, value in pairs}
        yield Response(int(first.split(" ")[1]), answered, reader, writer)
    finally:
        writer.transport.abort()
