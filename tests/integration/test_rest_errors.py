"""Whatever is wrong with a request, it is told in one form, with a stable code, and nothing was written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any
from uuid import UUID

import pytest
from apiflask import APIFlask
from werkzeug.test import TestResponse

from tests.integration.api import Caller, People, problem
from tests.integration.conftest import MakeWorld
from tests.integration.world import CLOSED_REDIS, WORLD_TEXT, World
from webapp import errors
from webapp.errors import SluicegateError
from webapp.models import Role, new_id
from webapp.schemas import FOLLOWED_LIMIT
from webapp.streams.events import decode_events, done_position
from webapp.streams.lifecycle import TerminationReason

SEND, TERMINATE, CONVERSATIONS = "/api/stream-message", "/api/terminate-stream", "/api/conversations"
# What `docs/protocol.md` lists and clients may compare with: a code that changes breaks them.
CODES = {
    "bad_request": 400,
    "not_json": 400,
    "invalid_cursor": 400,
    "unauthenticated": 401,
    "forbidden": 403,
    "csrf_failed": 403,
    "not_found": 404,
    "method_not_allowed": 405,
    "conflict": 409,
    "conversation_busy": 409,
    "too_large": 413,
    "unsupported_media_type": 415,
    "invalid": 422,
    "too_many_streams": 429,
    "rate_limited": 429,
    "unavailable": 503,
    "internal": 500,
}


@pytest.fixture
def ada(people: People) -> Caller:
    return people("ada")


@pytest.fixture(autouse=True)
def nothing_is_left_running(world: World) -> Iterator[None]:
    yield
    assert world.services.hub.followed == 0


class NothingWritten:
    """A block after which the tables are as they were."""

    def __init__(self, world: World) -> None:
        self._world = world

    def __enter__(self) -> None:
        self._before = self._world.counts()
        self._queued = len(self._world.queue.enqueued)

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            assert self._world.counts() == self._before
            assert len(self._world.queue.enqueued) == self._queued


@pytest.fixture
def nothing_written(world: World) -> NothingWritten:
    return NothingWritten(world)


def every_error(base: type[SluicegateError] = SluicegateError) -> Iterator[type[SluicegateError]]:
    for kind in base.__subclasses__():
        if kind.__module__ == errors.__name__:
            yield kind
            yield from every_error(kind)


def test_the_codes_are_stable() -> None:
    known = {kind.code: kind.status for kind in every_error()} | {SluicegateError.code: SluicegateError.status}
    del known["configuration"]  # of the command line alone
    assert {code: known.get(code) for code in CODES} == CODES


def test_no_two_errors_share_a_code() -> None:
    codes = [kind.code for kind in every_error()]
    assert len(codes) == len(set(codes))


class TestTheBodysForm:
    BODIES: tuple[tuple[str, bytes], ...] = (
        ("cut off", b'{"content": "hello"'),
        ("no JSON", b"hello"),
        ("single quotes", b"{'content': 'hello'}"),
        ("a byte order mark in the middle", b'{\xef\xbb\xbf"content": "hello"}'),
        ("not UTF-8", b'{"content": "\xff\xfe"}'),
        ("a truncated character", b'{"content": "\xf0\x9f\x98"}'),
        ("a list", b'["hello"]'),
        ("a string", b'"hello"'),
        ("a number", b"7"),
        ("null", b"null"),
        ("two objects", b'{"content": "a"}{"content": "b"}'),
        ("a number of ten thousand digits", b'{"content": ' + b"1" * 10_000 + b"}"),
        ("blanks", b"   "),
    )

    @pytest.mark.parametrize("path", [SEND, TERMINATE, CONVERSATIONS])
    def test_what_is_no_json_object_is_refused(self, ada: Caller, nothing_written: NothingWritten, path: str) -> None:
        with nothing_written:
            for name, body in self.BODIES:
                answer = ada.post(path, data=body, content_type="application/json")
                assert problem(answer, 400, "not_json"), name

    @staticmethod
    def nested(depth: int) -> bytes:
        return b'{"content": "hello", "options": {"a": ' + b"[" * depth + b"]" * depth + b"}}"

    def test_what_is_nested_too_deeply_is_refused(self, ada: Caller, nothing_written: NothingWritten) -> None:
        with nothing_written:
            answer = ada.post(SEND, data=self.nested(100_000), content_type="application/json")
            problem(answer, 400, "not_json")

    def test_no_depth_is_an_error_of_ours(self, ada: Caller, world: World) -> None:
        """Whoever has less of the stack left than the parser had must not be the one who finds out."""
        headers = {"Accept": "application/json", "Idempotency-Key": ""}
        for depth in range(860, 1000, 7):
            headers["Idempotency-Key"] = f"depth {depth}"
            answer = ada.post(SEND, data=self.nested(depth), content_type="application/json", headers=headers)
            assert answer.status_code in (202, 400, 422), depth
            if answer.status_code == 202:
                world.manager.terminate(UUID(answer.get_json()["sessionId"]), TerminationReason.USER)

    @pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
    def test_another_type_of_content_is_refused(self, ada: Caller, nothing_written: NothingWritten, kind: str) -> None:
        with nothing_written:
            for path in (SEND, TERMINATE, CONVERSATIONS):
                answer = ada.post(path, data=b'{"content": "hello"}', content_type=kind)
                problem(answer, 415, "unsupported_media_type")

    @pytest.mark.parametrize(
        "kind", ["application/json; charset=utf-8", "APPLICATION/JSON", "application/problem+json"]
    )
    def test_json_by_another_name_is_taken(self, ada: Caller, kind: str) -> None:
        assert ada.post(CONVERSATIONS, data=b'{"title": "mine"}', content_type=kind).status_code == 201


class TestFields:
    BAD: tuple[tuple[str, dict[str, Any]], ...] = (
        ("content", {}),
        ("content", {"content": ""}),
        ("content", {"content": " \n\t\u2003"}),
        ("content", {"content": None}),
        ("content", {"content": 7}),
        ("content", {"content": True}),
        ("content", {"content": ["hello"]}),
        ("content", {"content": {"text": "hello"}}),
        ("content", {"content": "a\0b"}),
        ("content", {"content": "a\ud800b"}),
        ("content", {"content": "\udc00\ud800"}),
        ("conversationId", {"content": "x", "conversationId": "7"}),
        ("conversationId", {"content": "x", "conversationId": 7}),
        ("conversationId", {"content": "x", "conversationId": "'; DROP TABLE users; --"}),
        ("model", {"content": "x", "model": ""}),
        ("model", {"content": "x", "model": 7}),
        ("model", {"content": "x", "model": "m" * 201}),
        ("model", {"content": "x", "model": "m\0"}),
        ("options", {"content": "x", "options": []}),
        ("options", {"content": "x", "options": "seed=7"}),
        ("think", {"content": "x", "think": "very hard"}),
        ("think", {"content": "x", "think": 7}),
        ("keepAlive", {"content": "x", "keepAlive": 7}),
        ("keepAlive", {"content": "x", "keepAlive": "5" * 21}),
        ("onDisconnect", {"content": "x", "onDisconnect": "panic"}),
        ("onActive", {"content": "x", "onActive": "wait"}),
        ("contents", {"content": "x", "contents": "y"}),
        ("conversation_id", {"content": "x", "conversation_id": str(new_id())}),
    )

    def test_what_is_wrong_with_a_message_is_told_by_its_name(
        self, ada: Caller, nothing_written: NothingWritten
    ) -> None:
        with nothing_written:
            for field, body in self.BAD:
                answer = ada.post(SEND, data=json.dumps(body), content_type="application/json")
                document = problem(answer, 422, "invalid")
                named = [one["field"] for one in document["errors"]]
                assert any(one == field or one.startswith(f"{field}.") for one in named), (body, document["errors"])

    @pytest.mark.parametrize(
        ("field", "body"),
        [
            ("sessionId", {}),
            ("sessionId", {"sessionId": "7"}),
            ("sessionId", {"sessionId": 7}),
            ("sessionId", {"sessionId": None}),
            ("sessionId", {"sessionId": [str(new_id())]}),
            ("conversationId", {"sessionId": str(new_id()), "conversationId": "7"}),
            ("force", {"sessionId": str(new_id()), "force": True}),
        ],
    )
    def test_and_with_a_terminate_call(
        self, ada: Caller, nothing_written: NothingWritten, field: str, body: dict[str, Any]
    ) -> None:
        with nothing_written:
            problem(ada.post(TERMINATE, body), 422, "invalid", field)

    @pytest.mark.parametrize("title", ["", "  ", 7, ["x"], "x" * 201, "a\0b", "a\ud800"])
    def test_and_with_a_conversation(
        self, ada: Caller, world: World, nothing_written: NothingWritten, title: Any
    ) -> None:
        mine = world.conversation("ada")
        with nothing_written:
            body = {"data": json.dumps({"title": title}), "content_type": "application/json"}
            problem(ada.post(CONVERSATIONS, **body), 422, "invalid", "title")
            problem(ada.call("PATCH", f"{CONVERSATIONS}/{mine}", **body), 422, "invalid", "title")
        assert world.services.conversations.get(world.user(), mine).title == "A conversation"

    @pytest.mark.parametrize(
        ("field", "query"), [("limit", "limit=0"), ("limit", "limit=x"), ("limit", "limit=201"), ("cursor", "cursor=7")]
    )
    def test_and_with_a_query(self, ada: Caller, field: str, query: str) -> None:
        problem(ada.get(f"{CONVERSATIONS}?{query}"), 422, "invalid", field)

    def test_and_with_a_filter(self, ada: Caller) -> None:
        problem(ada.get("/api/streams?status=BUSY"), 422, "invalid", "status")

    def test_several_are_told_at_once(self, ada: Caller) -> None:
        document = problem(ada.post(SEND, {"content": "", "think": 7, "nonsense": 1}), 422, "invalid")
        named = {one["field"].split(".")[0] for one in document["errors"]}
        assert named >= {"content", "think", "nonsense"}
        assert all(name in document["detail"] for name in ("content", "think", "nonsense"))

    def test_a_wrong_value_is_not_repeated_to_its_sender(self, ada: Caller) -> None:
        answer = ada.post(SEND, {"content": "x", "model": "secret" * 100})
        problem(answer, 422, "invalid", "model")
        assert "secretsecret" not in answer.text


class TestWhatCannotBeStored:
    """JSON, or what Python takes for it, can say what a database or the next parser cannot take."""

    @staticmethod
    def send(ada: Caller, body: str, headers: dict[str, str]) -> TestResponse:
        accepts = headers | {"Accept": "application/json"}
        return ada.post(SEND, data=body, content_type="application/json", headers=accepts)

    @pytest.mark.parametrize(
        "body",
        [
            pytest.param('{"content": "x", "options": {"temperature": NaN}}', id="not a number"),
            pytest.param('{"content": "x", "options": {"temperature": Infinity}}', id="infinity"),
            pytest.param('{"content": "x", "options": {"temperature": 1e999}}', id="too large"),
            pytest.param('{"content": "x", "\\ud800": 1}', id="a lone surrogate as a member"),
        ],
    )
    @pytest.mark.parametrize("headers", [{}, {"Idempotency-Key": "k"}], ids=["", "with a key"])
    def test_it_is_the_senders_mistake(
        self, ada: Caller, nothing_written: NothingWritten, body: str, headers: dict[str, str]
    ) -> None:
        with nothing_written:
            answer = self.send(ada, body, headers)
            problem(answer, answer.status_code, {400: "not_json"}.get(answer.status_code, "invalid"))

    @pytest.mark.parametrize("headers", [{}, {"Idempotency-Key": "k"}], ids=["", "with a key"])
    @pytest.mark.parametrize(
        "option", [2**70, -(2**70), "\ud800", {"\udfff": 1}], ids=["large", "small", "surrogate", "name"]
    )
    def test_what_only_the_upstream_has_to_understand_is_passed_on(
        self, ada: Caller, world: World, option: Any, headers: dict[str, str]
    ) -> None:
        answer = self.send(ada, json.dumps({"content": "x", "options": {"seed": option}}), headers)
        assert answer.status_code == 202, answer.text
        assert world.row(UUID(answer.get_json()["sessionId"])).options == {"seed": option}

    @pytest.mark.parametrize("headers", [{}, {"Idempotency-Key": "k"}], ids=["", "with a key"])
    def test_options_come_through_as_they_were(self, ada: Caller, world: World, headers: dict[str, str]) -> None:
        options = {
            "seed": 2**53 + 1,
            "temperature": 0.1,
            "stop": ["a\0", "é", "👩‍👩‍👧‍👦"],
            "deep": [[[{}]]],
            "none": None,
        }
        answer = self.send(ada, json.dumps({"content": "x", "options": options}), headers)
        assert answer.status_code == 202, answer.text
        assert world.row(UUID(answer.get_json()["sessionId"])).options == options


class TestSize:
    def test_a_message_that_is_too_long_is_refused(self, ada: Caller, nothing_written: NothingWritten) -> None:
        with nothing_written:
            document = problem(ada.send("x" * 1_000_000), 413, "too_large")
            assert document["field"] == "content"
            assert "200000" in document["detail"]
            problem(ada.send("é" * 200_001), 413, "too_large")

    def test_one_that_just_fits_is_taken(self, ada: Caller, world: World) -> None:
        body = json.dumps({"content": "𝔘" * 200_000}, ensure_ascii=False).encode()
        accepts = {"Accept": "application/json"}
        answer = ada.post(SEND, data=body, content_type="application/json", headers=accepts)
        assert answer.status_code == 202
        messages = world.services.conversations.messages(UUID(answer.get_json()["conversationId"]))
        assert messages[0].content == "𝔘" * 200_000

    @pytest.mark.parametrize("path", [SEND, TERMINATE, CONVERSATIONS])
    def test_a_body_over_the_limit_is_refused(
        self, ada: Caller, nothing_written: NothingWritten, world: World, path: str
    ) -> None:
        body = b'{"content": "' + b"x" * world.settings.request_limit_bytes + b'"}'
        with nothing_written:
            problem(ada.post(path, data=body, content_type="application/json"), 413, "too_large")

    def test_an_unknown_caller_is_told_nothing_of_it(self, people: People, world: World) -> None:
        body = b"x" * (world.settings.request_limit_bytes + 1)
        answer = people.stranger().post(SEND, data=body, content_type="application/json")
        problem(answer, 401, "unauthenticated")


class TestWhatCannotBeSeen:
    """What does not exist and what is another's are the same to everybody else."""

    CALLS: tuple[tuple[str, Callable[[Caller, UUID, UUID], TestResponse]], ...] = (
        ("look at a conversation", lambda one, chat, _: one.get(f"{CONVERSATIONS}/{chat}")),
        ("read its messages", lambda one, chat, _: one.get(f"{CONVERSATIONS}/{chat}/messages")),
        ("rename it", lambda one, chat, _: one.call("PATCH", f"{CONVERSATIONS}/{chat}", json={"title": "x"})),
        ("delete it", lambda one, chat, _: one.call("DELETE", f"{CONVERSATIONS}/{chat}")),
        ("write in it", lambda one, chat, _: one.send(conversationId=str(chat))),
        ("look at a stream", lambda one, _, stream: one.get(f"/api/streams/{stream}")),
        ("follow it", lambda one, _, stream: one.get(f"/api/streams/{stream}/events")),
        ("follow it with others", lambda one, _, stream: one.get(f"/api/streams/events?streams={stream}")),
        ("terminate it", lambda one, _, stream: one.terminate(stream)),
        ("terminate it by both", lambda one, chat, stream: one.terminate(stream, conversationId=str(chat))),
    )

    def test_another_users_is_as_if_it_were_not(
        self, ada: Caller, people: People, world: World, nothing_written: NothingWritten
    ) -> None:
        people("bob")
        bobs = world.start(user_id=world.user("bob"))
        unknown = new_id(), new_id()
        with nothing_written:
            for name, call in self.CALLS:
                theirs = problem(call(ada, bobs.conversation_id, bobs.session_id), 404, "not_found")
                nobodys = problem(call(ada, *unknown), 404, "not_found")
                same = str(nobodys).replace(str(unknown[0]), str(bobs.conversation_id))
                assert same.replace(str(unknown[1]), str(bobs.session_id)) == str(theirs), name
        assert world.row(bobs.session_id).stop_reason is None
        assert world.services.conversations.get(world.user("bob"), bobs.conversation_id).title == "hello"

    def test_a_conversation_that_was_deleted_is_gone_and_its_stream_with_it(self, ada: Caller, world: World) -> None:
        sent = ada.send().get_json()
        chat, stream = UUID(sent["conversationId"]), UUID(sent["sessionId"])
        assert ada.call("DELETE", f"{CONVERSATIONS}/{chat}").status_code == 204
        assert world.row(stream).reason == "conversation_deleted"
        for _, call in self.CALLS:
            problem(call(ada, chat, stream), 404, "not_found")
        assert ada.get(CONVERSATIONS).get_json()["items"] == []
        assert ada.get("/api/streams").get_json()["items"] == []

    def test_a_stream_is_not_terminated_by_another_conversations_id(
        self, ada: Caller, world: World, nothing_written: NothingWritten
    ) -> None:
        mine, other = world.start(), world.conversation("ada")
        with nothing_written:
            problem(ada.terminate(mine.session_id, conversationId=str(other)), 404, "not_found")
        assert world.row(mine.session_id).stop_reason is None
        assert ada.terminate(mine.session_id, conversationId=str(mine.conversation_id)).status_code == 200

    def test_a_viewer_is_told_that_it_may_not(self, people: People, world: World) -> None:
        view = world.start()
        viewer = people.member(view.conversation_id, "vera", Role.VIEWER)
        problem(viewer.terminate(view.session_id), 403, "forbidden")
        assert world.row(view.session_id).status == "ACTIVE"


