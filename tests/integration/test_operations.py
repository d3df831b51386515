"""What operators see: figures that are those of the rows, nobody's words, and no more to anybody else."""

from __future__ import annotations

import itertools
import json
from datetime import UTC, datetime, timedelta
from typing import Any
from unittest.mock import patch
from uuid import UUID

import pytest
from apiflask import APIFlask

from bench.plans import PlanWatch
from tests.integration.api import Caller, People, problem
from tests.integration.conftest import MakeWorld
from tests.integration.world import CLOSED_REDIS, World
from webapp import history, operations
from webapp.metrics import chunk_arrived, first_token, flushed
from webapp.models import StreamSession, now
from webapp.streams.lifecycle import StreamPhase, TerminationReason

CALLS = (
    ("GET", "/api/operations", None),
    ("GET", "/api/operations/history", None),
    ("POST", "/api/operations/terminate", {"sessionId": "01a204e8-5e14-77a5-abc3-348055e088dc"}),
)
NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
"""A moment at which a step begins, whatever the window."""
SECRET = "a heron on the weir"


@pytest.fixture
def olga(people: People, world: World) -> Caller:
    """An operator."""
    caller = people("olga")
    world.services.accounts.set_operator("olga", True)
    return caller


def seconds(before_noon: float) -> datetime:
    return NOON - timedelta(seconds=before_noon)


def past(
    world: World,
    *,
    started: datetime,
    ended: datetime | None,
    reason: TerminationReason = TerminationReason.STOP,
    claimed: datetime | None = None,
    **values: Any,
) -> UUID:
    """A session that was, with a row as its life would have left it."""
    session_id = world.start().session_id
    if ended is not None:
        values |= {"status": reason.status, "reason": reason, "ended_at": ended, "published_at": ended}
    world.change(session_id, started_at=started, claimed_at=claimed, **values)
    return session_id


def stop(world: World, at: datetime, fence: float, closed: float, commit: float, **values: Any) -> UUID:
    """One that was stopped; the times in seconds, `closed` after the fence and the others after the request."""
    requested = at - timedelta(seconds=commit)
    fenced = requested + timedelta(seconds=fence)
    values = {
        "stop_reason": TerminationReason.USER,
        "stop_by": "ada",
        "stop_requested_at": requested,
        "fenced_at": fenced,
        "upstream_closed_at": fenced + timedelta(seconds=closed),
    } | values
    return past(
        world,
        started=at - timedelta(seconds=20),
        claimed=at - timedelta(seconds=19),
        ended=at,
        reason=TerminationReason.USER,
        **values,
    )


class TestWhoMay:
    @pytest.mark.parametrize(("method", "path", "body"), CALLS)
    def test_nobody_but_an_operator(self, people: People, method: str, path: str, body: Any) -> None:
        problem(people.stranger().call(method, path, json=body), 401, "unauthenticated")
        document = problem(people("bob").call(method, path, json=body), 403, "forbidden")
        assert document["title"] == "Your role does not permit this"
        assert "sluicegate users operator bob" in document["detail"]

    def test_the_role_counts_from_the_next_request_on(self, olga: Caller, world: World) -> None:
        assert olga.get("/api/operations").status_code == 200
        world.services.accounts.set_operator("olga", False)
        problem(olga.get("/api/operations"), 403, "forbidden")

    def test_one_who_is_none_learns_nothing_of_a_body(self, people: People) -> None:
        answer = people("bob").post("/api/operations/terminate", data="no json")
        problem(answer, 403, "forbidden")

    def test_a_stop_by_cookie_needs_the_csrf_token(self, people: People, olga: Caller, world: World) -> None:
        session_id = world.start().session_id
        browser = people.stranger()
        assert browser.sign_in(olga.token or "").status_code == 303
        problem(browser.post("/api/operations/terminate", {"sessionId": str(session_id)}), 403, "csrf_failed")
        assert world.row(session_id).stop_reason is None


