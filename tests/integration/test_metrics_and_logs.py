"""What is told of requests and endings: the right lines, once, with ids; and the figures that go with them."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import pytest
from apiflask import APIFlask
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session
from structlog.contextvars import clear_contextvars, merge_contextvars
from structlog.testing import capture_logs
from structlog.typing import EventDict

from tests.figures import Figures, Moved
from tests.integration.api import Caller, People
from tests.integration.world import World
from tests.services import wait_until
from webapp.database import Database
from webapp.errors import Unavailable
from webapp.models import Role, StreamSession, now
from webapp.streams.endings import report, stop_timings
from webapp.streams.lifecycle import StreamPhase, TerminationReason
from webapp.streams.recovery import reap_alone

TIMINGS = ("request_to_fence_ms", "fence_to_upstream_closed_ms", "request_to_commit_ms")


@pytest.fixture
def lines() -> Iterator[list[EventDict]]:
    """What is logged, with what is bound."""
    clear_contextvars()
    with capture_logs(processors=[merge_contextvars]) as captured:
        yield captured
    clear_contextvars()


def of(lines: list[EventDict], event: str) -> list[EventDict]:
    return [line for line in lines if line["event"] == event]


def scrape(world: World) -> Figures:
    return Figures.parse(world.services.metrics.render("")[0].decode())


class TestEndings:
    def test_a_stop(self, world: World, lines: list[EventDict]) -> None:
        before = scrape(world)
        worker = world.run()
        worker.mark(StreamPhase.GENERATING)
        worker.say("some text")
        worker.obey()
        world.manager.terminate(worker.session_id, TerminationReason.USER, by="ada")
        (line,) = wait_until(lambda: of(lines, "stream.terminated"), 5)  # by the worker, once `done` is in the log
        row = world.row(worker.session_id)
        expected = {
            "session_id": str(row.id),
            "conversation_id": str(row.conversation_id),
            "user_id": str(row.user_id),
            "status": "TERMINATED",
            "reason": "user",
            "terminated_by": "ada",
            "phase": "GENERATING",
            "length": 9,
            "thinking_length": 0,
        }
        assert {name: line[name] for name in expected} == expected
        assert all(isinstance(line[name], float) for name in TIMINGS)
        assert line["request_to_commit_ms"] >= line["request_to_fence_ms"]
        moved = Moved(before, scrape(world))
        assert moved.by("sluicegate_streams_started_total") == 1
        assert moved.by("sluicegate_queue_seconds_count") == 1
        assert moved.by("sluicegate_streams_ended_total", status="TERMINATED", reason="user", phase="GENERATING") == 1
        assert moved.by("sluicegate_partial_length_characters_sum") == 9
        seconds = moved.by("sluicegate_stop_request_to_commit_seconds_sum")
        assert seconds == pytest.approx(line["request_to_commit_ms"] / 1000, abs=1e-5)

    def test_a_completion(self, world: World, lines: list[EventDict]) -> None:
        before = scrape(world)
        worker = world.run()
        worker.say("some text")
        stats = {"eval_count": 2, "prompt_eval_count": 3}
        worker.end(stats=stats)
        worker.end(stats=stats)  # said twice, it ends once
        (line,) = of(lines, "stream.completed")
        assert [line[name] for name in TIMINGS] == [None] * 3
        assert not of(lines, "stream.terminated")
        moved = Moved(before, scrape(world))
        assert moved.by("sluicegate_streams_ended_total", status="COMPLETED", reason="stop") == 1
        assert moved.by("sluicegate_partial_length_characters_count") == 0
        assert moved.by("sluicegate_stop_request_to_commit_seconds_count") == 0
        assert moved.by("sluicegate_tokens_total") == 5

    def test_one_that_ended_by_itself_before_the_stop_came_has_no_timings(self, world: World) -> None:
        worker = world.run()
        answer = worker.fence(TerminationReason.STOP)
        world.database.write(
            lambda s: s.execute(
                text("UPDATE stream_sessions SET stop_reason = 'user', stop_requested_at = :at"), {"at": now()}
            )
        )
        worker.commit(answer)
        timings = stop_timings(world.row(worker.session_id))
        assert timings.request_to_commit_seconds is None

    def test_what_an_upstream_said_is_not_in_the_line(self, world: World, lines: list[EventDict]) -> None:
        worker = world.run()
        worker.end(TerminationReason.UPSTREAM_ERROR, detail="The model's server reported: a heron")
        assert world.row(worker.session_id).detail == "The model's server reported: a heron"
        (line,) = of(lines, "stream.terminated")
        assert "heron" not in str(line)
        assert line["status"] == "ERROR"

    def test_a_report_that_fails_harms_no_ending(self, world: World, lines: list[EventDict]) -> None:
        worker = world.run()
        with patch("webapp.streams.endings.report", side_effect=ValueError("a heron")):
            assert worker.end()
        assert len(world.dones(worker.session_id)) == 1
        (line,) = of(lines, "stream.step_failed")
        assert (line["step"], line["error"]) == ("report", "ValueError")

    def test_one_whose_commit_was_not_answered_is_told_once(self, world: World, lines: list[EventDict]) -> None:
        """It was carried out, but its worker does not know, asks again, and finds it done."""
        worker = world.run()
        worker.say("some text")
        carry_out = world.database.write_one

        def carry_out_without_an_answer(work: Any, **options: Any) -> None:
            carry_out(work, **options)
            raise Unavailable("The connection broke")

        with patch.object(world.database, "write_one", carry_out_without_an_answer), pytest.raises(Unavailable):
            worker.end(stats={"eval_count": 2})
        before = scrape(world)
        assert of(lines, "stream.completed") == []
        assert not worker.end(stats={"eval_count": 2})
        assert not worker.end(stats={"eval_count": 2})
        (line,) = of(lines, "stream.completed")
        assert line["session_id"] == str(worker.session_id)
        moved = Moved(before, scrape(world))
        assert moved.by("sluicegate_streams_ended_total", status="COMPLETED", reason="stop") == 1
        assert moved.by("sluicegate_tokens_total") == 2

    def test_one_whose_worker_died_at_its_commit_is_told_by_the_reaper(
        self, world: World, lines: list[EventDict]
    ) -> None:
        worker = world.run()
        with patch.object(world.manager, "_publish"):  # as if it had been killed before
            worker.end()
        assert of(lines, "stream.completed") == []
        world.change(worker.session_id, ended_at=now() - timedelta(minutes=1))
        world.reaper.reap()
        world.reaper.reap()
        (line,) = of(lines, "stream.completed")
        assert line["session_id"] == str(worker.session_id)

    def test_timings(self, world: World) -> None:
        session_id = world.start().session_id
        at = now()
        world.manager.terminate(session_id, TerminationReason.ADMIN)
        moments = {
            "stop_requested_at": at,
            "fenced_at": at + timedelta(milliseconds=4),
            "upstream_closed_at": None,
            "ended_at": at + timedelta(milliseconds=9),
        }
        with Session(world.database.engine) as s:
            row = s.get_one(StreamSession, session_id)
        for name, moment in moments.items():
            setattr(row, name, moment)
        timings = stop_timings(row)
        assert (timings.request_to_fence_seconds, timings.request_to_commit_seconds) == (0.004, 0.009)
        assert timings.fence_to_upstream_closed_seconds is None
        report(row)


class TestPopulation:
    def test_active_and_queued(self, world: World) -> None:
        assert world.queries.population() == (0, 0)
        world.start()
        world.run()
        ended = world.run()
        ended.end()
        assert world.queries.population() == (2, 1)
        figures = scrape(world)
        assert (figures.sum("sluicegate_active_streams"), figures.sum("sluicegate_queued_streams")) == (2, 1)


class TestReaper:
    def test_a_pass_is_counted(self, world: World) -> None:
        session_id = world.start().session_id
        world.change(session_id, requeue_at=now() - timedelta(seconds=1))
        before = scrape(world)
        reap_alone(world.reaper, world.redis)
        moved = Moved(before, scrape(world))
        assert moved.by("sluicegate_reaper_handled_total", step="unclaimed") == 1
        assert moved.by("sluicegate_reaper_pass_seconds_count") == 1


class TestMetricsCall:
    def test_without_a_token(self, app: APIFlask, world: World) -> None:
        response = Caller(app).get("/metrics")
        assert response.status_code == 200
        assert response.content_type == "text/plain; version=0.0.4; charset=utf-8"
        assert Figures.parse(response.text).has("sluicegate_streams_started_total")

    def test_openmetrics(self, app: APIFlask, world: World) -> None:
        response = Caller(app).get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
        assert response.mimetype == "application/openmetrics-text"
        assert response.text.endswith("# EOF\n")

    def test_readers_are_counted_while_they_read(self, app: APIFlask, world: World) -> None:
        worker = world.run()
        worker.say("some text")
        caller = People(app, world)("bob")
        world.join(world.row(worker.session_id).conversation_id, "bob", Role.VIEWER)
        response = caller.get(f"/api/streams/{worker.session_id}/events", buffered=False)
        events = response.iter_encoded()
        next(iter(events))
        assert scrape(world).sum("sluicegate_readers") == 1
        response.close()
        assert scrape(world).sum("sluicegate_readers") == 0


class TestRequests:
    def test_a_line_at_its_end(self, app: APIFlask, world: World, lines: list[EventDict]) -> None:
        caller = People(app, world)("bob")
        sent = caller.send("a heron", conversationId=None)
        session = sent.get_json()
        sent.close()
        (line,) = of(lines, "request")
        assert (line["method"], line["path"], line["status"], line["log_level"]) == (
            "POST",
            "/api/stream-message",
            202,
            "info",
        )
        assert line["duration_ms"] > 0
        assert line["session_id"] == session["sessionId"]
        assert line["conversation_id"] == session["conversationId"]
        assert line["user_id"] == str(world.user("bob"))
        assert line["request_id"] == sent.headers["X-Request-ID"]
        assert "heron" not in str(lines)

    def test_the_query_is_not_in_it(self, app: APIFlask, world: World, lines: list[EventDict]) -> None:
        Caller(app).get("/sign-in?token=a-heron").close()
        (line,) = of(lines, "request")
        assert line["path"] == "/sign-in"
        assert "heron" not in str(lines)

    @pytest.mark.parametrize("path", ["/healthz", "/metrics"])
    def test_health_checks_are_quiet(self, app: APIFlask, world: World, lines: list[EventDict], path: str) -> None:
        Caller(app).get(path).close()
        assert [line["log_level"] for line in of(lines, "request")] == ["debug"]

    @pytest.mark.parametrize("given", ["a-proxy.s:id_7", "x" * 100])
    def test_a_sane_id_is_kept(self, app: APIFlask, world: World, given: str) -> None:
        assert Caller(app).get("/healthz", headers={"X-Request-ID": given}).headers["X-Request-ID"] == given

    @pytest.mark.parametrize("given", ["", "x" * 101, "two words", "<script>", "é"])
    def test_another_is_replaced(self, app: APIFlask, world: World, given: str) -> None:
        headers = {"X-Request-ID": given.encode().decode("latin-1")}
        found = [Caller(app).get("/healthz", headers=headers).headers["X-Request-ID"] for _ in range(2)]
        assert found[0] != found[1]
        assert all(len(one) == 32 for one in found)

    def test_errors_have_both(self, app: APIFlask, world: World, lines: list[EventDict]) -> None:
        response = Caller(app).get("/api/no-such-call")
        response.close()
        (line,) = of(lines, "request")
        assert (line["status"], line["request_id"]) == (404, response.headers["X-Request-ID"])

    def test_nothing_is_left_for_the_next(self, app: APIFlask, world: World, lines: list[EventDict]) -> None:
        caller = People(app, world)("bob")
        caller.send().close()
        Caller(app).get("/openapi.json").close()
        assert not of(lines, "request")[-1].keys() & {"user_id", "session_id", "conversation_id"}


def test_a_statement_that_fails_does_not_tell_its_values(database: Database) -> None:
    with pytest.raises((SQLAlchemyError, Unavailable)) as caught:
        database.read(lambda s: s.execute(text("SELECT nothing FROM nowhere WHERE a = :a"), {"a": "a heron"}))
    original = caught.value.__cause__ if isinstance(caught.value, Unavailable) else caught.value
    assert isinstance(original, SQLAlchemyError)
    assert "nowhere" in str(original)
    assert "heron" not in str(original)