class TestCursors:
    @pytest.fixture
    def ended(self, ada: Caller, world: World) -> UUID:
        worker = world.run()
        worker.say(WORLD_TEXT)
        worker.end()
        return worker.session_id

    @pytest.mark.parametrize(
        "garbled", ["x", "7", "7-", "-7", "1-2-3", "7-99999999999", "0x1-0", "1 - 0", "٧-٠", "%00"]
    )
    def test_one_that_is_not_ours_is_refused(self, ada: Caller, ended: UUID, garbled: str) -> None:
        path = f"/api/streams/{ended}/events"
        problem(ada.get(f"{path}?lastEventId={garbled}"), 400, "invalid_cursor")
        if garbled.isascii():
            problem(ada.get(path, headers={"Last-Event-ID": garbled}), 400, "invalid_cursor")

    def test_one_beyond_the_end_is_refused(self, ada: Caller, ended: UUID) -> None:
        end = len(WORLD_TEXT)
        for cursor in (f"{end + 1}-0", f"{end + 1}-4294967295", "999999999999999-0"):
            answer = ada.get(f"/api/streams/{ended}/events", headers={"Last-Event-ID": cursor})
            document = problem(answer, 400, "invalid_cursor")
            assert str(end) in document["detail"]

    def test_dones_own_is_nothing_more(self, ada: Caller, ended: UUID) -> None:
        cursor = str(done_position(len(WORLD_TEXT)))
        answer = ada.get(f"/api/streams/{ended}/events", headers={"Last-Event-ID": cursor})
        assert (answer.status_code, answer.data) == (204, b"")

    def test_any_other_gets_the_rest(self, ada: Caller, ended: UUID) -> None:
        whole = ada.get(f"/api/streams/{ended}/events")
        assert whole.mimetype == "text/event-stream"
        assert whole.headers["Cache-Control"] == "no-cache"
        assert whole.headers["X-Accel-Buffering"] == "no"
        assert whole.headers["X-Stream-Session-Id"] == str(ended)
        assert "event: session\n" in whole.text.partition("\n\n")[0]
        assert json.dumps(WORLD_TEXT, ensure_ascii=False) in whole.text
        rest = ada.get(f"/api/streams/{ended}/events?lastEventId=3-0")
        assert json.dumps(WORLD_TEXT[3:], ensure_ascii=False) in rest.text

    def test_the_header_goes_before_the_query(self, ada: Caller, ended: UUID) -> None:
        cursor = str(done_position(len(WORLD_TEXT)))
        answer = ada.get(f"/api/streams/{ended}/events?lastEventId=0-0", headers={"Last-Event-ID": cursor})
        assert answer.status_code == 204


