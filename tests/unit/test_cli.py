"""The command line's manners: one line on standard error, a non-zero code, and no traceback."""

from __future__ import annotations

import json
import os
import pty
import re
import socket
import stat
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import click
import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from tests.terminal import COLOURS, CTRL_C, Terminal
from webapp import cli
from webapp.cli.flower import flower_credentials
from webapp.cli.output import Cell, print_table
from webapp.cli.services import open_services
from webapp.cli.terminal import age, duration, harmless, takes_colour
from webapp.config import Settings, load_settings
from webapp.models import SignInToken, User, now
from webapp.streams.retention import BATCH

PROGRAM = str(Path(sys.executable).with_name("sluicegate"))


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (*map(Settings.variable_of, Settings.model_fields), *COLOURS):
        monkeypatch.delenv(name, raising=False)
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


class TestRetention:
    def test_all_that_is_too_old_goes_at_once(self, capsys: pytest.CaptureFixture[str]) -> None:
        """In as many batches as it takes, and nothing else."""
        assert cli.run(["migrate"]) == 0
        assert cli.run(["users", "create", "alice"]) == 0
        database = open_services().database
        count = 2 * BATCH + 1

        def add_tokens(s: Session) -> None:
            user_id = s.scalars(select(User.id)).one()
            for number in range(count + 1):
                expires_at = now() + timedelta(hours=1 if number == count else -1)
                s.add(SignInToken(token_hash=str(number), user_id=user_id, expires_at=expires_at))

        database.write(add_tokens)
        capsys.readouterr()
        assert cli.run(["retain"]) == 0
        assert capsys.readouterr().out == f"Removed: {count:,} old sign in tokens\n"
        assert cli.run(["retain"]) == 0
        assert capsys.readouterr().out == "Removed: nothing\n"
        assert database.read(lambda s: list(s.scalars(select(SignInToken.token_hash)))) == [str(count)]


class TestStreams:
    def test_an_unknown_one_cannot_be_watched(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.run(["migrate"]) == 0
        capsys.readouterr()
        session_id = "01a204f1-ab24-70fe-b6f4-fa6b87151910"
        assert failure_of(capsys, "streams", "watch", session_id).startswith(
            f"sluicegate: there is no stream {session_id}: "
        )

    def test_that_there_is_none_is_said_to_a_person_only(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert cli.run(["migrate"]) == 0
        capsys.readouterr()
        assert cli.run(["streams", "list"]) == 0
        assert capsys.readouterr().out == ""
        monkeypatch.setattr("sys.stdout.isatty", lambda: True)
        assert cli.run(["streams", "list"]) == 0
        assert capsys.readouterr().out.startswith("No stream yet: ")
        assert cli.run(["streams", "list", "--active"]) == 0
        assert capsys.readouterr().out.startswith("No stream matches: ")


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
    command = [PROGRAM, "up", "--port", "0"]
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


def test_numbers_stand_to_the_right_and_later_columns_fill_what_room_is_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "23")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    rows = [("a" * 10, 7, "b" * 12, "c"), ("a", 1234, "b", Cell("late", "d\x1b[31m"))]
    print_table(("Name", "Length", "Wide", "Last"), [(*row[:3], None) for row in rows])
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == [
        "Name        Length",
        "─" * 18,
        "aaaaaaaaaa       7",
        "a             1234",
        "Not shown, for want of",
        "width: Wide, Last",
    ]
    monkeypatch.setenv("COLUMNS", "31")
    print_table(("Name", "Length", "Wide", "Last"), rows)
    shown = capsys.readouterr().out
    assert "d\\u001b[31m" in shown
    assert shown.split()[-1] == "Wide"


def test_what_a_terminal_obeys_is_spelt_out() -> None:
    assert harmless("a\tb\nc é 👩‍👧 שָׁלוֹם") == "a\tb\nc é 👩‍👧 שָׁלוֹם"
    obeyed = [*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
    for code in set(obeyed) - {9, 10}:
        assert harmless(chr(code)) == f"\\u{code:04x}"


def test_times_are_said_in_the_largest_whole_unit() -> None:
    assert [duration(seconds) for seconds in (0.4, 59.9, 60, 7199, 7200, 172_800)] == [
        "0 s",
        "59 s",
        "1 min",
        "1 h",
        "2 h",
        "2 d",
    ]
    assert age(now() - timedelta(hours=3, minutes=59)) == "3 h ago"
    assert age(now() + timedelta(seconds=5)) == "now"


@pytest.mark.parametrize(
    ("variables", "at_a_terminal", "in_a_pipe"),
    [
        ({}, True, False),
        ({"TERM": "dumb"}, False, False),
        ({"NO_COLOR": "1"}, False, False),
        ({"NO_COLOR": ""}, True, False),
        ({"FORCE_COLOR": "1", "TERM": "dumb"}, True, True),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False, False),
    ],
)
def test_who_wants_colours(
    variables: dict[str, str], at_a_terminal: bool, in_a_pipe: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    master, slave = pty.openpty()
    with open(master, "wb", buffering=0), open(slave, "w") as terminal, open(os.devnull, "w") as pipe:
        assert (takes_colour(terminal), takes_colour(pipe)) == (at_a_terminal, in_a_pipe)


class TestAtATerminal:
    def test_migrations_are_counted_and_timed(self, tmp_path: Path) -> None:
        with Terminal([PROGRAM, "migrate"], self._environment(), directory=tmp_path) as terminal:
            assert terminal.end() == 0
        numbers = re.findall(r"\d\.\d\d s\x1b\[0m  Migration (\d+) of (\d+): (\d{4}), \w", terminal.said)
        count = len(list((Path(cli.__file__).parents[2] / "migrations/versions").glob("*.py")))
        assert numbers == [(str(n), str(count), f"{n:04}") for n in range(1, count + 1)]
        assert '"event"' not in terminal.said

        with Terminal([PROGRAM, "migrate"], self._environment(NO_COLOR="1"), directory=tmp_path) as again:
            assert again.end() == 0
        assert again.said.startswith("The database is up to date: ")
        assert again.said.count("\n") == 1

    def test_the_doctors_verdicts_are_coloured(self, tmp_path: Path) -> None:
        environment = self._environment(OLLAMA_BASE_URL="http://127.0.0.1:1")
        with Terminal([PROGRAM, "doctor"], environment, directory=tmp_path) as terminal:
            terminal.wait_for("\x1b[31m\x1b[1mFAIL\x1b[0m  Redis: ")
            terminal.wait_for("Checking: Worker")  # which takes its time where there is no broker
            terminal.type(CTRL_C)
            assert terminal.end() == 130
        assert "\x1b[32m\x1b[1mok\x1b[0m    Python: " in terminal.said
        assert terminal.said.endswith("\r\x1b[K\nsluicegate: interrupted\n")
        assert "\x1b[2mChecking: Redis (0 s)\x1b[0m\r\x1b[K" in terminal.said

    def test_the_help_fits_a_usual_terminal(self) -> None:
        groups = (cli.cli, cli.streams, cli.users)
        for command in (*groups, *(one for group in groups for one in group.commands.values())):
            context = click.Context(command, info_name="sluicegate", terminal_width=80)
            lines = command.get_help(context).splitlines()
            assert max(map(len, lines)) <= 80, command.name
            assert [line for line in lines if line.endswith("...") and "Usage" not in line] == [], command.name

    @staticmethod
    def _environment(**variables: str) -> dict[str, str]:
        return dict(os.environ) | variables