class TestThePage:
    def test_who_is_not_signed_in_comes_back_to_it(self, people: People, olga: Caller) -> None:
        browser = people.stranger()
        answer = browser.get("/ops")
        assert (answer.status_code, answer.headers["Location"]) == (303, "/sign-in?next=/ops")
        csrf = browser.csrf("/sign-in?next=/ops")
        form = {"token": olga.token, "csrf_token": csrf, "next": "/ops"}
        assert browser.client.post("/sign-in", data=form).headers["Location"] == "/ops"
        page = browser.get("/ops")
        assert page.status_code == 200
        assert "<style" not in page.text
        assert 'style="' not in page.text

    @pytest.mark.parametrize("elsewhere", ["/ops/", "//evil.example/ops", "https://evil.example/ops", "/opsx"])
    def test_and_nowhere_else(self, people: People, olga: Caller, elsewhere: str) -> None:
        browser = people.stranger()
        form = {"token": olga.token, "csrf_token": browser.csrf("/sign-in"), "next": elsewhere}
        assert browser.client.post("/sign-in", data=form).headers["Location"] == "/"

    def test_who_is_no_operator_is_told_how_to_become_one(self, people: People) -> None:
        browser = people.stranger()
        assert browser.sign_in(people("bob").token or "").status_code == 303
        page = browser.get("/ops")
        assert page.status_code == 403
        assert "sluicegate users operator bob" in page.text

    @pytest.mark.parametrize(
        ("overrides", "asked", "link"),
        [
            ({}, "http://127.0.0.1:8000", "http://127.0.0.1:5555/"),
            ({}, "http://[::1]:8000", "http://[::1]:5555/"),
            ({"flower_port": 6000, "host": "0.0.0.0"}, "http://ops.example:8000", "http://ops.example:6000/"),
            ({}, "http://ops.example", None),  # Flower listens to this machine alone
            ({"flower_port": 0}, "http://127.0.0.1:8000", None),
            ({"flower_url": "https://flower.example/x"}, "http://ops.example", "https://flower.example/x"),
        ],
    )
    def test_it_links_to_flower_where_that_can_be_reached(
        self,
        session_app: APIFlask,
        world_with: MakeWorld,
        overrides: dict[str, Any],
        asked: str,
        link: str | None,
    ) -> None:
        world = world_with(**overrides)
        session_app.extensions["sluicegate"] = world.services
        token = world.services.accounts.create_user("olga", operator=True)
        browser = Caller(session_app)
        assert browser.sign_in(token).status_code == 303
        cookie = browser.client.get_cookie("sluicegate_session")
        assert cookie
        headers = {"Cookie": f"sluicegate_session={cookie.value}"}  # which a browser sends to its own host alone
        page = session_app.test_client(use_cookies=False).get("/ops", base_url=asked, headers=headers).text
        assert ("Flower</a>" in page) is (link is not None)
        assert link is None or f'href="{link}"' in page