class TestSeveralStreams:
    """Over one connection: each named before its events, each from its own cursor."""

    @pytest.fixture
    def ended(self, ada: Caller, world: World) -> list[UUID]:
        workers = [world.run(), world.run()]
        for worker, text in zip(workers, ("one", "two"), strict=True):
            worker.say(text)
            worker.end()
        return [worker.session_id for worker in workers]

    def test_each_is_told_from_its_own_cursor(self, ada: Caller, ended: list[UUID]) -> None:
        answer = ada.get(f"/api/streams/events?streams={ended[0]},{ended[1]}:1-0")
        assert (answer.status_code, answer.mimetype) == (200, "text/event-stream")
        told: dict[str, list[tuple[str, Any]]] = {str(one): [] for one in ended}
        stands_at = {str(ended[0]): "0-0", str(ended[1]): "1-0"}
        for event in decode_events(answer.data):
            if event.kind == "stream":
                named = event.data["sessionId"]
                assert event.id == stands_at[named]
                continue
            stands_at[named] = event.id or stands_at[named]
            told[named].append((event.kind, event.data.get("content")))
        assert told == {
            str(ended[0]): [("session", None), ("message", "one"), ("done", None)],
            str(ended[1]): [("session", None), ("message", "wo"), ("done", None)],
        }
        assert set(stands_at.values()) == {str(done_position(3))}

    def test_who_has_had_them_all_gets_nothing(self, ada: Caller, ended: list[UUID]) -> None:
        have = ",".join(f"{one}:{done_position(3)}" for one in ended)
        assert (ada.get(f"/api/streams/events?streams={have}").status_code) == 204

    def test_who_has_had_one_gets_the_other(self, ada: Caller, ended: list[UUID]) -> None:
        answer = ada.get(f"/api/streams/events?streams={ended[0]}:{done_position(3)},{ended[1]}")
        assert (str(ended[0]) in answer.text, '"two"' in answer.text) == (False, True)

    def test_what_is_no_list_of_streams_is_refused(self, ada: Caller, ended: list[UUID]) -> None:
        many = ",".join(str(new_id()) for _ in range(FOLLOWED_LIMIT + 1))
        for asked in ("", "x", f"{ended[0]},", f"{ended[0]}:x", f"{ended[0]};{ended[1]}", many):
            problem(ada.get(f"/api/streams/events?streams={asked}"), 422, "invalid", field="streams")
        problem(ada.get("/api/streams/events"), 422, "invalid", field="streams")
        twice = problem(ada.get(f"/api/streams/events?streams={ended[0]},{ended[0]}:1-0"), 422, "invalid")
        assert "once" in twice["detail"] + str(twice["errors"])
        problem(ada.get(f"/api/streams/events?streams={ended[0]}:4-0"), 400, "invalid_cursor")

    def test_one_that_is_not_there_is_named(self, ada: Caller, ended: list[UUID]) -> None:
        nobody = new_id()
        document = problem(ada.get(f"/api/streams/events?streams={ended[0]},{nobody}"), 404, "not_found")
        assert str(nobody) in document["detail"]


