"""Going on with an answer, giving another, and asking again for what was asked already."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.functional.ending import assert_ended, rows_of
from tests.functional.nodes import ApiError, Client, Reader, Stack
from tests.functional.text import sha256
from tests.services import wait_until
from tests.upstream import ChatRecord, Script, UpstreamProcess, expected_text

LONG = "pace=80,tokens=120,alphabet=mixed"
HALTS = "pace=200,tokens=60,alphabet=mixed,silence_at=20:60"
"""Falls silent after a third; one who goes on from there hears the rest at once."""
HALTS_TWICE = HALTS + "+40:60"


def first_tokens(model: str, count: int) -> str:
    """The beginning of a model's answer."""
    script = Script.parse(model)
    return "".join(script.token(index) for index in range(count))


@pytest.fixture(scope="module")
def stack_database() -> str:
    return "sqlite"


@pytest.fixture(scope="module")
def stack_settings() -> Mapping[str, str]:
    return {"SLUICEGATE_LEASE_RENEW_SECONDS": "0.1"}


def stopped(client: Client, model: str = HALTS, tokens: int = 20, **options: Any) -> tuple[dict[str, Any], Reader]:
    """A stream that its user has stopped, and who read it until then."""
    session = client.post_message("go on", model=model, **options)
    reader = client.follow(session["sessionId"])
    reader.wait_for_text(len(first_tokens(model, tokens)))
    client.terminate(session["sessionId"])
    reader.wait_until_done()
    return session, reader


def ended(client: Client, model: str, **options: Any) -> tuple[dict[str, Any], Reader]:
    """A stream that has come to an end of its own."""
    session = client.post_message("go on", model=model, **options)
    reader = client.follow(session["sessionId"])
    reader.wait_until_done()
    return session, reader


def answers(client: Client, conversation_id: str) -> list[dict[str, Any]]:
    """What the assistant has said."""
    return [one for one in client.messages(conversation_id) if one["role"] == "assistant"]


def refusal(call: Any, *arguments: Any) -> tuple[int, str | None]:
    with pytest.raises(ApiError) as refused:
        call(*arguments)
    return refused.value.status, refused.value.code


def last_asked(upstream: UpstreamProcess) -> ChatRecord:
    return upstream.requests()[-1]


