"""OllamaService: one request to the upstream, which can be interrupted in any phase.

The protocol is Ollama's `POST /api/chat`: newline-delimited JSON, a `message` with `content` or `thinking`
in each line, `done: true` in the last (https://docs.ollama.com/api/chat).

The reader does nothing but read, so that it may be killed at any switch point: while it connects, while
the model loads and the upstream has not sent even its headers, or in the middle of a silence. The
exception that kills it passes through urllib3, which closes the connection on the way out.

Nothing that the upstream does costs more than its own stream: what is held of an answer is bounded by two
limits, what is done by what has arrived, and one that sends without a pause leaves the others their turns.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

import orjson
import requests
from requests import RequestException
from urllib3.exceptions import HTTPError, NameResolutionError

from webapp.errors import SluicegateError
from webapp.streams.lifecycle import TerminationReason
from webapp.upstream import UpstreamSession
from workers.chunked import Dechunker, InvalidChunk

_UNSTORABLE: Final = re.compile("[\x00\ud800-\udfff]")
_STATS: Final = (
    "total_duration",
    "load_duration",
    "prompt_eval_count",
    "prompt_eval_duration",
    "eval_count",
    "eval_duration",
    "done_reason",
)
_READ_BYTES: Final = 16384
_FEW_BYTES: Final = 1024
"""Asked for where the last read did not find as much as it asked for: whoever waits holds the room for it."""
_READ_SECONDS: Final = 10e-6
"""What one read takes, about; it cannot be told from its waiting."""
_PIECE_SECONDS: Final = 0.002
"""What is done with one piece takes at most so long: what is over that was a busy machine's pause."""
_TURN_SECONDS: Final = 0.002
_REST: Final = 4
"""How often as long as it has worked a stream rests that always has more: so it has at most a fifth of the process."""
_REFUSAL_BYTES: Final = 2000
_REFUSAL_SECONDS: Final = 2.0
"""That the words of a refusal are waited for: its status is known, and is answer enough."""


class UpstreamError(SluicegateError):
    """The upstream refused, broke off, or said something that is not its protocol; `detail` is for a person."""

    code, status, title = "upstream_error", 502, "The model's server failed"


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """What is asked of the upstream."""

    model: str
    messages: list[dict[str, str]]
    options: Mapping[str, Any] | None = None
    think: bool | str | None = None
    keep_alive: str | None = None

    def body(self) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self.model, "messages": self.messages, "stream": True}
        for name in ("options", "think", "keep_alive"):
            if (value := getattr(self, name)) is not None:
                body[name] = value
        return body


@dataclass(frozen=True, slots=True)
class ChatEnd:
    """How a chat came to its own end: `stop` or `length`, and the upstream's own figures (durations in ns)."""

    reason: TerminationReason
    stats: dict[str, Any]


class OllamaService:
    """Speaks to one Ollama server."""

    def __init__(
        self,
        base_url: str,
        *,
        connect_timeout_seconds: float,
        line_limit_bytes: int,
        answer_limit_characters: int,
    ) -> None:
        """`answer_limit_characters`: code points that are taken of one answer, its thinking included."""
        self._base_url = base_url
        self._connect_timeout_seconds = connect_timeout_seconds
        self._line_limit_bytes = line_limit_bytes
        self._answer_limit_characters = answer_limit_characters

    def chat(self, request: ChatRequest, on_text: Callable[[str, str], None], on_open: Callable[[], None]) -> ChatEnd:
        """Read one answer to its end, which is the line that says so, whatever the connection does then.

        `on_open` is called when a connection is about to be made, `on_text(thinking, content)` for what each
        arrived chunk holds. Neither may block. The connection is closed when this returns or raises.

        Raises:
            UpstreamError: see there; what was read before has been handed on.
        """
        try:
            with UpstreamSession(self._base_url) as http:
                on_open()
                with http.post(
                    f"{self._base_url}/api/chat",
                    json=request.body(),
                    stream=True,
                    timeout=(self._connect_timeout_seconds, None),
                    headers={"Accept-Encoding": "identity"},
                ) as response:
                    if response.status_code != 200:
                        raise UpstreamError(_refusal(response))
                    return self.read(_chunks(response), on_text)
        except (RequestException, HTTPError, OSError) as error:
            raise UpstreamError(_broken(error, self._base_url)) from error

    def read(self, chunks: Iterator[bytes], on_text: Callable[[str, str], None]) -> ChatEnd:
        """Read the body of one answer; for each chunk that arrives, the text of all its lines is handed on together.

        What comes of it is the same however the body is cut into chunks, none of which is empty.

        Raises:
            UpstreamError: see there; what was read before has been handed on.
        """
        answer = _Answer(self._answer_limit_characters)
        for lines in self._lines(chunks):
            end: ChatEnd | None = None
            try:
                for line in lines:
                    self._check_length(line)
                    if (end := answer.take(line)) is not None:
                        break
            finally:
                answer.hand_on(on_text)
            if end is not None:
                return end
        raise UpstreamError("The model's server closed the connection before the answer's end")

    def _lines(self, chunks: Iterator[bytes]) -> Iterator[list[bytes]]:
        """The lines that each chunk completes; a last line without a newline counts too, if it is whole.

        Costs by what arrives, however small its chunks are: what was looked at is not looked at again.
        """
        rest = bytearray()
        for chunk in chunks:
            head, newline, tail = chunk.rpartition(b"\n")
            if newline:
                lines = bytes(rest + head).split(b"\n")
                rest = bytearray(tail)
                yield list(filter(None, lines))
            else:
                rest += chunk
            self._check_length(rest)
        if _is_json(rest):
            yield [bytes(rest)]

    def _check_length(self, line: bytes | bytearray) -> None:
        if len(line) > self._line_limit_bytes:
            raise UpstreamError(f"The model's server sent a line of over {self._line_limit_bytes} bytes")