class TestPaths:
    @pytest.mark.parametrize(
        "path", ["/nothing", "/api", "/api/nothing", "/api/streams/7", f"{CONVERSATIONS}/x", "/api/"]
    )
    def test_one_that_leads_nowhere(self, ada: Caller, path: str) -> None:
        problem(ada.get(path), 404, "not_found")
        problem(ada.post(path, {}), 404, "not_found")

    @pytest.mark.parametrize(
        ("method", "path", "allowed"),
        [
            ("GET", SEND, "POST"),
            ("DELETE", TERMINATE, "POST"),
            ("PUT", CONVERSATIONS, "GET"),
            ("POST", "/healthz", "GET"),
        ],
    )
    def test_a_method_that_is_not_for_it(self, ada: Caller, method: str, path: str, allowed: str) -> None:
        answer = ada.call(method, path, json={})
        problem(answer, 405, "method_not_allowed")
        assert allowed in answer.headers["Allow"]

    def test_a_stranger_learns_no_more_of_them(self, people: People) -> None:
        problem(people.stranger().get("/api/nothing"), 404, "not_found")


class TestConflicts:
    def test_a_busy_conversation(self, ada: Caller, world: World, nothing_written: NothingWritten) -> None:
        first = ada.send().get_json()
        with nothing_written:
            document = problem(ada.send(conversationId=first["conversationId"]), 409, "conversation_busy")
        assert document["sessionId"] == first["sessionId"]

    def test_where_that_is_wanted_the_new_one_takes_its_place(self, ada: Caller, world: World) -> None:
        first = ada.send().get_json()
        second = ada.send(conversationId=first["conversationId"], onActive="terminate")
        assert second.status_code == 202
        assert world.row(UUID(first["sessionId"])).reason == "superseded"
        assert world.row(UUID(second.get_json()["sessionId"])).status == "ACTIVE"

    def test_too_many_streams_and_when_to_come_back(self, app: APIFlask, people: People, world_with: MakeWorld) -> None:
        world = world_with(max_active_streams_per_user=1)
        app.extensions["sluicegate"] = world.services
        ada = people("ada")
        ada.send()
        with NothingWritten(world):
            answer = ada.send()
            problem(answer, 429, "too_many_streams")
        assert int(answer.headers["Retry-After"]) > 0


