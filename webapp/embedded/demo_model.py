"""A stand-in for Ollama, so that the page can be tried with nothing else installed.

It is no language model: every answer says so first, and is the same text around a piece of the
question. It speaks Ollama's `/api/chat` (streaming and not, with thinking and with an assistant
prefill as the last message), `/api/tags`, `/api/show` and `/api/version`, and writes at a pace at
which a person has the time to press Stop.

    python -m webapp.embedded.demo_model --port 11434
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import gevent
from gevent.pywsgi import WSGIServer

MODEL = "demo"
VERSION = "0.0.0-demo"
TOKENS_PER_SECOND = 30.0

_FAMILY = "sluicegate-demo"
_QUOTED_CHARACTERS = 160
_REQUEST_LIMIT_BYTES = 64 * 1024 * 1024
_NANOSECONDS = 1_000_000_000

_OPENING = "This is Sluicegate's **demo model**. It is not a language model, and it has not understood your question"

_THINKING = (
    "I am the demo model, so this is not thinking either: it only shows where a model's thinking appears. "
    "The person wrote {count} characters. I shall say what I am, repeat a piece of the question, "
    "and write long enough for Stop to be pressed."
)

_BODY = """

## What you are looking at

Every word that appears here travels the whole way a real answer travels: from an HTTP server that speaks \
Ollama's protocol, through a Celery worker that writes it to a Redis stream, to the web process and over \
server-sent events to this page. Only the author is missing.

## Things to try

1. **Press Stop** while I am writing. The text ends at once, and what you see is what is saved, to the character.
2. **Reload the page**, or open it in a second window. The stream goes on where it was, in both.
3. **Restart everything** while I am writing. The same message is taken up where its text ended.

> A stop is a fence: nothing that comes after it is ever shown to anyone, and nothing that was shown before it \
is lost.

Code arrives in pieces like everything else:

```python
def answer(question: str) -> str:
    return "I am a demo model."
```

## How to get a real model

Install Ollama, pull a model, and start Sluicegate again. It looks for Ollama on its usual port; where yours \
listens elsewhere, set `OLLAMA_BASE_URL`. The demo model then stays switched off.

That is all I have to say, whatever the question. Thank you for reading to the end.
"""

_AFTER_FOREIGN_TEXT = "\n\nThe **demo model** goes on from here; what stands above is not its text.\n"


class _Refusal(Exception):
    """An answer that is an error: its HTTP status and Ollama's kind of message."""

    def __init__(self, status: str, message: str) -> None:
        self.status = status
        super().__init__(message)


@dataclass(frozen=True)
class Chat:
    """What one request to `/api/chat` asks for."""

    question: str
    prefill: str
    think: bool
    stream: bool
    token_limit: int | None

    @classmethod
    def parse(cls, body: dict[str, Any]) -> Chat:
        """Read a request's body, as forgiving as Ollama is about what may be left out."""
        messages = [message for message in body.get("messages") or [] if isinstance(message, dict)]
        questions = [str(message.get("content") or "") for message in messages if message.get("role") == "user"]
        last = messages[-1] if messages else {}
        limit = (body.get("options") or {}).get("num_predict")
        return cls(
            question=questions[-1] if questions else "",
            prefill=str(last.get("content") or "") if last.get("role") == "assistant" else "",
            think=bool(body.get("think")),
            stream=body.get("stream", True) is not False,
            token_limit=limit if isinstance(limit, int) and limit >= 0 else None,
        )


def answer(question: str) -> str:
    """The whole answer: always the same to the same question, so that it can be taken up anywhere."""
    quoted = " ".join(question.split())
    if not quoted:
        return f"{_OPENING}, nor is there one.{_BODY}"
    if len(quoted) > _QUOTED_CHARACTERS:
        quoted = quoted[:_QUOTED_CHARACTERS] + "…"
    return f"{_OPENING}:\n\n> {quoted}{_BODY}"


def rest_of(text: str, prefill: str) -> str:
    """What is left to write of `text` after a prefill, which may be of another author."""
    if text.startswith(prefill):
        return text[len(prefill) :]
    return _AFTER_FOREIGN_TEXT


def tokens(text: str) -> list[str]:
    """The text in pieces of a word's size; joined, they are the text."""
    return re.findall(r"\s*[^\s]{1,12}|\s+", text)


def pieces(chat: Chat) -> Iterator[tuple[str, str]]:
    """Pairs of a field's name (`thinking` or `content`) and the token that is added to it."""
    if chat.think and not chat.prefill:
        for token in tokens(_THINKING.format(count=len(chat.question))):
            yield "thinking", token
    for token in tokens(rest_of(answer(chat.question), chat.prefill)):
        yield "content", token


def parts(chat: Chat, tokens_per_second: float) -> Iterator[dict[str, Any]]:
    """The answer's lines at their pace; the last has `done`."""
    began, count, reason = datetime.now(UTC), 0, "stop"
    for name, token in pieces(chat):
        if count == chat.token_limit:
            reason = "length"
            break
        gevent.sleep(1 / tokens_per_second)
        count += 1
        yield _line(name, token)
    yield _last_line(began, count, reason, len(tokens(chat.question)))