def _chunks(response: requests.Response) -> Iterator[bytes]:
    """The body as it arrives, decompressed where the upstream compresses although it was asked not to.

    A socket that always has more is never waited for, and nobody else in the process would have a turn: whoever has
    worked for a while rests, so that the others, and a stop of this very stream among them, get through.
    """
    worked_seconds = 0.0
    for piece in _pieces(response.raw):
        began_at = time.perf_counter()
        yield piece
        worked_seconds += min(time.perf_counter() - began_at, _PIECE_SECONDS) + _READ_SECONDS
        if worked_seconds > _TURN_SECONDS:
            time.sleep(worked_seconds * _REST)  # under gevent the others run meanwhile
            worked_seconds = 0.0


def _pieces(raw: Any) -> Iterator[bytes]:
    """What each read finds there: all the chunks that have come, or a part of a body that is not chunked."""
    if raw.chunked and not raw.headers.get("Content-Encoding"):
        dechunker, body, size_bytes = Dechunker(), raw._fp.fp, _FEW_BYTES
        while not dechunker.ended:
            if not (arrived := body.read1(size_bytes)):
                raise InvalidChunk("the body ends before its last chunk")
            size_bytes = _READ_BYTES if len(arrived) == size_bytes else _FEW_BYTES
            yield from dechunker.feed(arrived)
    else:
        while piece := raw.read1(_READ_BYTES, decode_content=True):
            yield piece


class _Answer:
    """What the lines of one answer say, however the network has cut them."""

    def __init__(self, limit_characters: int) -> None:
        self._limit_characters = limit_characters
        self._room_characters = limit_characters
        self._thinking: list[str] = []
        self._content: list[str] = []
        self._spoken = False

    def take(self, line: bytes) -> ChatEnd | None:
        """Keep a line's text; returns the end where this is the last line."""
        if not line.strip():
            return None
        data = _parse(line)
        if data.get("error") is not None:
            raise UpstreamError(f"The model's server reported: {_short(_words(data['error'], line))}")
        message = data.get("message")
        if isinstance(message, dict):
            if not self._spoken:  # thinking after the first content does not count
                self._keep(self._thinking, message.get("thinking"))
            self._spoken |= self._keep(self._content, message.get("content"))
        return _end(data) if data.get("done") is True else None

    def _keep(self, pieces: list[str], piece: Any) -> bool:
        """Keep a piece of text, as far as there is room; returns whether it was one."""
        if not isinstance(piece, str) or not piece:
            return False
        pieces.append(piece[: self._room_characters])
        if len(piece) > self._room_characters:
            raise UpstreamError(f"The model's server sent an answer of over {self._limit_characters} characters")
        self._room_characters -= len(piece)
        return True

    def hand_on(self, on_text: Callable[[str, str], None]) -> None:
        """Give out what was kept since the last time, if anything."""
        thinking, content = clean("".join(self._thinking)), clean("".join(self._content))
        self._thinking, self._content = [], []
        if thinking or content:
            on_text(thinking, content)