class TestRepeatedRequests:
    def test_the_same_key_is_the_same_session(self, ada: Caller, world: World, nothing_written: NothingWritten) -> None:
        headers = {"Accept": "application/json", "Idempotency-Key": "one"}
        first = ada.post(SEND, {"content": "hello", "think": True}, headers=headers)
        with nothing_written:
            for _ in range(3):
                again = ada.post(SEND, {"think": True, "content": "hello"}, headers=headers)
                assert (again.status_code, again.get_json()) == (202, first.get_json())
        world.manager.terminate(UUID(first.get_json()["sessionId"]), TerminationReason.USER)
        again = ada.post(SEND, {"content": "hello", "think": True}, headers=headers)
        assert again.get_json()["sessionId"] == first.get_json()["sessionId"]

    def test_with_another_body_it_is_refused(self, ada: Caller, nothing_written: NothingWritten) -> None:
        headers = {"Accept": "application/json", "Idempotency-Key": "one"}
        ada.post(SEND, {"content": "hello"}, headers=headers)
        with nothing_written:
            answer = ada.post(SEND, {"content": "hello!"}, headers=headers)
            problem(answer, 422, "invalid", "Idempotency-Key")

    def test_anothers_key_is_another_key(self, ada: Caller, people: People) -> None:
        headers = {"Accept": "application/json", "Idempotency-Key": "one"}
        bob = people("bob")
        sessions = [one.post(SEND, {"content": "hello"}, headers=headers).get_json()["sessionId"] for one in (ada, bob)]
        assert sessions[0] != sessions[1]

    @pytest.mark.parametrize("key", ["", "x" * 256, "a\tb"])
    def test_a_key_that_is_none_is_refused(self, ada: Caller, nothing_written: NothingWritten, key: str) -> None:
        with nothing_written:
            answer = ada.post(SEND, {"content": "hello"}, headers={"Idempotency-Key": key})
            problem(answer, 422, "invalid", "Idempotency-Key")


