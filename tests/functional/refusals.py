"""While the database is in trouble: what every refusal is like, and whether text flows on all the same."""

from __future__ import annotations

import threading
import time

import requests

from tests.functional.nodes import Client, Reader, Stack


def before_signing_in(stack: Stack, client: Client) -> tuple[requests.Session, dict[str, str]]:
    """A browser with the form, and the form filled in."""
    browser = requests.Session()
    browser.trust_env = False
    form = browser.get(f"{stack.url()}/sign-in", timeout=10).text
    csrf_token = form.partition('name="csrf_token"')[2].partition('value="')[2].partition('"')[0]
    return browser, {"token": str(client.token), "csrf_token": csrf_token}


def signed_in(stack: Stack, client: Client) -> requests.Session:
    """A browser that has the page's cookie."""
    browser, fields = before_signing_in(stack, client)
    browser.post(f"{stack.url()}/sign-in", data=fields, timeout=10).raise_for_status()
    assert browser.get(f"{stack.url()}/", timeout=10, allow_redirects=False).status_code == 200
    return browser


def assert_refused(name: str, answer: requests.Response, within_seconds: float) -> None:
    """503, in the form of every error, soon, and with a word on when to come back."""
    assert (name, answer.status_code) == (name, 503)
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.json()["code"] == "unavailable"
    assert int(answer.headers["Retry-After"]) > 0
    assert (name, answer.elapsed.total_seconds()) < (name, within_seconds)


class Flow:
    """How long readers that have not had all of a text had nothing to read, at the longest."""

    def __init__(self, readers: list[Reader], length: int) -> None:
        """`length` is that of each one's whole text."""
        self.longest_pause_seconds = 0.0
        self._readers = readers
        self._length = length
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        heard_at = {reader: time.monotonic() for reader in self._readers}
        lengths = dict.fromkeys(self._readers, 0)
        while not self._stopped.wait(0.02):
            for reader in self._readers:
                if (length := len(reader.text)) > lengths[reader]:
                    lengths[reader], heard_at[reader] = length, time.monotonic()
                if length < self._length:
                    self.longest_pause_seconds = max(self.longest_pause_seconds, time.monotonic() - heard_at[reader])

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()