class TestContinue:
    def test_after_a_stop(self, stack: Stack, client: Client, upstream: UpstreamProcess) -> None:
        old, old_reader = stopped(client)
        old_receipt = client.terminate(old["sessionId"])
        partial = old_receipt["partialResponse"]
        new = client.continue_stream(old["sessionId"])
        reader = client.follow(new["sessionId"])
        assert new["sessionId"] != old["sessionId"]
        assert (new["messageId"], new["conversationId"]) == (old["messageId"], old["conversationId"])
        assert (new["status"], new["eventsUrl"]) == ("ACTIVE", f"/api/streams/{new['sessionId']}/events")
        # While it goes on nobody is shown less than before.
        assert client.message(new)["content"].startswith(partial)
        assert client.stream(new["sessionId"])["length"] >= len(partial)

        assert_ended(stack, upstream, new, [reader], "stop")
        assert reader.text == client.message(new)["content"] == expected_text(HALTS).content
        asked = last_asked(upstream)
        assert [one["role"] for one in asked.messages] == ["user", "assistant"]
        assert asked.prefill == partial
        # Its offsets are those of the whole message: it opens with the partial, and one can come in anywhere.
        assert reader.of("message")[0].data["content"] == partial
        assert reader.ids[0] == f"{len(partial)}-0"
        within = client.follow(new["sessionId"], f"{len(partial) - 3}-0")
        within.wait_until_done()
        assert within.text == reader.text[len(partial) - 3 :]
        assert len(client.messages(old["conversationId"])) == 2

        # What was said of the old one stays true.
        assert client.terminate(old["sessionId"]) == old_receipt
        again = client.follow(old["sessionId"])
        assert again.wait_until_done() == old_reader.done
        assert again.text == old_reader.text == partial
        assert client.stream(old["sessionId"])["length"] == len(partial)
        assert_ended(stack, upstream, new, [client.follow(new["sessionId"])], "stop")

    def test_stopped_again_and_again(self, stack: Stack, client: Client, upstream: UpstreamProcess) -> None:
        session, reader = stopped(client, HALTS_TWICE)
        receipts = [client.terminate(session["sessionId"])]
        session = client.continue_stream(session["sessionId"])
        reader = client.follow(session["sessionId"])
        reader.wait_for_text(len(first_tokens(HALTS_TWICE, 40)))
        receipts.append(client.terminate(session["sessionId"]))
        assert_ended(stack, upstream, session, [reader], "user")
        assert [len(receipt["partialResponse"].split()) for receipt in receipts] == [20, 40]
        for receipt in receipts:
            assert receipt["partialResponse"] == reader.text[: receipt["length"]]
            assert receipt["sha256"] == sha256(receipt["partialResponse"])
            assert client.terminate(receipt["sessionId"]) == receipt
            late = client.follow(receipt["sessionId"])
            assert late.wait_until_done()["sha256"] == receipt["sha256"]
            assert late.text == receipt["partialResponse"]
        last = client.continue_stream(session["sessionId"])
        reader = client.follow(last["sessionId"])
        assert_ended(stack, upstream, last, [reader], "stop")
        assert reader.text == expected_text(HALTS).content

    @pytest.mark.parametrize("fault", ["error_at=8", "reset_at=8", "close_at=8"])
    def test_after_an_error(self, stack: Stack, client: Client, upstream: UpstreamProcess, fault: str) -> None:
        old, old_reader = ended(client, f"pace=100,tokens=30,alphabet=mixed,{fault}")
        assert len(old_reader.text.split()) == 8
        assert client.message(old)["detail"]
        new = client.continue_stream(old["sessionId"])
        reader = client.follow(new["sessionId"])
        assert_ended(stack, upstream, new, [reader], "stop")
        assert last_asked(upstream).prefill == old_reader.text
        assert reader.text == expected_text("tokens=30,alphabet=mixed").content
        message = client.message(new)
        assert (message["status"], message["reason"], message["detail"]) == ("COMPLETED", "stop", None)
        assert client.terminate(old["sessionId"])["reason"] == "upstream_error"

    def test_after_the_longest_length(self, stack: Stack, client: Client, upstream: UpstreamProcess) -> None:
        """The model was told to say no more at once; it is told the same once more."""
        old, old_reader = ended(client, "pace=100,tokens=30", options={"num_predict": 10})
        assert old_reader.done is not None
        assert old_reader.done["reason"] == "length"
        new = client.continue_stream(old["sessionId"])
        reader = client.follow(new["sessionId"])
        assert_ended(stack, upstream, new, [reader], "length")
        assert (last_asked(upstream).prefill, last_asked(upstream).options) == (old_reader.text, {"num_predict": 10})
        assert len(reader.text.split()) == 20
        last = client.continue_stream(new["sessionId"])
        client.follow(last["sessionId"]).wait_until_done()
        assert client.message(last)["content"] == expected_text("tokens=30").content

    def test_from_the_thinking(self, stack: Stack, client: Client, upstream: UpstreamProcess) -> None:
        """There is no answer yet to go on with: the model thinks again, behind what it had thought."""
        model = "pace=60,thinking=100,tokens=5"
        old = client.post_message("think", model=model, think=True)
        old_reader = client.follow(old["sessionId"])
        wait_until(lambda: len(old_reader.thinking) > 20, 10)
        old_receipt = client.terminate(old["sessionId"])
        old_reader.wait_until_done()
        assert (old_receipt["length"], old_receipt["thinkingLength"]) == (0, len(old_reader.thinking))

        new = client.continue_stream(old["sessionId"])
        reader = client.follow(new["sessionId"])
        assert_ended(stack, upstream, new, [reader], "stop")
        assert (last_asked(upstream).prefill, last_asked(upstream).think) == (None, True)
        assert reader.thinking == old_reader.thinking + expected_text(model).thinking
        assert reader.text == expected_text(model).content
        assert client.terminate(old["sessionId"]) == old_receipt
        again = client.follow(old["sessionId"])
        assert again.wait_until_done() == old_reader.done
        assert (again.thinking, again.text) == (old_reader.thinking, "")

    def test_behind_the_thinking(self, stack: Stack, client: Client, upstream: UpstreamProcess) -> None:
        """What was thought is kept, and is not thought once more."""
        model = f"{HALTS},thinking=4"
        old, old_reader = stopped(client, model, think=True)
        new = client.continue_stream(old["sessionId"])
        reader = client.follow(new["sessionId"])
        assert_ended(stack, upstream, new, [reader], "stop")
        assert (last_asked(upstream).prefill, last_asked(upstream).think) == (old_reader.text, False)
        assert (reader.thinking, reader.text) == tuple(expected_text(model))

    def test_what_is_not_gone_on_with(self, stack: Stack, client: Client) -> None:
        complete, _ = ended(client, "tokens=3")
        assert refusal(client.continue_stream, complete["sessionId"]) == (409, "conflict")
        active = client.post_message("go on", model="pace=20,tokens=10000")
        assert refusal(client.continue_stream, active["sessionId"]) == (409, "conversation_busy")
        assert refusal(client.retry_stream, active["sessionId"]) == (409, "conversation_busy")
        client.terminate(active["sessionId"])
        newer = client.continue_stream(active["sessionId"])
        assert refusal(client.continue_stream, newer["sessionId"]) == (409, "conversation_busy")
        client.terminate(newer["sessionId"])
        assert refusal(client.continue_stream, active["sessionId"]) == (409, "conflict")

    def test_twice_at_once(self, stack: Stack, client: Client, upstream: UpstreamProcess) -> None:
        """Of eight who ask one is obeyed, whichever call it was."""
        for call in (client.continue_stream, client.retry_stream):
            old, _ = stopped(client, HALTS_TWICE)
            outcomes = together(lambda _, call=call, old=old: call(old["sessionId"]))
            (new,) = [one for one in outcomes if not isinstance(one, ApiError)]
            refused = [one for one in outcomes if isinstance(one, ApiError)]
            assert {one.status for one in refused} == {409}
            assert {one.code for one in refused} <= {"conversation_busy", "conflict"}
            assert len(client.call("GET", f"/api/conversations/{old['conversationId']}")["activeStreams"]) == 1
            reader = client.follow(new["sessionId"])
            client.terminate(new["sessionId"])
            assert_ended(stack, upstream, new, [reader], "user")
            assert len(answers(client, old["conversationId"])) == (1 if call == client.continue_stream else 2)

    def test_with_a_key(self, stack: Stack, client: Client) -> None:
        """It may be repeated, also at once, also after its end."""
        for name, call in (("continue", client.continue_stream), ("retry", client.retry_stream)):
            old, _ = stopped(client)
            found = together(lambda _, call=call, old=old, key=name: call(old["sessionId"], idempotency_key=key))
            assert len({one["sessionId"] for one in found}) == 1
            client.terminate(found[0]["sessionId"])
            after = call(old["sessionId"], idempotency_key=name)
            assert (after["sessionId"], after["status"]) == (found[0]["sessionId"], "TERMINATED")
            other, _ = stopped(client)
            with pytest.raises(ApiError) as refused:
                call(other["sessionId"], idempotency_key=name)
            assert (refused.value.status, refused.value.code) == (422, "invalid")