class TestWhatIsDown:
    @pytest.fixture
    def cut_off(self, app: APIFlask, people: People, world_with: MakeWorld) -> Caller:
        """Ada, at a web process that cannot reach Redis."""
        ada = people("ada")
        app.extensions["sluicegate"] = world_with(redis_url=CLOSED_REDIS).services
        return ada

    def test_without_redis_a_message_is_refused_and_nothing_written(
        self, cut_off: Caller, nothing_written: NothingWritten
    ) -> None:
        with nothing_written:
            answer = cut_off.send()
            problem(answer, 503, "unavailable")
        assert int(answer.headers["Retry-After"]) > 0

    def test_and_what_is_in_the_database_is_served(self, cut_off: Caller, world: World) -> None:
        worker = world.run()
        worker.say(WORLD_TEXT)
        worker.end()
        row = world.row(worker.session_id)
        assert cut_off.get(CONVERSATIONS).status_code == 200
        assert cut_off.get(f"{CONVERSATIONS}/{row.conversation_id}/messages").status_code == 200
        assert cut_off.get(f"/api/streams/{row.id}").status_code == 200
        assert cut_off.terminate(row.id).get_json()["partialResponse"] == WORLD_TEXT
        assert json.dumps(WORLD_TEXT, ensure_ascii=False) in cut_off.get(f"/api/streams/{row.id}/events").text

    def test_a_model_that_cannot_be_chosen_is_said_so(
        self, app: APIFlask, people: People, world_with: MakeWorld
    ) -> None:
        world = world_with(default_model="", ollama_base_url="http://127.0.0.1:1")
        ada = people("ada")
        app.extensions["sluicegate"] = world.services
        with NothingWritten(world):
            problem(ada.send(), 503, "unavailable")
            problem(ada.get("/api/models"), 503, "unavailable")
        assert ada.send(model="named").status_code == 202

    def test_a_defect_of_ours_shows_nothing_of_itself(
        self, ada: Caller, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: object, **__: object) -> None:
            raise ValueError("a secret of the inside")

        monkeypatch.setattr(world.services.conversations, "list", fail)
        answer = ada.get(CONVERSATIONS)
        problem(answer, 500, "internal")
        assert "secret" not in answer.text
        assert "ValueError" not in answer.text


class TestReceipts:
    MEMBERS = (
        "sessionId conversationId messageId status reason alreadyEnded partialResponse length thinkingLength sha256 "
        "requestedAt fencedAt upstreamClosedAt committedAt"
    )

    def test_one_is_the_same_to_every_caller_however_often(self, ada: Caller, people: People, world: World) -> None:
        view = world.start()
        editor = people.member(view.conversation_id, "ed", Role.EDITOR)
        first = ada.terminate(view.session_id)
        assert first.status_code == 200
        assert set(first.get_json()) == set(self.MEMBERS.split())
        for caller in (ada, editor, ada):
            assert caller.terminate(view.session_id).data == first.data

    def test_its_times_are_in_utc_and_in_order(self, ada: Caller, world: World) -> None:
        receipt = ada.terminate(world.start().session_id).get_json()
        times = [receipt[name] for name in ("requestedAt", "fencedAt", "committedAt")]
        assert all(len(one) == len("2026-01-01T00:00:00.000000Z") and one.endswith("Z") for one in times)
        assert times == sorted(times)
        assert receipt["upstreamClosedAt"] is None
