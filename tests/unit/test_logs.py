"""What a line of the log holds, and what none does."""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent.hub
import pytest
import requests
import structlog
from sqlalchemy.exc import DataError, OperationalError
from structlog.contextvars import clear_contextvars

from webapp.config import Settings
from webapp.errors import Invalid, Unavailable
from webapp.logs import bind, brief, configure_logs, describe_exception

TEXT = "what somebody wrote"


@pytest.fixture
def _as_it_was() -> Iterator[None]:
    """Logging is the process's: what a test sets is put back."""
    clear_contextvars()
    root, kept = logging.getLogger(), structlog.get_config()
    levels = {name: logging.getLogger(name).level for name in ("urllib3", "celery.app.trace", "strawberry.execution")}
    handlers, level, hook = root.handlers[:], root.level, threading.excepthook
    printer = gevent.hub.Hub.print_exception
    yield
    root.handlers[:], threading.excepthook = handlers, hook
    root.setLevel(level)
    for name, former in levels.items():
        logging.getLogger(name).setLevel(former)
    gevent.hub.Hub.print_exception = printer
    structlog.configure(**kept)
    clear_contextvars()


def configure(capsys: pytest.CaptureFixture[str], log_format: str = "json", log_level: str = "DEBUG") -> None:
    configure_logs(Settings(_env_file=None, log_format=log_format, log_level=log_level, data_dir=Path("nowhere")))
    capsys.readouterr()


def line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    (only,) = capsys.readouterr().err.splitlines()
    return dict(json.loads(only))


def raised(error: Exception) -> Exception:
    """An error with frames and a cause, which quotes a text."""
    try:
        try:
            int(TEXT)
        except ValueError as cause:
            raise error from cause
    except Exception as found:
        return found
    raise AssertionError


class TestErrors:
    @pytest.mark.parametrize(
        "error",
        [
            ConnectionRefusedError(111, "Connection refused"),
            Unavailable("The database cannot be reached"),
            OperationalError("SELECT 1", {}, Exception("server closed the connection")),
            AttributeError("'NoneType' object has no attribute 'name'"),
        ],
    )
    def test_one_that_speaks_of_connections_and_names_is_told_whole(self, error: Exception) -> None:
        assert brief(error) == f"{type(error).__name__}: {error}"

    @pytest.mark.parametrize(
        "error",
        [
            ValueError(TEXT),
            KeyError(TEXT),
            Invalid(TEXT),
            DataError("INSERT", {"content": TEXT}, Exception(f"invalid input: {TEXT}")),
            requests.exceptions.ChunkedEncodingError(TEXT),
        ],
    )
    def test_one_that_may_quote_is_told_by_its_kind(self, error: Exception) -> None:
        assert brief(error) == type(error).__name__

    def test_a_traceback_has_frames_and_causes_and_no_values(self) -> None:
        event = describe_exception(None, "error", {"exc_info": raised(KeyError(TEXT))})
        shown = event["exception"]
        assert "exc_info" not in event
        assert TEXT not in shown
        assert shown.index("ValueError") < shown.index("KeyError")
        assert "in raised" in shown

    def test_an_error_that_is_its_own_cause(self) -> None:
        first, second = ValueError("a"), KeyError("b")
        first.__context__, second.__context__ = second, first
        assert describe_exception(None, "error", {"exc_info": first})["exception"] == "KeyError\nValueError"

    def test_without_an_error(self) -> None:
        assert "exception" not in describe_exception(None, "error", {"exc_info": True})
        assert "exception" not in describe_exception(None, "error", {"exc_info": (None, None, None)})


@pytest.mark.usefixtures("_as_it_was")
class TestLines:
    def test_json_with_what_is_bound(self, capsys: pytest.CaptureFixture[str]) -> None:
        configure(capsys)
        bind(session_id="s", user_id=None)
        structlog.get_logger("here").info("something.happened", length=3)
        found = line(capsys)
        assert found.pop("timestamp").endswith("Z")
        assert found == {
            "event": "something.happened",
            "length": 3,
            "session_id": "s",
            "level": "info",
            "logger": "here",
        }

    def test_libraries_speak_in_the_same_form(self, capsys: pytest.CaptureFixture[str]) -> None:
        configure(capsys)
        try:
            raise raised(KeyError(TEXT))
        except KeyError:
            logging.getLogger("library").exception("It failed with %s", 7)
        found = line(capsys)
        assert (found["event"], found["level"], found["logger"]) == ("It failed with 7", "error", "library")
        assert "KeyError" in found["exception"]
        assert TEXT not in found["exception"]

    @pytest.mark.parametrize("name", ["celery.app.trace", "strawberry.execution"])
    def test_those_that_put_texts_into_words_are_silent(self, capsys: pytest.CaptureFixture[str], name: str) -> None:
        configure(capsys)
        logging.getLogger(name).error("Task raised unexpected: %r", ValueError(TEXT))
        assert capsys.readouterr().err == ""

    def test_readable_at_a_terminal(self, capsys: pytest.CaptureFixture[str]) -> None:
        configure(capsys, "console")
        try:
            raise raised(KeyError(TEXT))
        except KeyError:
            structlog.get_logger("here").exception("something.failed", session_id="s")
        shown = capsys.readouterr().err
        first = shown.splitlines()[0]
        assert "something.failed" in first
        assert "session_id=s" in first
        assert "\x1b" not in shown  # which a file does not understand
        assert "KeyError" in shown
        assert TEXT not in shown

    def test_a_thread_that_dies(self, capsys: pytest.CaptureFixture[str]) -> None:
        configure(capsys)
        thread = threading.Thread(target=lambda: int(TEXT), name="a-thread")
        thread.start()
        thread.join()
        found = line(capsys)
        assert (found["event"], found["thread"]) == ("thread.failed", "a-thread")
        assert "ValueError" in found["exception"]
        assert TEXT not in json.dumps(found)

    def test_a_greenlet_that_dies(self, capsys: pytest.CaptureFixture[str]) -> None:
        configure(capsys)
        gevent.spawn(int, TEXT).join()
        found = line(capsys)
        assert (found["event"], found["kind"]) == ("greenlet.failed", "ValueError")
        assert TEXT not in json.dumps(found)

    def test_a_greenlet_begins_with_nothing_bound(self, capsys: pytest.CaptureFixture[str]) -> None:
        configure(capsys)
        bind(session_id="s")
        gevent.spawn(structlog.get_logger("here").info, "elsewhere").join()
        assert "session_id" not in line(capsys)
        structlog.get_logger("here").info("still.here")
        assert line(capsys)["session_id"] == "s"


def test_what_gunicorn_s_master_loads_leaves_urllib3_to_gevent() -> None:
    """It is loaded before the workers are patched: what binds names of `ssl` then would have the wrong ones."""
    import subprocess

    script = "import sys, webapp.gunicorn; sys.exit(bool({'urllib3', 'requests', 'redis'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