def together(call: Any, callers: int = 8) -> list[Any]:
    """What each of several callers at once gets: an answer or an ApiError."""

    def outcome(number: int) -> Any:
        try:
            return call(number)
        except ApiError as error:
            return error

    with ThreadPoolExecutor(callers) as pool:
        return list(pool.map(outcome, range(callers)))


class TestRetry:
    def test_another_answer(self, stack: Stack, client: Client, upstream: UpstreamProcess) -> None:
        first, _ = ended(client, "tokens=3")
        old, old_reader = stopped(
            client, LONG, conversation_id=first["conversationId"], options={"seed": 7}, think=True
        )
        new = client.retry_stream(old["sessionId"])
        reader = client.follow(new["sessionId"])
        assert new["messageId"] != old["messageId"]
        assert client.message(old)["replacedBy"] == new["messageId"]
        assert_ended(stack, upstream, new, [reader], "stop")
        assert reader.text == expected_text(LONG).content
        asked, before = upstream.requests()[-1], upstream.requests()[-2]
        assert asked.messages == before.messages
        assert [one["content"] for one in asked.messages] == ["go on", expected_text("tokens=3").content, "go on"]
        assert (asked.model, asked.options, asked.think) == (before.model, {"seed": 7}, True)
        # The old answer is kept, and what is said next is said without it.
        assert (client.message(old)["content"], client.message(old)["status"]) == (old_reader.text, "TERMINATED")
        third, _ = ended(client, "tokens=1", conversation_id=old["conversationId"])
        said = [one["content"] for one in last_asked(upstream).messages if one["role"] == "assistant"]
        assert said == [expected_text("tokens=3").content, reader.text]
        assert client.message(third)["replacedBy"] is None

    def test_what_is_not_retried(self, stack: Stack, client: Client) -> None:
        """What was replaced, and what more was said after; a complete answer may be."""
        old, _ = ended(client, "tokens=3")
        new = client.retry_stream(old["sessionId"])
        client.follow(new["sessionId"]).wait_until_done()
        assert refusal(client.retry_stream, old["sessionId"]) == (409, "conflict")
        assert refusal(client.continue_stream, old["sessionId"]) == (409, "conflict")
        ended(client, "tokens=3", conversation_id=old["conversationId"])
        assert refusal(client.retry_stream, new["sessionId"]) == (409, "conflict")
        assert client.message(new)["replacedBy"] is None

    def test_of_one_that_was_gone_on_with(self, stack: Stack, client: Client, upstream: UpstreamProcess) -> None:
        old, _ = stopped(client, LONG, 5)
        newer = client.continue_stream(old["sessionId"])
        client.terminate(newer["sessionId"])
        new = client.retry_stream(newer["sessionId"])
        reader = client.follow(new["sessionId"])
        assert_ended(stack, upstream, new, [reader], "stop")
        assert last_asked(upstream).prefill is None
        assert reader.text == expected_text(LONG).content


