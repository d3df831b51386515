"""How long `sluicegate up` takes from nothing: an empty data directory, everything embedded, the demo model."""

from __future__ import annotations

import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

import requests

from tests.services import HOST, LocalProcess, clean_environment, free_port, wait_until

PROGRAM: Final = Path(sys.executable).with_name("sluicegate")
START_SECONDS: Final = 90.0
CSRF: Final = re.compile(r'name="csrf-token" content="([^"]+)"')
SIGN_IN_TOKEN: Final = re.compile(r"Sluicegate is ready: \S+\?token=([\w.-]+)")


def start_once() -> dict[str, float]:
    """Seconds from the command until /readyz is 200, and until the first token of a first message.

    The latter includes what a person's browser does meanwhile: signing in with the link that is printed. Its owner's
    reading and clicking is not in it.
    """
    with tempfile.TemporaryDirectory(prefix="sluicegate-start-") as name:
        directory, port = Path(name), free_port()
        command = [str(PROGRAM), "up", "--port", str(port), "--data-dir", str(directory / "data")]
        up = LocalProcess(
            "up", command, log_path=directory / "log", environment=clean_environment(), ready_prompt="is ready"
        )
        began = time.monotonic()
        up.start()
        try:
            wait_until(lambda: _ready(port), START_SECONDS, "/readyz", (requests.RequestException,))
            ready = time.monotonic() - began
            up.await_ready(START_SECONDS)
            _first_token(f"http://{HOST}:{port}", SIGN_IN_TOKEN.findall(up.log())[-1])
            return {"ready": ready, "first token": time.monotonic() - began}
        finally:
            up.stop(30)


def _ready(port: int) -> bool:
    return requests.get(f"http://{HOST}:{port}/readyz", timeout=5, proxies={"http": ""}).status_code == 200


def _first_token(url: str, sign_in_token: str) -> None:
    """As the page does it."""
    with requests.Session() as page:
        page.trust_env = False
        form = {"token": sign_in_token, "csrf_token": _csrf(page, f"{url}/sign-in")}
        assert page.post(f"{url}/sign-in", form, timeout=30).ok
        headers = {"X-CSRFToken": _csrf(page, url), "Accept": "text/event-stream"}
        body = {"content": "Hello"}
        path = f"{url}/api/stream-message"
        with page.post(path, json=body, headers=headers, timeout=30, stream=True) as answer:
            assert answer.status_code == 200, answer.text
            assert any(b'"content":' in line for line in answer.iter_lines(chunk_size=1)), "no token came"


def _csrf(page: requests.Session, url: str) -> str:
    found = CSRF.search(page.get(url, timeout=30).text)
    assert found, url
    return found[1]
