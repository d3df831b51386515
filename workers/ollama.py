"""OllamaService: one request to the upstream, which can be interrupted in any phase.

The protocol is Ollama's `POST /api/chat`: newline-delimited JSON, a `message` with `content` or `thinking`
in each line, `done: true` in the last (https://docs.ollama.com/api/chat).

The reader does nothing but read, so that it may be killed at any switch point: while it connects, while
the model loads and the upstream has not sent even its headers, or in the middle of a silence. The
exception that kills it passes through urllib3, which closes the connection on the way out.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import orjson
import requests
from requests import RequestException
from urllib3.exceptions import HTTPError

from webapp.errors import SluicegateError
from webapp.streams.lifecycle import TerminationReason
from webapp.upstream import is_loopback

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
_READ_BYTES: Final = 65_536


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

    def __init__(self, base_url: str, *, connect_timeout_seconds: float, line_limit_bytes: int) -> None:
        self._base_url = base_url
        self._connect_timeout_seconds = connect_timeout_seconds
        self._line_limit_bytes = line_limit_bytes

    def chat(self, request: ChatRequest, on_text: Callable[[str, str], None], on_open: Callable[[], None]) -> ChatEnd:
        """Read one answer to its end.

        `on_open` is called when a connection is about to be made, `on_text(thinking, content)` for what each
        arrived chunk holds. Neither may block. The connection is closed when this returns or raises.

        Raises:
            UpstreamError: see there; what was read before has been handed on.
        """
        try:
            with requests.Session() as http:
                # A proxy of the environment is for the world outside.
                http.trust_env = not is_loopback(self._base_url)
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
                    return self._read(response, on_text)
        except (RequestException, HTTPError, OSError) as error:
            raise UpstreamError(_broken(error, self._base_url)) from error

    def _read(self, response: requests.Response, on_text: Callable[[str, str], None]) -> ChatEnd:
        """Hand on, for each chunk that arrives, the text of all its lines together."""
        spoken = False
        for lines in self._lines(response):
            thinking: list[str] = []
            content: list[str] = []
            end: ChatEnd | None = None
            try:
                for line in lines:
                    # Thinking after the first content does not count, however the network has cut the lines.
                    end = _take(line, [] if spoken or content else thinking, content)
                    if end is not None:
                        break
            finally:
                if thinking or content:
                    spoken = spoken or bool(content)
                    on_text(clean("".join(thinking)), clean("".join(content)))
            if end is not None:
                return end
        raise UpstreamError("The model's server closed the connection before the answer's end")

    def _lines(self, response: requests.Response) -> Iterator[list[bytes]]:
        """The complete lines of each chunk; a last line without a newline counts too."""
        rest = b""
        while chunk := response.raw.read1(_READ_BYTES):
            *lines, rest = (rest + chunk).split(b"\n")
            if len(rest) > self._line_limit_bytes or any(len(line) > self._line_limit_bytes for line in lines):
                raise UpstreamError(f"The model's server sent a line of over {self._line_limit_bytes} bytes")
            if lines:
                yield lines
        if rest.strip():
            yield [rest]


def clean(text: str) -> str:
    """NUL and lone surrogates, which PostgreSQL and JSON refuse, become U+FFFD, before anything is counted."""
    return _UNSTORABLE.sub("\ufffd", text)


def _take(line: bytes, thinking: list[str], content: list[str]) -> ChatEnd | None:
    if not line.strip():
        return None
    data = _parse(line)
    if "error" in data:
        raise UpstreamError(f"The model's server reported: {_short(data['error'])}")
    message = data.get("message")
    if isinstance(message, dict):
        for name, pieces in (("thinking", thinking), ("content", content)):
            if isinstance(piece := message.get(name), str) and piece:
                pieces.append(piece)
    if data.get("done") is not True:
        return None
    reason = TerminationReason.LENGTH if data.get("done_reason") == "length" else TerminationReason.STOP
    return ChatEnd(reason, {name: data[name] for name in _STATS if _is_figure(data.get(name))})


def _is_figure(value: Any) -> bool:
    """What a database takes as JSON, and no more than a figure or a word."""
    if isinstance(value, str):
        return len(value) <= 100 and clean(value) == value
    return isinstance(value, int | float) and math.isfinite(value) and abs(value) < 2**63


def _parse(line: bytes) -> dict[str, Any]:
    try:
        data = orjson.loads(line)
    except orjson.JSONDecodeError:
        data = _parse_leniently(line)
    if not isinstance(data, dict):
        raise UpstreamError(f"The model's server sent a line that is not a JSON object: {_short(line)}")
    return data


def _parse_leniently(line: bytes) -> Any:
    """What orjson refuses but can be read: lone surrogates as escapes, and bytes that are not UTF-8."""
    try:
        return json.loads(line.decode("utf-8", errors="replace"), strict=False)
    except ValueError:
        raise UpstreamError(f"The model's server sent a line that is not JSON: {_short(line)}") from None


def _refusal(response: requests.Response) -> str:
    body = response.raw.read(2000, decode_content=True)
    try:
        message = orjson.loads(body)["error"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        message = body
    return f"The model's server answered {response.status_code}: {_short(message) or response.reason}"


def _broken(error: Exception, base_url: str) -> str:
    if isinstance(error, requests.ConnectTimeout):
        return f"The model's server at {base_url} did not accept a connection in time"
    if isinstance(error, requests.ConnectionError) and "Connection refused" in str(error):
        return f"The model's server at {base_url} refused the connection: is it running?"
    return f"The connection to the model's server broke: {_short(error)}"


def _short(value: Any) -> str:
    text = value.decode("utf-8", errors="replace") if isinstance(value, bytes) else str(value)
    return clean(" ".join(text.split()))[:300]