def test_who_may(stack: Stack, client: Client) -> None:
    """Who may only read may not; who may not see is told that there is nothing."""
    old, _ = stopped(client)
    viewer, stranger = stack.client(stack.user("viewer")), stack.client(stack.user("stranger"))
    path = f"/api/conversations/{old['conversationId']}/members/viewer"
    client.call("PUT", path, {"role": "viewer"})
    for calls in ("continue_stream", "retry_stream"):
        assert refusal(getattr(viewer, calls), old["sessionId"]) == (403, "forbidden")
        assert refusal(getattr(stranger, calls), old["sessionId"]) == (404, "not_found")
        unknown = "01890000-0000-7000-8000-000000000000"
        assert refusal(getattr(client, calls), unknown) == (404, "not_found")
    client.call("PUT", path, {"role": "editor"})
    new = viewer.continue_stream(old["sessionId"])
    assert client.follow(new["sessionId"]).wait_until_done()["reason"] == "stop"


class TestAskedAgain:
    """A client that did not get its answer asks once more."""

    @pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
    def test_when_the_answer_was_lost(
        self, stack: Stack, client: Client, upstream: UpstreamProcess, accept: str
    ) -> None:
        """It sends its request and is gone; the message was accepted all the same, and is not accepted twice."""
        body = {"content": "once", "model": f"name={accept.partition('/')[2]},pace=50,tokens=30"}
        send_and_go(stack, client, body, accept, key=accept)

        def accepted() -> list[dict[str, Any]]:
            return [one for one in client.call("GET", "/api/streams")["items"] if one["model"] == body["model"]]

        (first,) = wait_until(accepted, 5, "the message was accepted")
        again = client.post_message("once", model=body["model"], idempotency_key=accept)
        assert again["sessionId"] == first["sessionId"]
        reader = client.follow(again["sessionId"])
        assert_ended(stack, upstream, again, [reader], "stop")
        assert len(client.messages(again["conversationId"])) == 2
        assert len(accepted()) == 1
        assert len(upstream.requests()) == 1

    def test_an_answer_that_runs(self, stack: Stack, client: Client, upstream: UpstreamProcess) -> None:
        """`onActive: terminate`: the new message takes the running one's place, and its key brings it back."""
        old = client.post_message("go on", model="name=old,pace=60,tokens=10000")
        old_reader = client.follow(old["sessionId"])
        old_reader.wait_for_text(20)
        wanted: dict[str, Any] = {"conversation_id": old["conversationId"], "model": "name=new,tokens=5"}
        assert refusal(lambda: client.post_message("no, this", **wanted)) == (409, "conversation_busy")
        new, again = (
            client.post_message("no, this", on_active="terminate", idempotency_key="instead", **wanted)
            for _ in range(2)
        )
        assert new["sessionId"] == again["sessionId"]
        reader = client.follow(new["sessionId"])
        assert_ended(stack, upstream, old, [old_reader], "superseded")
        assert_ended(stack, upstream, new, [reader], "stop")
        receipt = client.terminate(old["sessionId"])
        assert (receipt["alreadyEnded"], receipt["partialResponse"]) == (True, old_reader.text)
        assert client.stream(old["sessionId"])["terminatedBy"] == "tester"
        said = [(one["role"], one["content"]) for one in last_asked(upstream).messages]
        assert said == [("user", "go on"), ("assistant", old_reader.text), ("user", "no, this")]
        # Where nothing runs it is an ordinary message.
        third = client.post_message("and?", on_active="terminate", **wanted)
        assert client.follow(third["sessionId"]).wait_until_done()["reason"] == "stop"


