"""The demo model: it speaks Ollama's protocol, and it never passes for a language model."""

from __future__ import annotations

import io
import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from webapp.embedded import demo_model
from webapp.embedded.demo_model import Chat, answer, application, rest_of, tokens

QUICK = 1_000_000.0


def call(method: str, path: str, body: Any = None, *, raw: bytes | None = None) -> tuple[str, list[dict[str, Any]]]:
    """Status, and the answer's lines."""
    statuses: list[str] = []
    payload = raw if raw is not None else json.dumps(body).encode()
    environ = {"REQUEST_METHOD": method, "PATH_INFO": path, "wsgi.input": io.BytesIO(payload)}
    chunks = application(environ, lambda status, headers: statuses.append(status), tokens_per_second=QUICK)
    return statuses[0], [json.loads(chunk) for chunk in chunks]


def chat(*messages: tuple[str, str], **more: Any) -> tuple[str, list[dict[str, Any]]]:
    body = {"model": "demo", "messages": [{"role": role, "content": text} for role, text in messages]}
    return call("POST", "/api/chat", body | more)


def text_of(lines: list[dict[str, Any]], name: str = "content") -> str:
    return "".join(line["message"].get(name, "") for line in lines)


class TestChat:
    def test_it_says_first_that_it_is_no_language_model(self) -> None:
        _, lines = chat(("user", "Who are you?"))
        opening = text_of(lines).split("\n")[0]
        assert "demo model" in opening
        assert "not a language model" in opening
        assert {line["model"] for line in lines} == {"demo"}

    def test_it_repeats_a_piece_of_the_question_on_one_line(self) -> None:
        _, lines = chat(("user", "Grüße ☺\n\n# from\there " + "x" * 1000))
        quoted = next(line for line in text_of(lines).split("\n") if line.startswith("> "))
        assert quoted.startswith("> Grüße ☺ # from here xxx")
        assert len(quoted) < 200

    def test_it_writes_long_enough_for_stop_to_be_pressed(self) -> None:
        _, lines = chat(("user", "Hello"))
        seconds = len(lines) / demo_model.TOKENS_PER_SECOND
        assert 5 < seconds < 15

    def test_the_stream_is_ollamas(self) -> None:
        status, lines = chat(("user", "Hello"))
        assert status == "200 OK"
        assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
        last = lines[-1]
        assert last["done_reason"] == "stop"
        assert last["eval_count"] == len(lines) - 1
        assert last["message"] == {"role": "assistant", "content": ""}

    def test_without_streaming_the_same_text_comes_whole(self) -> None:
        _, lines = chat(("user", "Hello"))
        _, (whole,) = chat(("user", "Hello"), stream=False)
        assert whole["message"] == {"role": "assistant", "content": text_of(lines)}
        assert whole["done"] is True

    def test_thinking_comes_first_and_apart(self) -> None:
        _, lines = chat(("user", "Hello"), think=True)
        kinds = [kind for kind, _ in itertools.groupby("thinking" in line["message"] for line in lines)]
        assert kinds == [True, False]
        assert "not thinking either" in text_of(lines, "thinking")
        assert text_of(lines) == answer("Hello")

    def test_a_limit_of_tokens_ends_it_with_length(self) -> None:
        _, lines = chat(("user", "Hello"), options={"num_predict": 7})
        assert len(lines) == 8
        assert lines[-1]["done_reason"] == "length"

    @pytest.mark.parametrize("cut", [0, 1, 200, 10_000])
    def test_it_goes_on_after_a_prefill(self, cut: int) -> None:
        full = answer("Hello")
        _, lines = chat(("user", "Hello"), ("assistant", full[:cut]), think=True)
        assert full[:cut] + text_of(lines) == full
        assert text_of(lines, "thinking") == "" or cut == 0

    def test_it_goes_on_after_the_text_of_another_and_says_so(self) -> None:
        _, lines = chat(("user", "Hello"), ("assistant", "Once upon a time"))
        assert "demo model" in text_of(lines)

    def test_only_the_last_question_counts(self) -> None:
        _, lines = chat(("user", "First"), ("assistant", "So"), ("user", "Second"))
        assert "> Second" in text_of(lines)
        assert "First" not in text_of(lines)


class TestRefusals:
    def test_an_unknown_model_is_refused_in_ollamas_words(self) -> None:
        status, lines = call("POST", "/api/chat", {"model": "llama3.2", "messages": []})
        assert (status, lines) == ("404 Not Found", [{"error": "model 'llama3.2' not found"}])

    @pytest.mark.parametrize("raw", [b"{", b"[]", b"\xff", b""])
    def test_a_body_that_is_no_object_is_refused(self, raw: bytes) -> None:
        status, (line,) = call("POST", "/api/chat", raw=raw)
        assert status == "400 Bad Request"
        assert line["error"]

    def test_a_request_without_a_model_is_refused(self) -> None:
        assert call("POST", "/api/chat", {})[0] == "400 Bad Request"

    def test_an_unknown_path_is_refused(self) -> None:
        assert call("GET", "/api/embed")[0] == "404 Not Found"


class TestLists:
    def test_the_one_model_is_listed_as_a_demo(self) -> None:
        _, (tags,) = call("GET", "/api/tags")
        assert [model["name"] for model in tags["models"]] == ["demo"]

    def test_the_version_says_demo(self) -> None:
        assert call("GET", "/api/version")[1] == [{"version": "0.0.0-demo"}]

    def test_it_can_think(self) -> None:
        _, (shown,) = call("POST", "/api/show", {"model": "demo"})
        assert "thinking" in shown["capabilities"]


@given(st.text())
def test_tokens_join_to_the_text(text: str) -> None:
    assert "".join(tokens(text)) == text


@given(st.text(), st.integers(min_value=0, max_value=2000))
def test_every_prefix_of_an_answer_is_taken_up_exactly(question: str, cut: int) -> None:
    full = answer(question)
    assert full[:cut] + rest_of(full, full[:cut]) == full


@pytest.mark.parametrize("body", [{}, {"messages": None}, {"messages": [1, {}]}, {"options": None, "messages": []}])
def test_a_sparse_request_is_read_with_defaults(body: dict[str, Any]) -> None:
    assert Chat.parse(body) == Chat(question="", prefill="", think=False, stream=True, token_limit=None)
