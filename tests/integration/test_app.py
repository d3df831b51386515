"""The factory: an application connects to nothing until it is asked something, and there may be several."""

from __future__ import annotations

import threading
from pathlib import Path
from unittest.mock import patch

from apiflask import APIFlask

from tests.integration.api import Caller
from tests.integration.world import CLOSED_REDIS, World, make_settings
from webapp.app import create_app

NOWHERE = "postgresql+psycopg://nobody@127.0.0.1:1/nothing"


def test_it_may_be_made_more_than_once(session_app: APIFlask, tmp_path: Path) -> None:
    with patch("webapp.app.configure_logs"):
        other = create_app(make_settings(NOWHERE, CLOSED_REDIS, tmp_path))
    assert Caller(other).get("/healthz").get_json() == {"status": "ok"}


def test_it_lives_while_nothing_else_does(session_app: APIFlask, tmp_path: Path) -> None:
    assert Caller(session_app).get("/healthz").get_json() == {"status": "ok"}


def test_it_is_ready_when_all_its_parts_are(app: APIFlask, world: World) -> None:
    caller = Caller(app)
    answer = caller.get("/readyz")
    assert answer.status_code == 503
    checks = answer.get_json()["checks"]
    assert "worker" in checks["worker"]
    assert {name for name, state in checks.items() if state != "ok"} == {"worker"}
    world.services.workers.report("worker@one")
    assert caller.get("/readyz").get_json()["status"] == "ok"


def test_a_process_that_serves_no_reader_any_more_is_not_ready(app: APIFlask, world: World) -> None:
    caller, hub, session_id = Caller(app), world.services.hub, world.start().session_id
    world.services.workers.report("worker@one")
    hub.arrive(session_id, abandonable=False)
    assert caller.get("/readyz").status_code == 200
    ended = threading.Thread(target=lambda: None)
    ended.start()
    ended.join()
    hub._threads.append(ended)
    answer = caller.get("/readyz")
    assert answer.status_code == 503
    checks = answer.get_json()["checks"]
    assert [name for name, state in checks.items() if state != "ok"] == ["hub"]
    assert "restart" in checks["hub"]
    hub.leave(session_id)


def test_each_part_that_is_down_is_named(session_app: APIFlask, tmp_path: Path) -> None:
    with patch("webapp.app.configure_logs"):
        from webapp.app import make_services

        services = make_services(make_settings(NOWHERE, CLOSED_REDIS, tmp_path))
    with patch.dict(session_app.extensions, {"sluicegate": services}):
        answer = Caller(session_app).get("/readyz")
    assert answer.status_code == 503
    checks = answer.get_json()["checks"]
    assert {name for name, state in checks.items() if state != "ok"} >= {"database", "redis", "worker"}
    assert "Traceback" not in answer.text
    services.database.engine.dispose()