def send_and_go(stack: Stack, client: Client, body: dict[str, Any], accept: str, key: str) -> None:
    """Send a message, and close the connection at once, without having read a byte."""
    url, content = urlsplit(stack.url()), json.dumps(body).encode()
    head = [
        "POST /api/stream-message HTTP/1.1",
        f"Host: {url.netloc}",
        f"Authorization: Bearer {client.token}",
        "Content-Type: application/json",
        f"Content-Length: {len(content)}",
        f"Accept: {accept}",
        f"Idempotency-Key: {key}",
    ]
    with socket.create_connection((url.hostname or "", url.port or 0)) as connection:
        connection.sendall("\r\n".join(head).encode() + b"\r\n\r\n" + content)


def test_stopped_again_while_it_is_queued(stack: Stack, client: Client, upstream: UpstreamProcess) -> None:
    """No worker has taken it up: it ends with the text that it began with."""
    old, old_reader = stopped(client, think=True)
    stack.worker.container.process.kill()
    new = client.continue_stream(old["sessionId"])
    reader = client.follow(new["sessionId"])
    assert reader.wait_for_text(len(old_reader.text)) == old_reader.text
    receipt = client.terminate(new["sessionId"])
    assert (receipt["reason"], receipt["partialResponse"]) == ("user", old_reader.text)
    row = assert_ended(stack, upstream, new, [reader], "user")
    assert (row.phase, row.attempt) == ("QUEUED", 0)
    assert len(upstream.requests()) == 1
    assert rows_of(stack, old["sessionId"])[1].session_id == row.id
    stack.start_worker()
    last = client.continue_stream(new["sessionId"])
    reader = client.follow(last["sessionId"])
    assert_ended(stack, upstream, last, [reader], "stop")
    assert reader.text == expected_text(HALTS).content
