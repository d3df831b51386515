"""The chunked transfer coding of HTTP/1.1, taken apart as it arrives (RFC 9112, section 7.1).

http.client and urllib3 give out one chunk a read, through five layers each time. Ollama sends one token a chunk, and
what the network has brought of them by then is read here at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from urllib3.exceptions import HTTPError

_NEWLINE: Final = b"\r\n"
_SIZE_LINE_LIMIT_BYTES: Final = 4096


class InvalidChunk(HTTPError):
    """What came is not the coding."""


class Dechunker:
    """Takes what arrives of a chunked body, cut anywhere, and gives out its data. Trailers are not looked at."""

    def __init__(self) -> None:
        self._rest = b""
        self._left_bytes = 0
        """Of the present chunk."""
        self._newline: bytes = b""
        """What ends the chunk before the next one's size."""
        self.ended = False
        """Whether the last chunk has come."""

    def feed(self, arrived: bytes) -> Iterator[bytes]:
        """The data that is in `arrived`, in one piece if there is any; of a chunk that is not whole yet, what there is.

        Raises:
            InvalidChunk: this is not the coding; what came before has been given out.
        """
        pieces: list[bytes] = []
        broken: InvalidChunk | None = None
        try:
            self._take(self._rest + arrived, pieces)
        except InvalidChunk as error:
            broken = error
        if pieces:
            yield b"".join(pieces)
        if broken:
            raise broken

    def _take(self, data: bytes, pieces: list[bytes]) -> None:
        at = 0
        while not self.ended:
            if self._left_bytes:
                pieces.append(data[at : at + self._left_bytes])
                at += len(pieces[-1])
                self._left_bytes -= len(pieces[-1])
                if self._left_bytes:
                    break
                self._newline = _NEWLINE
            begin = at + len(self._newline)
            end = data.find(_NEWLINE, begin)
            if end < 0:
                break
            if data[at:begin] != self._newline:
                raise InvalidChunk(f"a chunk of the body does not end where it should: {data[at:begin]!r}")
            self._left_bytes, self._newline = _size(data[begin:end]), b""
            self.ended = not self._left_bytes
            at = end + len(_NEWLINE)
        self._rest = data[at:]
        if len(self._rest) > _SIZE_LINE_LIMIT_BYTES:
            raise InvalidChunk("a chunk of the body has no size")


def _size(line: bytes) -> int:
    """In bytes; extensions, which stand behind a semicolon, mean nothing here."""
    digits = line.partition(b";")[0].strip()
    try:
        size_bytes = int(digits, 16)
    except ValueError:
        size_bytes = -1
    if size_bytes < 0:
        raise InvalidChunk(f"{digits[:40]!r} is no size of a chunk")
    return size_bytes
