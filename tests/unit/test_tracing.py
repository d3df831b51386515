"""Traces: nothing where they are off, a clear word where they cannot be, and no text where they are on."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.services import HOST, ROOT, clean_environment
from webapp import config, tracing
from webapp.config import Settings, load_settings
from webapp.errors import ConfigurationError


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    made, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(made))
    monkeypatch.setattr(tracing, "_tracer", provider.get_tracer("test"))
    yield made
    provider.shutdown()


class TestOff:
    def test_nothing_of_opentelemetry_is_needed(self) -> None:
        """Nor loaded by us; redis-py loads it where it is there."""
        script = """
import sys
sys.modules["opentelemetry"] = None
from webapp.config import Settings
from webapp.app import create_app
from webapp import tracing
app = create_app(Settings(_env_file=None, secret_key="a", data_dir=sys.argv[1]))
app.test_client().get("/openapi.json")
with tracing.span("a", session_id=1):
    tracing.event("b")
assert tracing.carrier() == {} and tracing.trace_id() is None
"""
        subprocess.run([sys.executable, "-c", script, "/tmp/nowhere"], check=True)

    def test_a_span_is_one_and_the_same_nothing(self) -> None:
        assert tracing.span("a", session_id=1) is tracing.span("b")
        assert isinstance(tracing.span("a"), nullcontext)


class TestMissing:
    def test_the_setting_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(config, "find_spec", lambda name: None)
        with pytest.raises(ConfigurationError, match=r"^SLUICEGATE_TRACING: .*pip install 'sluicegate\[otel\]'"):
            load_settings(tracing=True, data_dir=tmp_path)
        assert load_settings(tracing=False, data_dir=tmp_path).tracing is False

    def test_half_of_it_is_as_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
        with pytest.raises(ConfigurationError, match=r"pip install 'sluicegate\[otel\]'"):
            tracing.configure_tracing(Settings(_env_file=None, tracing=True))
        assert tracing._tracer is None


class TestLeaving:
    """A process that ends sends what it has, and does not wait long for a receiver that is away."""

    SCRIPT = """
import sys
from webapp import tracing
from webapp.config import Settings
tracing.configure_tracing(Settings(_env_file=None, tracing=True))
with tracing.span("the last"):
    pass
"""

    def leave(self, url: str) -> float:
        """How many seconds it took."""
        began = time.monotonic()
        environment = clean_environment(OTEL_EXPORTER_OTLP_ENDPOINT=url)
        subprocess.run([sys.executable, "-c", self.SCRIPT], check=True, cwd=ROOT, env=environment, timeout=60)
        return time.monotonic() - began

    def test_what_it_has_is_sent(self) -> None:
        received: list[bytes] = []

        class Receiver(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                received.append(self.rfile.read(int(self.headers["Content-Length"])))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

        with HTTPServer((HOST, 0), Receiver) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            self.leave(f"http://{HOST}:{server.server_port}")
            server.shutdown()
        assert len(received) == 1
        assert b"the last" in received[0]
        assert b"sluicegate" in received[0]

    def test_one_that_is_away(self) -> None:
        assert self.leave(f"http://{HOST}:1") < tracing.EXIT_SECONDS + 3


class TestOn:
    def test_a_carrier_makes_one_trace(self, exporter: InMemorySpanExporter) -> None:
        with tracing.span("here", session_id="s"):
            headers, here = tracing.carrier(), tracing.trace_id()
        assert set(headers) == {"traceparent"}
        with tracing.span("there", parent=headers):
            assert tracing.trace_id() == here
        with tracing.span("elsewhere", parent={}):
            assert tracing.trace_id() != here
        assert tracing.trace_id() is None

    def test_attributes(self, exporter: InMemorySpanExporter) -> None:
        with tracing.span("here", session_id="s", length=3, reason=None):
            tracing.event("first token", attempt=2)
        (span,) = exporter.get_finished_spans()
        assert span.attributes == {"sluicegate.session_id": "s", "sluicegate.length": 3}
        assert [(event.name, event.attributes) for event in span.events] == [("first token", {"sluicegate.attempt": 2})]

    def test_of_an_error_its_kind(self, exporter: InMemorySpanExporter) -> None:
        with pytest.raises(ValueError, match="somebody"), tracing.span("here"):
            raise ValueError("what somebody wrote")
        (span,) = exporter.get_finished_spans()
        assert (span.status.is_ok, span.status.description) == (False, "ValueError")
        assert not span.events

    def test_a_client_s_baggage_stays_outside(self, exporter: InMemorySpanExporter) -> None:
        given: dict[str, Any] = {"baggage": "text=whatever", "traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}
        with tracing.span("here", parent=given):
            assert tracing.trace_id() == "a" * 32
            assert set(tracing.carrier()) == {"traceparent"}
