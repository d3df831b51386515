"""Celery's own termination (Flower's button) strikes at any point: the session ends once, with what was seen."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest

from tests.functional.ending import assert_ended, rows_of
from tests.functional.nodes import Stack
from tests.services import LocalProcess, ValkeyServer, clean_environment
from tests.upstream import UpstreamProcess, expected_text

MODEL = "load_seconds=0.04,pace=0,tokens=6,thinking=1,silence_at=3:0.04+6:0.04,alphabet=mixed"
WHOLE = expected_text(MODEL)


@dataclass
class Place:
    """As much of a system as there is without its processes: what the endings are looked up in."""

    directory: Path
    environment: dict[str, str]
    valkey: ValkeyServer


@dataclass
class Struck:
    """What a program said that had runs struck at every step; see `strikes`."""

    stack: Stack
    told: dict[str, Any]


@pytest.fixture(scope="module")
def struck(valkey: ValkeyServer, upstream_process: UpstreamProcess, tmp_path_factory: pytest.TempPathFactory) -> Struck:
    """One run for each step that a run takes, struck there."""
    directory = tmp_path_factory.mktemp("struck")
    valkey.flush()
    upstream_process.reset()
    environment = clean_environment(
        DATABASE_URL=f"sqlite:///{directory / 'struck.db'}",
        REDIS_URL=valkey.url,
        OLLAMA_BASE_URL=upstream_process.url,
        SLUICEGATE_DATA_DIR=str(directory / "data"),
        SLUICEGATE_LEASE_RENEW_SECONDS="0.1",
    )
    place = Place(directory, environment, valkey)
    for name, words in (("migrate", ["webapp.cli", "migrate"]), ("strikes", ["tests.functional.strikes", MODEL])):
        process = LocalProcess(
            name,
            [sys.executable, "-m", *words],
            log_path=directory / "logs" / f"{name}.log",
            environment=environment,
        )
        process.start()
        assert process.wait(100) == 0, process.log_tail()
    told = json.loads(process.log().splitlines()[-1])
    return Struck(cast(Stack, place), told)


class TestAtEveryStep:
    def test_it_ends_once_and_keeps_what_was_there(self, struck: Struck, upstream_process: UpstreamProcess) -> None:
        """As `revoked`, or, where the answer had come to its end before, as what it ended as."""
        for run in (struck.told["undisturbed"], *struck.told["results"]):
            reason = "revoked" if run["struckWhile"] == "running" else "stop"
            session = {"sessionId": run["sessionId"], "messageId": run["messageId"]}
            try:
                row = assert_ended(struck.stack, upstream_process, session, [], reason)
                message = rows_of(struck.stack, run["sessionId"])[1]
                said = message.thinking + message.content
                assert "".join(WHOLE).startswith(said)
                assert said == "".join(WHOLE) or reason == "revoked"
                assert row.attempt <= 1
                assert run["inTable"] == 0
            except AssertionError as error:
                error.add_note(f"struck at: {run['target']}")
                raise

    def test_every_step_was_struck(self, struck: Struck) -> None:
        """Before, in, and after each: whatever it is that a run does, and whatever it waits for."""
        steps = dict(struck.told["undisturbed"]["steps"])
        assert {"waiting after connect", "waiting after text", "after commit, in its transaction"} <= steps.keys()
        assert len(struck.told["results"]) > len(steps) + 1
        missed = {run["target"].rpartition(",")[0] for run in struck.told["results"] if not run["struckWhile"]}
        # Of texts there are fewer in a run on a busy machine: it reads several at once.
        assert missed <= {"before text", "after text", "waiting after text"}
        while_running = {run["target"] for run in struck.told["results"] if run["struckWhile"] == "running"}
        assert {"the start, 1", "after claim, 1", "before text, 2", "before end, 1"} <= while_running
        assert {"before fence, 1", "before commit, 1", "after done, 1"}.isdisjoint(while_running)

    def test_a_partial_is_kept(self, struck: Struck) -> None:
        """What was said before the strike, also where that was not written down yet."""
        by_target = {run["target"]: run["sessionId"] for run in reversed(struck.told["results"])}
        kept = {
            target: rows_of(struck.stack, by_target[f"{target}, {nth}"])[1].content
            for target, nth in (("before connect", 1), ("waiting after text", 1))
        }
        assert kept["before connect"] == ""
        assert WHOLE.content.startswith(kept["waiting after text"])
        assert len(kept["waiting after text"].split()) == 3

    def test_nothing_is_left_in_the_process(self, struck: Struck, upstream_process: UpstreamProcess) -> None:
        assert struck.told["after"] == struck.told["before"]
        assert upstream_process.connection_count() == 0
