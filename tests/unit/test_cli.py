"""The command line's manners: one line on standard error, a non-zero code, and no traceback."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from webapp import cli
from webapp.cli.flower import flower_credentials
from webapp.cli.output import print_table
from webapp.config import Settings, load_settings


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(Settings.variable_of(name), raising=False)
    monkeypatch.delenv(cli.DEBUG_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)


def failure_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a command which must fail leaves on standard error."""
    assert cli.run(arguments) != 0
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("sluicegate: ")
    return captured.err


class TestFailures:
    def test_an_unknown_command(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "sluicegate --help" in failure_of(capsys, "fly")

    def test_a_missing_argument_names_the_commands_help(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "`sluicegate users create --help`" in failure_of(capsys, "users", "create")

    def test_a_bad_setting(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PORT", "many")
        assert "PORT" in failure_of(capsys, "config")

    def test_a_database_without_tables(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "run `sluicegate migrate`" in failure_of(capsys, "users", "list")

    def test_a_database_that_is_not_there(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("DATABASE_URL", "postgresql://u:hush@127.0.0.1:1/d")
        line = failure_of(capsys, "users", "list")
        assert "DATABASE_URL" in line
        assert "hush" not in line

    def test_stopping_needs_to_know_which(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "--all" in failure_of(capsys, "streams", "stop")
        assert "--all" in failure_of(capsys, "streams", "stop", "--all", "--model", "demo")

    def test_flower_needs_a_broker(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "REDIS_URL is not set" in failure_of(capsys, "flower")

    def test_a_taken_port(self, capsys: pytest.CaptureFixture[str]) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            assert cli.run(["up", "--port", str(port)]) == 1
        assert capsys.readouterr().err == f"sluicegate: port {port} is taken: stop what listens there, or set PORT\n"

    def test_the_debug_option_adds_the_traceback(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(cli.DEBUG_VARIABLE, "")  # so that what the option sets is taken back
        assert cli.run(["--debug", "users", "list"]) == 1
        assert "Traceback" in capsys.readouterr().err


class TestUsers:
    def test_the_token_is_the_last_word(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.run(["migrate"]) == 0
        capsys.readouterr()
        assert cli.run(["users", "create", "alice"]) == 0
        assert len(capsys.readouterr().out.split()[-1]) >= 20
        assert "rotate" in failure_of(capsys, "users", "create", "alice")
        assert cli.run(["users", "disable", "alice"]) == 0
        capsys.readouterr()
        assert cli.run(["users", "list", "--json"]) == 0
        (alice,) = json.loads(capsys.readouterr().out)
        assert alice["name"] == "alice"
        assert alice["disabledAt"]


class TestConfig:
    def test_it_says_where_each_value_comes_from(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("REDIS_URL", "redis://:hush@h/0")
        Path(".env").write_text("PORT=9000\n")
        assert cli.run(["config", "--json"]) == 0
        output = capsys.readouterr().out
        by_variable = {item["variable"]: item for item in json.loads(output)}
        assert by_variable["REDIS_URL"]["source"] == "environment"
        assert by_variable["PORT"] | {"meaning": ""} == {
            "variable": "PORT",
            "value": 9000,
            "source": ".env",
            "meaning": "",
        }
        assert by_variable["SLUICEGATE_LEASE_SECONDS"]["source"] == "default"
        assert "hush" not in output


class TestFlower:
    def test_its_password_is_made_once_and_kept_from_others(self) -> None:
        first = flower_credentials(load_settings())
        assert first == flower_credentials(load_settings())
        assert len(first.removeprefix("owner:")) >= 20
        assert stat.S_IMODE(Path("var/flower-auth").stat().st_mode) == 0o600

    def test_a_configured_one_is_used(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SLUICEGATE_FLOWER_BASIC_AUTH", "me:mine")
        assert flower_credentials(load_settings()) == "me:mine"


def test_a_redis_that_is_configured_and_away_is_said_at_once(tmp_path: Path) -> None:
    environment = os.environ | {"REDIS_URL": "redis://127.0.0.1:1/0", "SLUICEGATE_DATA_DIR": str(tmp_path / "data")}
    command = [str(Path(sys.executable).with_name("sluicegate")), "up", "--port", "0"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert done.stderr.startswith("sluicegate: REDIS_URL: redis://127.0.0.1:1/0 cannot be reached")


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([]) != 0
    assert "Commands:" in capsys.readouterr().out


def test_a_narrow_terminal_leaves_columns_out_and_cuts_none(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    identity = "01a204f1-ab24-70fe-b6f4-fa6b87151910"
    print_table(("Session", "Status", "Started", "Ended"), [(identity, "ACTIVE", "x" * 20, "y" * 40)])
    shown = capsys.readouterr().out
    assert identity in shown
    assert "x" * 20 in shown
    assert "want of width: Ended" in shown
