"""What an operator sees: figures over all processes, logs with ids and without texts, one trace to the commit."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.figures import Figures, Moved
from tests.functional.nodes import ApiError, Client, Stack
from tests.services import HOST, LocalProcess, free_port, wait_until
from tests.upstream import UpstreamProcess, expected_text

MARKER = "heron"
ENDLESS = "pace=100,tokens=100000"
IDLE_SECONDS = 1.5


class Collector:
    """An OTLP/HTTP receiver that keeps what it is sent."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                collector.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer((HOST, 0), Handler)
        self.url = f"http://{HOST}:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def spans(self) -> list[Span]:
        """Every span so far."""
        return [
            span
            for body in list(self.bodies)
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def of(self, session: Mapping[str, Any], name: str) -> list[Span]:
        """The spans of that name that carry the session's id."""
        return [
            span for span in self.spans() if span.name == name and attributes(span).get("session_id") == ids(session)
        ]


def ids(session: Mapping[str, Any]) -> str:
    return str(session["sessionId"])


def attributes(span: Span) -> dict[str, str]:
    """Ours, without their prefix."""
    return {one.key.removeprefix("sluicegate."): one.value.string_value for one in span.attributes}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture(scope="module")
def stack_settings(collector: Collector) -> dict[str, str]:
    return {
        "SLUICEGATE_LOG_LEVEL": "DEBUG",
        "SLUICEGATE_IDLE_TIMEOUT_SECONDS": str(IDLE_SECONDS),
        "SLUICEGATE_LEASE_SECONDS": "2",
        "SLUICEGATE_DRAIN_SECONDS": "0.5",
        "SLUICEGATE_TRACING": "true",
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        "OTEL_BSP_SCHEDULE_DELAY": "100",
    }


@pytest.fixture
def reaper(stack: Stack) -> LocalProcess:
    return stack.others.get("reaper") or stack.start_reaper()


@pytest.fixture
def beat(stack: Stack, reaper: LocalProcess) -> LocalProcess:
    return stack.others.get("beat") or stack.start_beat()


def lines(stack: Stack) -> Iterator[dict[str, Any]]:
    """What all processes have logged, and each line is JSON."""
    for process in stack.processes():
        for line in process.log().splitlines():
            if line.startswith("{"):
                yield json.loads(line)


def files(stack: Stack) -> list[Path]:
    return list((stack.directory / "data" / "metrics").glob("*.db"))


class TestMetrics:
    def test_what_happens_is_counted_over_all_processes(
        self, stack: Stack, client: Client, upstream: UpstreamProcess
    ) -> None:
        other = stack.client(web=stack.start_web())
        before = Figures.scrape(client.base_url)
        complete = client.post_message("say it", model="tokens=10,pace=0,thinking=2")
        client.follow(complete["sessionId"]).wait_until_done()
        silent = other.post_message("say it", model="silence_at=5:60,pace=0")
        client.follow(silent["sessionId"]).wait_until_done()
        stopped = client.post_message("say it", model=ENDLESS)
        client.follow(stopped["sessionId"]).wait_for_text(20)
        receipt = other.terminate(stopped["sessionId"])

        moved = Moved(before, wait_until(lambda: settled(other, before, 3), 5, "three endings"))
        assert moved.by("sluicegate_streams_started_total") == 3
        ended = "sluicegate_streams_ended_total"
        assert moved.by(ended, status="COMPLETED", reason="stop", phase="GENERATING") == 1
        assert moved.by(ended, status="TERMINATED", reason="idle_timeout", phase="GENERATING") == 1
        assert moved.by(ended, status="TERMINATED", reason="user", phase="GENERATING") == 1
        assert moved.by(ended) == 3
        assert moved.by("sluicegate_partial_length_characters_count") == 2
        five_tokens = len(expected_text("tokens=5").content)
        assert moved.by("sluicegate_partial_length_characters_sum") == receipt["length"] + five_tokens
        for timing in ("request_to_fence", "fence_to_upstream_closed", "request_to_commit"):
            assert moved.by(f"sluicegate_stop_{timing}_seconds_count") == 1, timing
            assert 0 <= moved.by(f"sluicegate_stop_{timing}_seconds_sum") < 1, timing
        assert moved.by("sluicegate_first_token_seconds_count") == 3
        assert moved.by("sluicegate_queue_seconds_count") == 3
        assert moved.by("sluicegate_tokens_total", kind="answer") == 12
        characters = moved.by("sluicegate_streamed_characters_total")
        assert characters >= receipt["length"] + receipt["thinkingLength"] + five_tokens
        assert 0 < moved.by("sluicegate_streamed_chunks_total") <= characters
        assert moved.by("sluicegate_flush_operations_count") > 0
        assert Figures.scrape(client.base_url).sum(ended) == moved.after.sum(ended)

    def test_what_is_now(self, stack: Stack, client: Client, upstream: UpstreamProcess) -> None:
        session = client.post_message("say it", model=ENDLESS)
        readers = [client.follow(session["sessionId"]) for _ in range(2)]
        for reader in readers:
            reader.wait_for_text(1)
        now = Figures.scrape(client.base_url)
        gauges = ("readers", "worker_streams", "active_streams", "queued_streams")
        assert [now.sum(f"sluicegate_{name}") for name in gauges] == [2, 1, 1, 0]
        client.terminate(session["sessionId"])
        wait_until(lambda: Figures.scrape(client.base_url).sum("sluicegate_readers") == 0, 5)
        now = Figures.scrape(client.base_url)
        assert [now.sum(f"sluicegate_{name}") for name in gauges] == [0, 0, 0, 0]

    def test_what_the_reaper_does(self, stack: Stack, client: Client, beat: LocalProcess) -> None:
        before = Figures.scrape(client.base_url)
        wait_until(lambda: Moved(before, scrape(client)).by("sluicegate_reaper_pass_seconds_count") > 0, 15)

    def test_a_killed_worker_counts_no_more_and_what_it_counted_does(
        self, stack: Stack, client: Client, upstream: UpstreamProcess
    ) -> None:
        worker = stack.worker.container.process
        session = client.post_message("say it", model=ENDLESS)
        client.follow(session["sessionId"]).wait_for_text(50)
        before = scrape(client)
        assert before.sum("sluicegate_worker_streams") == 1
        worker.kill()
        after = scrape(client)
        assert after.has("sluicegate_worker_streams")
        assert after.sum("sluicegate_worker_streams") == 0
        assert Moved(before, after).by("sluicegate_streamed_characters_total") >= 0
        assert Moved(before, after).by("sluicegate_first_token_seconds_bucket") == 0
        count = len(files(stack))
        for _ in range(2):
            worker.restart()
            scrape(client)
        worker.kill()
        assert Moved(before, scrape(client)).by("sluicegate_first_token_seconds_count") >= 0
        assert len(files(stack)) == count
        client.terminate(session["sessionId"])

    def test_a_worker_serves_them_at_a_port_of_its_own(self, stack: Stack, client: Client) -> None:
        port = free_port()
        first = stack.start_worker(settings={"SLUICEGATE_METRICS_PORT": str(port)})
        own = wait_until(lambda: Figures.scrape(f"http://{HOST}:{port}"), 5, ignoring=(requests.ConnectionError,))
        assert own.sum("sluicegate_streams_ended_total") == scrape(client).sum("sluicegate_streams_ended_total")
        assert own.has("sluicegate_active_streams")
        second = stack.start_worker(settings={"SLUICEGATE_METRICS_PORT": str(port)})
        second.wait_for_log("metrics.port_unusable", timeout=5)
        first.container.process.kill()
        stack.worker.container.process.kill()
        session = client.post_message("say it", model="tokens=3")
        assert client.follow(session["sessionId"]).wait_until_done()["status"] == "COMPLETED"

    def test_a_database_that_is_silent_costs_only_its_own_figures(self, stack: Stack, client: Client) -> None:
        if not stack.services:
            pytest.skip("only a server can be silent")
        assert scrape(client).has("sluicegate_active_streams")
        database = psutil.Process(stack.services[0].pid)
        family = [database, *database.children(recursive=True)]
        for process in family:
            process.suspend()
        try:
            began = time.monotonic()
            now = scrape(client)
            assert time.monotonic() - began < 5
        finally:
            for process in family:
                process.resume()
        assert not now.has("sluicegate_active_streams")
        assert now.has("sluicegate_streams_started_total")


def scrape(client: Client) -> Figures:
    return Figures.scrape(client.base_url)


def settled(client: Client, before: Figures, endings: int) -> Figures | None:
    """The figures once so many streams have ended since `before`; they are counted just after the commit."""
    after = scrape(client)
    return after if Moved(before, after).by("sluicegate_streams_ended_total") == endings else None


class TestLogs:
    def test_no_text_is_in_any_line_of_any_process(
        self, stack: Stack, client: Client, collector: Collector, beat: LocalProcess
    ) -> None:
        """Neither the question's, nor the answer's, nor what the upstream says of its failure; at the level DEBUG."""
        answer = "tokens=40,pace=0,thinking=20,alphabet=mixed"
        session = client.post_message(f"A {MARKER}, please", model=answer)
        reader = client.follow(session["sessionId"])
        reader.wait_until_done()
        failed = client.post_message(f"Another {MARKER}", model=f"{MARKER}=1")
        assert client.follow(failed["sessionId"]).wait_until_done()["reason"] == "upstream_error"
        for script in ("malformed_at=3", "error_at=3", "reset_at=3", "close_at=3"):
            broken = client.post_message(f"A {MARKER}?", model=f"{script},pace=0")
            client.follow(broken["sessionId"]).wait_until_done()
        with pytest.raises(ApiError):
            client.call("POST", "/api/stream-message", {"content": MARKER, "conversationId": MARKER})
        client.request("POST", "/api/stream-message", data=f"not JSON but a {MARKER}")
        client.request("POST", "/graphql", json={"query": f"{{ {MARKER}", "variables": {"input": MARKER}})
        client.request("GET", f"/sign-in?token={MARKER}")
        terminated = [line for line in lines(stack) if line["event"] == "stream.terminated"]
        assert any(line["session_id"] == ids(failed) for line in terminated)

        collector_has = wait_until(lambda: collector.of(failed, "commit"), 5, "the last commit's span")
        assert collector_has
        texts = [MARKER, reader.text[:8], reader.thinking[:8], json.dumps(reader.text[:8])[1:-1]]
        for process in stack.processes():
            said = process.log()
            assert said
            assert [text for text in texts if text in said] == [], process.name
        assert [body for body in collector.bodies if MARKER.encode() in body] == []

    def test_every_line_is_json(self, stack: Stack, client: Client) -> None:
        """Of gunicorn too; but Celery shows itself at its start, before there is a log."""
        for process in (stack.web, stack.worker.container.process):
            said = process.log_since_start().splitlines()
            start = next(number for number, line in enumerate(said) if line.startswith("{"))
            ready = start if process is stack.web else next(n for n, line in enumerate(said) if " ready." in line)
            assert ready < len(said)
            assert [line for line in said[ready:] if not is_json(line)] == [], process.name
        assert is_json(stack.web.log_since_start().splitlines()[0])

    def test_the_ending_says_who_why_and_how_long_it_took(self, stack: Stack, client: Client) -> None:
        session = client.post_message("say it", model=ENDLESS)
        client.follow(session["sessionId"]).wait_for_text(10)
        receipt = client.terminate(session["sessionId"])
        (line,) = wait_until(lambda: about(stack, session, "stream.terminated"), 5)
        assert line["terminated_by"] == "tester"
        expected = {"status": "TERMINATED", "reason": "user", "phase": "GENERATING", "length": receipt["length"]}
        assert {name: line[name] for name in expected} == expected
        for name in ("request_to_fence_ms", "fence_to_upstream_closed_ms", "request_to_commit_ms"):
            assert isinstance(line[name], float)
        assert line["user_id"]
        assert line["trace_id"]

    def test_a_stream_s_lines_carry_its_ids(self, stack: Stack, client: Client) -> None:
        """At the web and at the worker, also where the code that writes the line knows nothing of the session."""
        headers = {"X-Request-ID": "from-the-proxy:1", "Accept": "application/json"}
        response = client.request(
            "POST", "/api/stream-message", json={"content": "say it", "model": "tokens=3"}, headers=headers
        )
        session = response.json()
        assert response.headers["X-Request-ID"] == "from-the-proxy:1"
        client.follow(session["sessionId"]).wait_until_done()
        accepted = wait_until(lambda: requests_of(stack, "from-the-proxy:1"))
        followed = wait_until(lambda: [line for line in about(stack, session, "request") if line["method"] == "GET"])
        expected = {"session_id": ids(session), "conversation_id": session["conversationId"]}
        for line in (accepted[-1], followed[-1]):
            assert {name: line[name] for name in expected} == expected
            assert line["user_id"]
        (ending,) = wait_until(lambda: about(stack, session, "stream.completed"), 5, "it is said after `done`")
        assert ending["user_id"] == accepted[-1]["user_id"]
        assert "request_id" not in ending
        assert (accepted[-1]["method"], accepted[-1]["path"], accepted[-1]["status"]) == (
            "POST",
            "/api/stream-message",
            202,
        )

    def test_so_do_those_that_know_only_the_session(self, stack: Stack, client: Client) -> None:
        session = client.post_message("say it", model=ENDLESS)
        client.follow(session["sessionId"]).wait_for_text(10)
        worker = stack.worker.container.process
        worker.send_signal(signal.SIGTERM)
        (line,) = wait_until(lambda: about(stack, session, "stream.handed_over"), 10)
        assert line["conversation_id"] == session["conversationId"]
        assert line["user_id"]
        assert line["trace_id"]
        client.terminate(session["sessionId"])
        worker.wait(20)

    def test_a_connection_s_next_request_inherits_nothing(self, stack: Stack, client: Client) -> None:
        session = client.post_message("say it", model="tokens=3")
        with requests.Session() as connection:
            connection.headers["Authorization"] = f"Bearer {client.token}"
            connection.get(f"{client.base_url}/api/streams/{session['sessionId']}").json()
            plain = connection.get(f"{client.base_url}/openapi.json", headers={"X-Request-ID": "the-second"})
        assert plain.headers["X-Request-ID"] == "the-second"
        (line,) = wait_until(lambda: requests_of(stack, "the-second"))
        assert not line.keys() & {"session_id", "conversation_id", "user_id"}


def about(stack: Stack, session: Mapping[str, Any], event: str) -> list[dict[str, Any]]:
    return [line for line in lines(stack) if line.get("session_id") == ids(session) and line["event"] == event]


def requests_of(stack: Stack, request_id: str) -> list[dict[str, Any]]:
    return [line for line in lines(stack) if line["event"] == "request" and line["request_id"] == request_id]


def is_json(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def parent_of(collector: Collector, child: Span) -> Span:
    """Another process may send it later."""
    return wait_until(lambda: [one for one in collector.spans() if one.span_id == child.parent_span_id], 10)[0]


class TestTraces:
    def test_one_trace_from_the_request_to_the_commit(self, stack: Stack, client: Client, collector: Collector) -> None:
        session = client.post_message("say it", model="tokens=5,pace=0")
        client.follow(session["sessionId"]).wait_until_done()
        names = ("enqueue", "generate", "commit")
        wait_until(lambda: all(collector.of(session, name) for name in names), 10, "three spans")
        enqueue, generate, commit = (collector.of(session, name)[0] for name in names)
        post = parent_of(collector, enqueue)
        assert post.name == "POST /api/stream-message"
        assert {span.trace_id for span in (post, enqueue, generate, commit)} == {post.trace_id}
        assert generate.parent_span_id == enqueue.span_id
        assert commit.parent_span_id == generate.span_id
        assert [event.name for event in generate.events] == ["first token"]
        assert attributes(commit)["reason"] == "stop"

    def test_a_stop_has_its_own(self, stack: Stack, client: Client, collector: Collector) -> None:
        session = client.post_message("say it", model=ENDLESS)
        client.follow(session["sessionId"]).wait_for_text(10)
        client.terminate(session["sessionId"])
        wait_until(lambda: all(collector.of(session, name) for name in ("stop", "fence", "commit")), 10)
        stop, fence, commit = (collector.of(session, name)[0] for name in ("stop", "fence", "commit"))
        assert fence.parent_span_id == stop.span_id
        post = parent_of(collector, stop)
        assert post.name == "POST /api/terminate-stream"
        assert attributes(stop)["reason"] == attributes(commit)["reason"] == "user"

    def test_it_goes_on_from_the_caller_s(self, stack: Stack, client: Client, collector: Collector) -> None:
        trace_id = "0af7651916cd43dd8448eb211c80319c"
        headers = {"traceparent": f"00-{trace_id}-b7ad6b7169203331-01", "Accept": "application/json"}
        session = client.call(
            "POST", "/api/stream-message", {"content": "say it", "model": "tokens=3"}, headers=headers
        )
        client.follow(session["sessionId"]).wait_until_done()
        (commit,) = wait_until(lambda: collector.of(session, "commit"), 10)
        assert commit.trace_id.hex() == trace_id
