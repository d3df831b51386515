"""The embedded Valkey, run for real: closed to others, persistent, and never evicting."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis

from webapp.embedded import valkey as embedded
from webapp.embedded.valkey import EmbeddedValkey, find_server, shut_down
from webapp.errors import ConfigurationError


@contextmanager
def running(server: EmbeddedValkey) -> Iterator[redis.Redis]:
    """The server as a child, until the block ends; a client of it."""
    process = subprocess.Popen(server.prepare(), stdout=subprocess.DEVNULL)
    client = redis.Redis.from_url(server.url, decode_responses=True)
    try:
        _await_answer(client)
        yield client
    finally:
        client.close()
        process.kill()
        process.wait()


def _await_answer(client: redis.Redis) -> None:
    deadline = time.monotonic() + 10
    while True:
        try:
            client.ping()
            return
        except redis.ConnectionError:  # also while it reads its file
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


@pytest.fixture
def server(tmp_path: Path) -> EmbeddedValkey:
    return EmbeddedValkey(tmp_path / 'a "strange" dir')


def test_it_is_configured_as_the_design_demands(server: EmbeddedValkey) -> None:
    with running(server) as client:
        wanted = {
            "maxmemory-policy": "noeviction",
            "appendonly": "yes",
            "appendfsync": "everysec",
            "bind": "127.0.0.1",
            "save": "",
        }
        assert {name: client.config_get(name)[name] for name in wanted} == wanted
        assert tuple(map(int, client.info("server")["redis_version"].split(".")[:2])) >= (6, 2)


def test_it_asks_for_the_password(server: EmbeddedValkey) -> None:
    with running(server):
        stranger = redis.Redis(port=server.port)
        with pytest.raises(redis.AuthenticationError):
            stranger.ping()
        stranger.close()


def test_nobody_else_can_read_its_password(server: EmbeddedValkey) -> None:
    configuration = Path(server.prepare()[1])
    assert configuration.stat().st_mode & 0o077 == 0
    assert server.password in configuration.read_text()
    assert server.password not in " ".join(server.prepare())


def test_two_have_their_own_ports_and_passwords(tmp_path: Path) -> None:
    one, other = EmbeddedValkey(tmp_path / "1"), EmbeddedValkey(tmp_path / "2")
    assert one.port != other.port
    assert one.password != other.password


def test_what_it_acknowledged_outlives_a_kill(server: EmbeddedValkey) -> None:
    with running(server) as client:
        client.set("kept", "yes")
    again = EmbeddedValkey(server.directory)
    with running(again) as client:
        assert client.get("kept") == "yes"


def test_it_is_shut_down_by_its_url(server: EmbeddedValkey) -> None:
    with running(server):
        assert shut_down(server.url)
        assert not shut_down(server.url)


def test_nothing_to_shut_down_is_no_error(server: EmbeddedValkey) -> None:
    assert not shut_down(server.url, timeout_seconds=1)


class TestFindServer:
    def test_a_server_is_found_and_can_be_run(self) -> None:
        assert os.access(find_server(), os.X_OK)

    def test_one_on_the_path_serves_where_none_is_bundled(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        program = tmp_path / "redis-server"
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
        monkeypatch.setattr(embedded, "_bundled_server", lambda: None)
        monkeypatch.setenv("PATH", str(tmp_path))
        assert find_server() == program

    def test_without_any_the_error_says_what_to_do(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(embedded, "_bundled_server", lambda: None)
        monkeypatch.setenv("PATH", "")
        with pytest.raises(ConfigurationError, match="set REDIS_URL"):
            find_server()