def whole(lines: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """One line in place of many: what `"stream": false` asks for."""
    gathered = {"content": "", "thinking": ""}
    last: dict[str, Any] = {}
    for last in lines:
        for name in gathered:
            gathered[name] += last["message"].get(name, "")
    if not gathered["thinking"]:
        del gathered["thinking"]
    return last | {"message": {"role": "assistant", **gathered}}


def _line(name: str, token: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": ""} | {name: token}
    return {"model": MODEL, "created_at": _now(), "message": message, "done": False}


def _last_line(began: datetime, count: int, reason: str, prompt_count: int) -> dict[str, Any]:
    duration = int((datetime.now(UTC) - began).total_seconds() * _NANOSECONDS)
    return {
        "model": MODEL,
        "created_at": _now(),
        "message": {"role": "assistant", "content": ""},
        "done": True,
        "done_reason": reason,
        "total_duration": duration,
        "load_duration": 0,
        "prompt_eval_count": prompt_count,
        "prompt_eval_duration": 0,
        "eval_count": count,
        "eval_duration": duration,
    }


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


_DETAILS = {"family": _FAMILY, "families": [_FAMILY], "format": "text", "parameter_size": "0", "quantization_level": ""}


def _tags() -> dict[str, Any]:
    listed = {"name": MODEL, "model": MODEL, "modified_at": _now(), "size": 0, "digest": "0" * 64, "details": _DETAILS}
    return {"models": [listed]}


def _show(body: dict[str, Any]) -> dict[str, Any]:
    _check_model(body)
    return {"details": _DETAILS, "model_info": {}, "capabilities": ["completion", "thinking"]}


def _check_model(body: dict[str, Any]) -> None:
    name = body.get("model") or body.get("name")
    if not name:
        raise _Refusal("400 Bad Request", "model is required")
    if name not in (MODEL, f"{MODEL}:latest"):
        raise _Refusal("404 Not Found", f"model '{name}' not found")


def _read_body(environ: dict[str, Any]) -> dict[str, Any]:
    try:
        body = json.loads(environ["wsgi.input"].read(_REQUEST_LIMIT_BYTES))
    except (ValueError, UnicodeDecodeError) as error:
        raise _Refusal("400 Bad Request", f"invalid JSON: {error}") from None
    if not isinstance(body, dict):
        raise _Refusal("400 Bad Request", "the body is not a JSON object")
    return body


def _encode(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def _chat(environ: dict[str, Any], tokens_per_second: float) -> tuple[str, Iterable[bytes]]:
    body = _read_body(environ)
    _check_model(body)
    chat = Chat.parse(body)
    lines = parts(chat, tokens_per_second)
    if chat.stream:
        return "application/x-ndjson", map(_encode, lines)
    return "application/json", [_encode(whole(lines))]


def _json(value: dict[str, Any]) -> tuple[str, Iterable[bytes]]:
    return "application/json", [_encode(value)]


def _route(environ: dict[str, Any], tokens_per_second: float) -> tuple[str, Iterable[bytes]]:
    method, path = environ["REQUEST_METHOD"].replace("HEAD", "GET"), environ["PATH_INFO"]
    if (method, path) == ("POST", "/api/chat"):
        return _chat(environ, tokens_per_second)
    if (method, path) == ("POST", "/api/show"):
        return _json(_show(_read_body(environ)))
    if (method, path) == ("GET", "/api/tags"):
        return _json(_tags())
    if (method, path) == ("GET", "/api/version"):
        return _json({"version": VERSION})
    if (method, path) == ("GET", "/"):
        return "text/plain; charset=utf-8", [b"Sluicegate's demo model is running. It is not Ollama.\n"]
    raise _Refusal("404 Not Found", "the demo model does not know this path")


def application(
    environ: dict[str, Any], start_response: Callable[..., Any], *, tokens_per_second: float = TOKENS_PER_SECOND
) -> Iterable[bytes]:
    """The WSGI application. A client that leaves ends its answer: the next token cannot be sent."""
    try:
        content_type, chunks = _route(environ, tokens_per_second)
        status = "200 OK"
    except _Refusal as refusal:
        status, (content_type, chunks) = refusal.status, _json({"error": str(refusal)})
    start_response(status, [("Content-Type", content_type)])
    return chunks


def serve(port: int, host: str = "127.0.0.1", tokens_per_second: float = TOKENS_PER_SECOND) -> None:
    """Serve until SIGTERM or SIGINT."""
    handler = functools.partial(application, tokens_per_second=tokens_per_second)
    server = WSGIServer((host, port), handler, log=None)
    for number in (signal.SIGTERM, signal.SIGINT):
        gevent.signal_handler(number, server.stop, timeout=0)
    server.start()
    print(f"The demo model (no language model) listens on http://{host}:{server.server_port}", flush=True)
    server.serve_forever()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="demo_model", description="A stand-in for Ollama: no language model.")
    parser.add_argument("--port", type=int, default=11434, help="0: any free one, which is printed")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--tokens-per-second", type=float, default=TOKENS_PER_SECOND)
    options = parser.parse_args()
    serve(options.port, options.host, options.tokens_per_second)


if __name__ == "__main__":
    main()