class TestNow:
    def test_what_runs(self, world: World, olga: Caller) -> None:
        running = world.run(world.start(user_id=world.user("bob")).session_id, owner="worker@one")
        running.mark(StreamPhase.GENERATING)
        running.say("thought", "thinking")
        running.say("some text")
        waiting = world.start(SECRET).session_id
        world.change(waiting, started_at=now() - timedelta(seconds=90))
        world.services.workers.report("worker@one")
        world.services.workers.report("worker@two")
        found = olga.get("/api/operations").get_json()
        assert found["population"] == {"active": 2, "queued": 1}
        one, other = found["streams"]
        expected = {
            "sessionId": str(running.session_id),
            "conversationId": str(world.row(running.session_id).conversation_id),
            "messageId": str(world.row(running.session_id).message_id),
            "userName": "bob",
            "model": "a-model",
            "phase": "GENERATING",
            "stopping": False,
            "length": 9,
            "thinkingLength": 7,
            "attempt": 1,
            "worker": "worker@one",
            "viewers": 0,
            "onDisconnect": "continue",
        }
        assert {name: one[name] for name in expected} == expected
        assert one.keys() == expected.keys() | {"startedAt", "ageSeconds"}
        assert (other["sessionId"], other["phase"], other["worker"]) == (str(waiting), "QUEUED", None)
        assert 90 <= other["ageSeconds"] < 150
        workers = [(one["name"], one["state"], one["streams"]) for one in found["workers"]]
        assert workers == [("worker@one", "alive", 1), ("worker@two", "alive", 0)]
        assert found["workerConcurrency"] == world.settings.worker_concurrency

    def test_a_worker_that_has_streams_and_says_nothing_is_shown_as_silent(self, world: World, olga: Caller) -> None:
        world.run(owner="worker@gone")
        (worker,) = olga.get("/api/operations").get_json()["workers"]
        assert worker == {"name": "worker@gone", "state": "silent", "streams": 1, "silentSeconds": None}
        with patch("webapp.queue.time.time", return_value=now().timestamp() - 20):
            world.services.workers.report("worker@gone")
        (worker,) = olga.get("/api/operations").get_json()["workers"]
        assert worker["state"] == "silent"
        assert 20 <= worker["silentSeconds"] < 60

    def test_a_stop_on_record_is_shown(self, world: World, olga: Caller) -> None:
        session_id = world.run().session_id
        world.change(session_id, stop_reason="user", stop_by="ada", stop_requested_at=now())
        (stream,) = olga.get("/api/operations").get_json()["streams"]
        assert stream["stopping"]

    def test_only_the_newest_streams_are_listed_and_all_counted(
        self, world: World, olga: Caller, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(operations, "STREAMS_SHOWN", 2)
        started = [str(world.start().session_id) for _ in range(3)]
        found = olga.get("/api/operations").get_json()
        assert found["population"]["active"] == 3
        assert [one["sessionId"] for one in found["streams"]] == started[:0:-1]

    def test_the_last_endings_without_those_that_are_complete(
        self, world: World, olga: Caller, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(operations, "ENDINGS_SHOWN", 2)
        failed = past(
            world,
            started=seconds(50),
            ended=seconds(10),
            reason=TerminationReason.UPSTREAM_ERROR,
            length=3,
            detail=SECRET,
        )
        stopped = stop(world, seconds(20), 0.004, 0.002, 0.010, length=7, thinking_length=5)
        stop(world, seconds(30), 0.004, 0.002, 0.010)
        past(world, started=seconds(50), ended=seconds(5))
        found = olga.get("/api/operations").get_json()
        first, second = found["endings"]
        assert [first["sessionId"], second["sessionId"]] == [str(failed), str(stopped)]
        expected = {
            "userName": "ada",
            "model": "a-model",
            "status": "TERMINATED",
            "reason": "user",
            "terminatedBy": "ada",
            "length": 7,
            "thinkingLength": 5,
            "durationSeconds": 20.0,
            "requestToFenceSeconds": 0.004,
            "fenceToUpstreamClosedSeconds": 0.002,
            "requestToCommitSeconds": 0.010,
            "endedAt": "2026-03-01T11:59:40.000000Z",
        }
        assert {name: second[name] for name in expected} == expected
        assert (first["status"], first["reason"], first["terminatedBy"]) == ("ERROR", "upstream_error", None)
        assert first["requestToCommitSeconds"] is None

    def test_the_figures_are_those_of_the_metrics(self, olga: Caller) -> None:
        before = olga.get("/api/operations").get_json()["figures"]
        for _ in range(3):
            chunk_arrived(5)
        flushed(3, 15, 0.001)
        first_token(0.25)
        first_token(3)
        first_token(10_000)
        after = olga.get("/api/operations").get_json()["figures"]
        assert after["chunksTotal"] - before["chunksTotal"] >= 3
        assert after["charactersTotal"] - before["charactersTotal"] >= 15
        bounds = after["firstTokenSeconds"]["upperBounds"]
        counts = [b - a for a, b in zip(*(one["firstTokenSeconds"]["counts"] for one in (before, after)), strict=True)]
        assert len(counts) == len(bounds) + 1
        moved = {bound: count for bound, count in zip([*bounds, "above"], counts, strict=True) if count}
        assert moved == {0.25: 1, 5: 1, "above": 1}

    def test_without_redis_it_shows_what_the_rows_know(
        self, session_app: APIFlask, world: World, world_with: MakeWorld
    ) -> None:
        world.run(owner="worker@one")
        token = world.services.accounts.create_user("olga", operator=True)
        session_app.extensions["sluicegate"] = world_with(redis_url=CLOSED_REDIS).services
        answer = Caller(session_app, token).get("/api/operations")
        assert answer.status_code == 200
        found = answer.get_json()
        assert found["population"]["active"] == len(found["streams"]) == 1
        assert [one["state"] for one in found["workers"]] == ["unknown"]


class TestHistory:
    """An hour before noon, in steps of 30 s: step 0 ends at 11:00:30, and step 119 at 12:00."""

    @pytest.fixture
    def just_before_noon(self, world: World) -> Any:
        return lambda minutes=60: world.services.operations.history(minutes, seconds(0.001))

    def test_active_and_queued(self, world: World, just_before_noon: Any) -> None:
        past(world, started=seconds(7200), claimed=seconds(7000), ended=None)  # all of the time
        past(world, started=seconds(300), claimed=seconds(200), ended=seconds(100))
        past(world, started=seconds(10), ended=None)
        past(world, started=seconds(9000), claimed=seconds(8999), ended=seconds(3601))  # before it
        found = just_before_noon()
        assert (found.step_seconds, len(found.steps), found.truncated) == (30, 120, False)
        assert (found.steps[0], found.steps[-1]) == (seconds(3570), NOON)
        # Step 109 ends 300 s before noon, 110 ends 270 s, 112 ends 210 s, 115 ends 120 s, 116 ends 90 s before it.
        assert found.active == [*[1] * 110, *[2] * 6, *[1] * 3, 2]
        assert found.queued == [*[0] * 110, *[1] * 3, *[0] * 6, 1]

    def test_endings_and_partial_lengths(self, world: World, just_before_noon: Any) -> None:
        reasons = TerminationReason
        past(world, started=seconds(50), ended=seconds(15), length=5000)
        past(world, started=seconds(50), ended=seconds(14), length=5000)
        past(world, started=seconds(90), ended=seconds(31), reason=reasons.USER, length=16)
        past(world, started=seconds(90), ended=seconds(30), reason=reasons.USER, length=17)
        past(world, started=seconds(90), ended=seconds(20), reason=reasons.IDLE_TIMEOUT, length=0)
        past(world, started=seconds(90), ended=seconds(20), reason=reasons.UPSTREAM_ERROR, length=262_145)
        found = just_before_noon()
        last = {reason: list(counts[-2:]) for reason, counts in found.endings.items()}
        assert last == {"stop": [0, 2], "user": [1, 1], "idle_timeout": [0, 1], "upstream_error": [0, 1]}
        assert {sum(counts) for counts in found.endings.values()} == {1, 2}
        lengths = dict(zip([*found.partial_lengths.upper_bounds, "above"], found.partial_lengths.counts, strict=True))
        assert {bound: count for bound, count in lengths.items() if count} == {0: 1, 16: 1, 64: 1, "above": 1}

    def test_stop_timings_are_the_nearest_ranks(self, world: World, just_before_noon: Any) -> None:
        for number in range(1, 11):  # in the last step: 1 to 10 ms, 2 to 20 ms, 3 to 30 ms
            stop(world, seconds(20 - number), number / 1000, number / 500, number * 3 / 1000)
        stop(world, seconds(100), 0.5, 0.25, 0.75)
        # One that came to its end before the stop, and one whose upstream was never open
        past(world, started=seconds(50), ended=seconds(15), stop_reason="user", stop_requested_at=seconds(15.5))
        stop(world, seconds(200), 0.001, 0.001, 0.002, upstream_closed_at=None)
        found = just_before_noon()
        timings = (found.request_to_fence, found.fence_to_upstream_closed, found.request_to_commit)
        assert [one.p50[-1] for one in timings] == [0.005, 0.010, 0.015]
        assert [one.p99[-1] for one in timings] == [0.010, 0.020, 0.030]
        assert [one.p99[116] for one in timings] == [0.5, 0.25, 0.75]
        assert [one.p99[113] for one in timings] == [0.001, None, 0.002]
        assert [one.overall_count for one in timings] == [12, 11, 12]
        assert [(one.overall_p50, one.overall_p99) for one in timings] == [(0.005, 0.5), (0.012, 0.25), (0.015, 0.75)]
        assert sum(one is not None for one in found.request_to_commit.p50) == 3

    def test_of_very_many_the_oldest_steps_are_left_open(
        self, world: World, just_before_noon: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(history, "HISTORY_ROWS", 3)
        for end in (1000, 400, 290, 200, 100):
            past(world, started=seconds(end + 5), claimed=seconds(end + 4), ended=seconds(end))
        past(world, started=seconds(2000), claimed=seconds(1999), ended=None)
        found = just_before_noon()
        assert found.truncated
        # The oldest that was read ended 400 s before noon, in the step that ends 390 s before: from the next on.
        known = [index for index, value in enumerate(found.active) if value is not None]
        assert known == [index for index, value in enumerate(found.endings["stop"]) if value is not None]
        assert known == list(range(107, 120))
        assert set(found.active[107:]) == {1}
        assert sum(found.endings["stop"][107:]) == 3
        monkeypatch.setattr(history, "HISTORY_ROWS", 5)
        assert not just_before_noon().truncated

    @pytest.mark.parametrize(("minutes", "step"), [(1, 0.5), (15, 7.5), (60, 30), (360, 180), (1440, 720)])
    def test_any_window_has_as_many_steps(self, olga: Caller, minutes: int, step: float) -> None:
        found = olga.get(f"/api/operations/history?minutes={minutes}").get_json()
        assert (found["minutes"], found["stepSeconds"], len(found["steps"])) == (minutes, step, 120)
        assert {len(found["active"]), len(found["queued"]), len(found["requestToCommit"]["p99"])} == {120}

    @pytest.mark.parametrize("minutes", ["0", "1441", "many", "-5"])
    def test_a_window_that_cannot_be_is_refused(self, olga: Caller, minutes: str) -> None:
        problem(olga.get(f"/api/operations/history?minutes={minutes}"), 422, "invalid", field="minutes")


class TestStop:
    def test_it_ends_as_admin_by_the_operators_name(self, world: World, olga: Caller) -> None:
        worker = world.run(world.start(user_id=world.user("bob")).session_id)
        worker.say(SECRET)
        worker.obey()
        answer = olga.post("/api/operations/terminate", {"sessionId": str(worker.session_id)})
        assert answer.status_code == 200
        receipt = answer.get_json()
        assert (receipt["status"], receipt["reason"], receipt["length"]) == ("TERMINATED", "admin", len(SECRET))
        assert "partialResponse" not in receipt
        assert SECRET not in answer.text
        row = world.row(worker.session_id)
        assert (row.reason, row.stop_by, row.length, row.sha256) == ("admin", "olga", len(SECRET), receipt["sha256"])
        assert world.message(worker.session_id).content == SECRET
        (ending,) = olga.get("/api/operations").get_json()["endings"]
        assert (ending["reason"], ending["terminatedBy"], ending["userName"]) == ("admin", "olga", "bob")

    def test_one_that_nobody_has(self, world: World, olga: Caller) -> None:
        session_id = world.start().session_id
        receipt = olga.post("/api/operations/terminate", {"sessionId": str(session_id)}).get_json()
        assert (receipt["reason"], receipt["length"]) == ("admin", 0)

    def test_one_that_does_not_exist(self, olga: Caller) -> None:
        problem(olga.post("/api/operations/terminate", CALLS[2][2]), 404, "not_found")

    @pytest.mark.parametrize(
        ("body", "field"), [({}, "sessionId"), ({"sessionId": "x"}, "sessionId"), ({"session": 1}, "session")]
    )
    def test_a_body_that_is_wrong(self, olga: Caller, body: Any, field: str) -> None:
        problem(olga.post("/api/operations/terminate", body), 422, "invalid", field=field)


def test_no_answer_has_anybodys_words(world: World, olga: Caller) -> None:
    """Neither a question, an answer, thinking, a title, nor what an upstream said."""
    heard = iter(f"{SECRET} {number}" for number in itertools.count())
    for reason in (None, TerminationReason.UPSTREAM_ERROR, TerminationReason.STOP, TerminationReason.USER):
        worker = world.run(world.start(next(heard)).session_id)
        worker.say(next(heard), "thinking")
        worker.say(next(heard))
        world.change(worker.session_id, checkpoint=next(heard), checkpoint_length=30)
        if reason is not None:
            worker.end(reason, detail=next(heard))
    answers = [olga.get("/api/operations"), olga.get("/api/operations/history")]
    for stream in answers[0].get_json()["streams"]:
        answers.append(olga.post("/api/operations/terminate", {"sessionId": stream["sessionId"]}))
    answers.append(olga.get("/api/operations"))
    assert [one.status_code for one in answers] == [200] * 4
    assert "heron" not in " ".join(one.text for one in answers)
    assert "heron" in json.dumps(world.message(worker.session_id).content)


def test_nothing_walks_through_all_that_ever_ended(world: World) -> None:
    """With so many rows that a database would take an index if there is one for it."""
    asker = world.services.operations
    _fill(world, 3_000)
    with PlanWatch(world.database.engine) as watch:
        asker.overview()
        asker.history(60)
    assert watch.statements >= 5
    assert watch.walks == set()


def _fill(world: World, count: int) -> None:
    """Sessions that ended long ago."""
    template = past(world, started=seconds(100), claimed=seconds(99), ended=seconds(90), length=5)
    row = world.row(template)
    columns = [column.name for column in StreamSession.__table__.columns]
    values = {name: getattr(row, name) for name in columns}
    ids = itertools.count(row.id.int + 1)
    rows = [
        values | {"id": UUID(int=next(ids)), "ended_at": row.ended_at + timedelta(milliseconds=number)}
        for number in range(count)
    ]
    world.database.write(lambda s: s.execute(StreamSession.__table__.insert(), rows))
    with world.database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("ANALYZE")
