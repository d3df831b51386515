"""The Procfile, as `sluicegate up` and anyone who runs a line by hand read it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from webapp.cli.procfile import find_procfile, read_procfile
from webapp.errors import ConfigurationError


def read(tmp_path: Path, text: str) -> dict[str, list[str]]:
    path = tmp_path / "Procfile"
    path.write_text(text)
    return read_procfile(path)


def test_ours_names_every_part_and_no_worker_node() -> None:
    commands = read_procfile(find_procfile())
    assert list(commands) == ["release", "web", "worker", "reaper", "beat", "flower"]
    assert "-n" not in commands["worker"]


def test_every_line_of_ours_runs_without_a_shell() -> None:
    for line in find_procfile().read_text().splitlines():
        assert not set(line) & set("$|&;<>*?`\"'\\~"), line


def test_our_programs_are_those_of_this_installation() -> None:
    for command in read_procfile(find_procfile()).values():
        assert Path(command[0]).is_absolute()
        assert Path(command[0]).parent == Path(sys.executable).parent


def test_comments_blank_lines_and_quotes_are_understood(tmp_path: Path) -> None:
    commands = read(tmp_path, "# a comment\n\n  one :  run 'two words' \nother-1: x:y\n")
    assert commands == {"one": ["run", "two words"], "other-1": ["x:y"]}


@pytest.mark.parametrize("text", ["web\n", "web:\n", "a b: c\n", "web: x\nweb: y\n"])
def test_a_bad_line_is_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"Procfile, line [12]"):
        read(tmp_path, text)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="Procfile: No such file"):
        read_procfile(tmp_path / "Procfile")