def _end(data: dict[str, Any]) -> ChatEnd:
    reason = TerminationReason.LENGTH if data.get("done_reason") == "length" else TerminationReason.STOP
    return ChatEnd(reason, {name: data[name] for name in _STATS if _is_figure(data.get(name))})


def clean(text: str) -> str:
    """NUL and lone surrogates, which PostgreSQL and JSON refuse, become U+FFFD, before anything is counted."""
    return _UNSTORABLE.sub("\ufffd", text)


def _is_figure(value: Any) -> bool:
    """What a database takes as JSON, and no more than a figure or a word."""
    if isinstance(value, str):
        return len(value) <= 100 and clean(value) == value
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 2**63  # which neither infinity nor what is not a number is


def _parse(line: bytes) -> dict[str, Any]:
    try:
        data = orjson.loads(line)
    except orjson.JSONDecodeError:
        data = _parse_leniently(line)
    if not isinstance(data, dict):
        raise UpstreamError(f"The model's server sent a line that is not a JSON object: {_short(line)}")
    return data


def _parse_leniently(line: bytes) -> Any:
    """What orjson refuses but can be read: lone surrogates as escapes, bytes that are not UTF-8, a byte order mark."""
    try:
        return json.loads(line.decode("utf-8-sig", errors="replace"), strict=False)
    except (ValueError, RecursionError):  # the latter: nested more deeply than anybody means
        raise UpstreamError(f"The model's server sent a line that is not JSON: {_short(line)}") from None


def _is_json(rest: bytearray) -> bool:
    """Whether what no newline has ended is a whole line, or one that a broken connection cut off."""
    try:
        return bool(rest.strip()) and isinstance(_parse(bytes(rest)), dict)
    except UpstreamError:
        return False


def _refusal(response: requests.Response) -> str:
    """What a person is told of an answer that is none: its status, and the words that come with it, if they come."""
    body = _beginning(response)
    try:
        message = _words(orjson.loads(body)["error"], body)
    except (orjson.JSONDecodeError, KeyError, TypeError):
        message = body
    if response.is_redirect:
        message = f"it points to {response.headers['Location']}, and redirects are not followed"
    return f"The model's server answered {response.status_code}: {_short(message) or _short(response.reason)}"


def _beginning(response: requests.Response) -> bytes:
    """The first of a body, as much as comes in a moment; whatever it does, and however long it is."""
    body = b""
    timer = threading.Timer(_REFUSAL_SECONDS, _stop_reading, [response])
    timer.start()
    try:
        while len(body) < _REFUSAL_BYTES and (chunk := response.raw.read1(_REFUSAL_BYTES, decode_content=True)):
            body += chunk
    except (HTTPError, OSError):
        pass  # what came before it broke must do
    finally:
        timer.cancel()
    return body[:_REFUSAL_BYTES]


def _stop_reading(response: requests.Response) -> None:
    with contextlib.suppress(OSError, RuntimeError, ValueError):  # it has ended meanwhile
        response.raw.shutdown()


def _words(error: Any, said: bytes) -> str | bytes:
    """The words of an `error`: a text, an object with a `message`, as others than Ollama have it, or as it was said."""
    if isinstance(error, dict):
        error = error.get("message")
    return error if isinstance(error, str) and error.strip() else said


def _broken(error: Exception, base_url: str) -> str:
    causes = list(_causes(error))
    server = f"The model's server at {_place(base_url)}"
    if any(isinstance(cause, NameResolutionError) for cause in causes):
        return f"{server} was not found: its name cannot be resolved"
    if any(isinstance(cause, ConnectionRefusedError) for cause in causes):
        return f"{server} refused the connection: is it running?"
    if isinstance(error, requests.Timeout):
        return f"{server} did not accept a connection in time"
    if isinstance(error, requests.exceptions.SSLError):
        return f"{server} could not be spoken to securely: {_short(causes[-1])}"
    return f"The connection to the model's server broke: {_short(causes[-1])}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what is in it, to the first cause: requests and urllib3 both wrap what they meet."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        inside = (getattr(error, "reason", None), *reversed(error.args), error.__cause__)
        error = next((one for one in inside if isinstance(one, BaseException)), None)


def _place(url: str) -> str:
    """A URL without the password that may be in it."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def _short(value: Any) -> str:
    """At most 300 characters, in one line."""
    text = value[:2000].decode("utf-8", errors="replace") if isinstance(value, bytes) else str(value)[:2000]
    return clean(" ".join(text.split()))[:300]
