"""`sluicegate streams` at a terminal and in a pipe: what is watched is what is saved, and no terminal obeys it."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.functional.nodes import Client, Stack
from tests.services import HOST, wait_until
from tests.terminal import CTRL_C, Terminal, without_colours

PROGRAM = str(Path(sys.executable).with_name("sluicegate"))
LONG = "pace=50,tokens=100000,thinking=3"
HOSTILE = "\x1b]0;mine\x07 \x1b[2J red\x9b31m back\rover \u202egnp.exe\u2066 end\x7f\ttab\nline"
SPELT_OUT = r"\u001b]0;mine\u0007 \u001b[2J red\u009b31m back\u000dover \u202egnp.exe\u2066 end\u007f"
ESCAPE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]|\r")


@pytest.fixture(scope="module")
def stack_database() -> str:
    return "sqlite"


def environment(stack: Stack, **variables: str) -> dict[str, str]:
    return without_colours(stack.environment) | variables


def in_a_pipe(stack: Stack, *arguments: str, **variables: str) -> subprocess.CompletedProcess[bytes]:
    """Run `sluicegate streams ARGUMENTS` with nothing of it at a terminal."""
    command = [PROGRAM, "streams", *arguments]
    return subprocess.run(command, env=environment(stack, **variables), capture_output=True, timeout=60, check=False)


def at_a_terminal(stack: Stack, *arguments: str, columns: int = 80, **variables: str) -> Terminal:
    return Terminal([PROGRAM, "streams", *arguments], environment(stack, **variables), columns=columns)


def shown(terminal: Terminal) -> str:
    """What was written to the terminal, without colours and what was written over."""
    return ESCAPE.sub("", terminal.said)


def saved(client: Client, session: dict[str, Any]) -> bytes:
    content: str = client.message(session)["content"]
    return content.encode()


class TestWatchInAPipe:
    def test_the_output_is_the_text_that_is_saved(self, stack: Stack, client: Client) -> None:
        model = "pace=100,tokens=60,thinking=4,alphabet=mixed,nul_at=3"
        session = client.post_message("go on", model=model)
        session_id = session["sessionId"]
        live = in_a_pipe(stack, "watch", session_id, LC_ALL="C")
        assert live.returncode == 0, live.stderr
        message = client.message(session)
        length = f"{message['length']} characters, after {len(message['thinking'])} of thinking"
        assert live.stderr.decode() == f"{message['thinking']}\nCOMPLETED (stop), {length}\n"
        assert hashlib.sha256(live.stdout).digest() == hashlib.sha256(saved(client, session)).digest()

        lines = [json.loads(line) for line in in_a_pipe(stack, "watch", "--json", session_id).stdout.splitlines()]
        assert [lines[0]["event"], lines[-1]["event"]] == ["session", "done"]
        assert "".join(one["data"]["content"] for one in lines if one["event"] == "message").encode() == live.stdout
        assert lines[-1]["data"]["sha256"] == hashlib.sha256(live.stdout).hexdigest()

    def test_a_reader_that_leaves_ends_it_quietly(self, stack: Stack, client: Client) -> None:
        session_id = client.post_message("go on", model=LONG)["sessionId"]
        command = f"{PROGRAM} streams watch {session_id} | head -c 20"
        done = subprocess.run(command, shell=True, env=environment(stack), capture_output=True, timeout=60, check=False)
        assert len(done.stdout) == 20
        assert done.stderr.decode().splitlines() == ["".join(f"h{number} " for number in range(3))]
        assert client.stream(session_id)["status"] == "ACTIVE"
        client.terminate(session_id)


class TestWatchAtATerminal:
    def test_a_stop_is_seen_with_its_reason(self, stack: Stack, client: Client) -> None:
        session = client.post_message("go on", model=LONG)
        with at_a_terminal(stack, "watch", session["sessionId"]) as terminal:
            terminal.wait_for("t10 ")
            receipt = client.terminate(session["sessionId"])
            assert terminal.end() == 3
            assert "\x1b[33m\x1b[1mTERMINATED\x1b[0m (user)" in terminal.said
            assert "\x1b[2mh0 \x1b[0m" in terminal.said
            assert f"h2 \n{receipt['partialResponse']}\nTERMINATED (user), " in shown(terminal)

    def test_ctrl_c_leaves_the_stream_running(self, stack: Stack, client: Client) -> None:
        session_id = client.post_message("go on", model=LONG)["sessionId"]
        reader = client.follow(session_id)
        reader.wait_for_text(100)
        with at_a_terminal(stack, "watch", "--from-now", session_id, NO_COLOR="1") as terminal:
            wait_until(lambda: re.search(r"t\d+ t\d+", terminal.said), 30)
            wait_until(lambda: client.stream(session_id)["viewers"] == 2)
            terminal.type(CTRL_C)
            assert terminal.end() == 130
            assert f"the stream goes on, and `sluicegate streams stop {session_id}` stops it" in terminal.said
            assert "\x1b[" not in terminal.said.replace("\r\x1b[K", "")
            assert "t5 " not in terminal.said
        assert client.stream(session_id)["status"] == "ACTIVE"
        wait_until(lambda: client.stream(session_id)["viewers"] == 1, 3)
        client.terminate(session_id)

    def test_it_waits_in_the_queue_and_shows_what_a_terminal_would_obey(
        self, stack: Stack, client: Client, hostile_url: str
    ) -> None:
        stack.worker.container.process.kill()
        session = client.post_message("go on", model="hostile")
        with at_a_terminal(stack, "watch", session["sessionId"]) as terminal:
            terminal.wait_for("Queued, the next in turn")
            stack.start_worker(settings={"OLLAMA_BASE_URL": hostile_url}, wait=False)
            assert terminal.end() == 0
            assert f"{SPELT_OUT}\ttab\nline\n" in terminal.said
            assert not re.search("[\x07\x7f\x9b\u202e\u2066]", terminal.said)
            assert "\x1b]" not in terminal.said
            assert "\x1b[2J" not in terminal.said
        assert saved(client, session).decode() == HOSTILE

        stack.valkey.kill()
        ended = in_a_pipe(stack, "watch", session["sessionId"])
        assert (ended.returncode, ended.stdout.decode()) == (0, HOSTILE)
        assert ended.stderr.decode() == f"COMPLETED (stop), {len(HOSTILE)} characters\n"


class TestList:
    def test_as_wide_as_the_terminal_and_in_the_colours_of_the_states(self, stack: Stack, client: Client) -> None:
        running = client.post_message("go on", model=LONG)["sessionId"]
        client.follow(running).wait_for_text(5)
        stopped = client.post_message("go on", model=LONG)["sessionId"]
        client.terminate(stopped)
        failed = client.post_message("go on", model="http_status=400")["sessionId"]
        client.follow(failed).wait_until_done()

        with at_a_terminal(stack, "list") as terminal:
            assert terminal.end() == 0
        lines = shown(terminal).splitlines()
        assert max(map(len, lines)) <= 80
        assert re.search(rf"^{running}  GENERATING .* (now|\d+ s ago)", shown(terminal), re.MULTILINE)
        assert re.search(rf"{stopped}\S*  \x1b\[33mTERMINATED \(user\)", terminal.said)
        assert re.search(rf"{failed}\S*  \x1b\[1;31mERROR \(upstream_error\)", terminal.said)

        with at_a_terminal(stack, "list", NO_COLOR="1") as terminal:
            assert terminal.end() == 0
        assert running in terminal.said
        assert "\x1b" not in terminal.said

        rows = in_a_pipe(stack, "list", FORCE_COLOR="1").stdout.decode().splitlines()
        assert {len(row.split("\t")) for row in rows} == {9}
        assert [row.split("\t")[:3] for row in rows if row.startswith(stopped)] == [[stopped, "TERMINATED", "user"]]
        assert "\x1b" not in "".join(rows)
        client.terminate(running)


@pytest.fixture
def hostile_url() -> Iterator[str]:
    """URL of a model's server whose every answer is `HOSTILE`."""
    with ThreadingHTTPServer((HOST, 0), _Hostile) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://{HOST}:{server.server_port}"
        server.shutdown()
        thread.join()


class _Hostile(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        # Its escape sequences are cut in two.
        pieces = [{"role": "assistant", "content": character} for character in HOSTILE]
        lines: list[dict[str, Any]] = [{"model": "hostile", "message": piece, "done": False} for piece in pieces]
        lines.append({"model": "hostile", "message": {"role": "assistant", "content": ""}, "done": True})
        body = "".join(json.dumps(line | {"done_reason": "stop"}) + "\n" for line in lines).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """The worker's log is enough."""
