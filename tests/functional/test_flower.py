"""Flower over the whole system: what an operator sees there, what it remembers, and what its Terminate button does."""

from __future__ import annotations

from typing import Any

import pytest
import requests

from tests.functional.nodes import NO_PROXIES, Client, Stack
from tests.functional.text import assert_one_text
from tests.services import HOST, LocalProcess, wait_until
from tests.upstream import UpstreamProcess

CREDENTIALS = ("owner", "flower")
ENDLESS = "pace=50,tokens=100000"


class Flower:
    """Its HTTP API, as somebody with these credentials has it."""

    def __init__(self, process: LocalProcess, credentials: tuple[str, str] | None = CREDENTIALS) -> None:
        self.process = process
        self._url = f"http://{HOST}:{process.environment['SLUICEGATE_FLOWER_PORT']}"
        self._credentials = credentials

    def request(self, method: str, path: str) -> requests.Response:
        return requests.request(method, self._url + path, auth=self._credentials, timeout=10, proxies=NO_PROXIES)

    def tasks(self) -> dict[str, dict[str, Any]]:
        """Task's id to what is known of it."""
        response = self.request("GET", "/api/tasks")
        response.raise_for_status()
        found: dict[str, dict[str, Any]] = response.json()
        return found

    def await_state(self, task_id: str, *states: str) -> dict[str, Any]:
        wait_until(lambda: self.tasks().get(task_id, {}).get("state") in states, 15, f"{task_id} is one of {states}")
        return self.tasks()[task_id]

    def terminate(self, task_id: str) -> None:
        """What the button does."""
        self.request("POST", f"/api/task/revoke/{task_id}?terminate=true").raise_for_status()


@pytest.fixture
def flower(stack: Stack) -> Flower:
    """Running, and aware of the worker, whose events it hears from now on."""
    process = stack.others.get("flower") or stack.start_flower()
    flower = Flower(process)
    worker = stack.worker.container
    wait_until(lambda: worker.id in flower.request("GET", "/api/workers?refresh=1").text, 20, "Flower knows the worker")
    return flower


@pytest.mark.parametrize("credentials", [None, ("owner", "wrong"), ("", ""), ("tester", "flower")])
def test_nobody_is_let_in_without_the_password(flower: Flower, credentials: tuple[str, str] | None) -> None:
    stranger = Flower(flower.process, credentials)
    calls = [
        ("GET", "/"),
        ("GET", "/tasks"),
        ("GET", "/api/tasks"),
        ("GET", "/api/workers"),
        ("GET", "/api/task/info/x"),
        ("POST", "/api/task/revoke/x?terminate=true"),
        ("POST", "/api/worker/shutdown/x"),
        ("POST", "/api/task/async-apply/sluicegate.generate"),
    ]
    answers = {call: stranger.request(*call).status_code for call in calls}
    assert answers == dict.fromkeys(calls, 401)
    assert flower.request("GET", "/").status_code == 200


def test_a_task_is_shown_by_its_name_and_its_session(flower: Flower, client: Client) -> None:
    session = client.post_message("a secret question", model="tokens=5")
    client.follow(session["sessionId"]).wait_until_done()
    task = flower.await_state(session["sessionId"], "SUCCESS")
    assert task["name"] == "sluicegate.generate"
    assert task["args"] == f"session {session['sessionId']}"
    assert "secret" not in str(task)
    page = flower.request("GET", f"/task/{session['sessionId']}").text
    assert f"session {session['sessionId']}" in page


def test_what_it_knows_survives_a_restart(flower: Flower, client: Client) -> None:
    session = client.post_message("hello", model="tokens=5")
    client.follow(session["sessionId"]).wait_until_done()
    before = flower.await_state(session["sessionId"], "SUCCESS")
    assert flower.process.stop() == 0
    flower.process.start()
    flower.process.await_ready()
    after = flower.tasks()[session["sessionId"]]
    assert after == before


def test_terminate_ends_the_session_and_keeps_its_partial(
    stack: Stack, flower: Flower, client: Client, upstream: UpstreamProcess
) -> None:
    session = client.post_message("go on", model=ENDLESS)
    reader = client.follow(session["sessionId"])
    reader.wait_for_text(10)
    flower.await_state(session["sessionId"], "STARTED")
    flower.terminate(session["sessionId"])
    done = reader.wait_until_done()
    assert (done["status"], done["reason"]) == ("TERMINATED", "revoked")
    receipt = client.terminate(session["sessionId"])
    assert (receipt["reason"], receipt["alreadyEnded"]) == ("revoked", True)
    assert_one_text(stack, client, session, receipt, [reader])
    upstream.wait_until(lambda records: [one.outcome for one in records if one.model == ENDLESS] == ["disconnected"], 3)
    assert upstream.open_count() == 0
