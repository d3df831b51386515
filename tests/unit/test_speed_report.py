"""What the speed bench tells of a run: each bound from its figures, none from figures that are not there."""

from __future__ import annotations

import asyncio
import copy
import json
from pathlib import Path
from typing import Any

import pytest

from bench import speed, speed_parts, speed_report
from bench.speed_report import DIRECT, NAIVE, OURS
from bench.subjects import Subject


def summary(p50: float, p99: float, missing: int = 0) -> dict[str, float | int]:
    return {"p50": p50, "p99": p99, "n": 100, "missing": missing}


FOUND: dict[str, Any] = {
    "machine": {"cores": 2, "python": "3.11"},
    "failed": [],
    "parts": {
        "stops": {
            "streaming": {
                NAIVE: {"first token": summary(4.0, 6.0), "freed": summary(40.0, 80.0)},
                OURS: {
                    "first token": summary(12.0, 30.0),
                    "freed": summary(5.0, 13.0),
                    "answer": summary(16.0, 30.0),
                },
            },
            "queued": {OURS: {"answer": summary(10.0, 20.0)}},
        },
        "tokens": {
            "50": {
                DIRECT: {"age": summary(0.5, 1.0), "cpu": {}},
                NAIVE: {"age": summary(0.6, 2.0), "cpu": {"web": 10.0}},
                OURS: {"age": summary(3.0, 12.0), "cpu": {"web": 9.0, "worker": 6.0}},
            }
        },
        "unpaced": {"20": {NAIVE: 60_000.0, OURS: 90_000.0}, "100": {NAIVE: 60_000.0, OURS: 80_000.0}},
        "memory": {
            "0": {OURS: {"kb": {"web": 200 * 1024, "worker": 100 * 1024, "reaper": 80 * 1024, "database": 90 * 1024}}},
            "100": {
                OURS: {"kb": {"web": 40.0, "worker": 21.0, "database": 30.0}, "age": summary(1.0, 2.0), "cpu": {}},
            },
        },
    },
}


@pytest.fixture
def found() -> dict[str, Any]:
    return copy.deepcopy(FOUND)


def kept(found: dict[str, Any]) -> dict[str, tuple[float, bool]]:
    return {bound.what: (pytest.approx(bound.reached), bound.kept) for bound in speed_report.bounds(found)}


def test_each_bound_is_told_from_its_figures(found: dict[str, Any]) -> None:
    assert kept(found) == {
        "stop, streaming → freed, median": (1.25, True),
        "stop, streaming → freed, p99": (3.25, False),
        "stop, streaming → answer, median": (4.0, True),
        "first token, median": (3.0, True),
        "stops that failed": (0, True),
        "age of a token at 50 streams, beyond direct, median": (2.5, True),
        "age of a token at 50 streams, beyond direct, p99": (11.0, False),
        "CPU for 100,000 tokens at 50 streams": (1.5, True),
        "unpaced tokens a second, 20 streams": (1.5, True),
        "unpaced tokens a second, 100 streams": (4 / 3, False),
        "memory of each of 100 streams": (61.0, False),
        "memory with no stream": (300.0, True),
    }


def test_what_was_not_measured_is_not_reached(found: dict[str, Any]) -> None:
    del found["parts"]["memory"], found["parts"]["tokens"]["50"][DIRECT], found["parts"]["unpaced"]["20"][NAIVE]
    del found["parts"]["stops"]["streaming"][NAIVE]
    assert set(kept(found)) == {
        "stops that failed",
        "CPU for 100,000 tokens at 50 streams",
        "unpaced tokens a second, 100 streams",
    }
    assert kept({"parts": {}, "failed": []}) == {}


def test_a_stop_that_failed_is_counted_wherever_it_was(found: dict[str, Any]) -> None:
    found["parts"]["stops"]["queued"][OURS]["answer"]["missing"] = 2
    found["parts"]["stops"]["streaming"][OURS]["freed"] = {"p50": None, "p99": None, "n": 0, "missing": 1}
    assert kept(found)["stops that failed"] == (3, False)
    assert "stop, streaming → freed, median" not in kept(found)


def test_the_tables(found: dict[str, Any]) -> None:
    rows = speed_report.table(found).splitlines()
    assert rows[0] == f"| | {DIRECT} | {NAIVE} | {OURS} |"
    assert len({row.replace("\\|", "").count("|") for row in rows}) == 1
    assert "| stop, streaming → freed |  | 40.0 \\| 80.0 | 5.0 \\| 13.0 |" in rows
    assert "| stop, queued → answer |  |  | 10.0 \\| 20.0 |" in rows
    assert (
        "| 100 streams of 5 tokens a second: memory of each, KB |  |  | 91 (web 40, worker 21, database 30) |" in rows
    )
    bounds = speed_report.bounds_table(found).splitlines()
    assert "| stop, streaming → freed, p99 | 3.2 × | ≤ 3 × | **no** |" in bounds
    assert "| memory with no stream | 300 MB (reaper: 80 MB, database: 90 MB besides) | ≤ 350 MB | yes |" in bounds


def test_the_exit_code_names_what_is_missed(
    found: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told(found, tmp_path) == 1
    missed = [line.split(": ")[1] for line in capsys.readouterr().err.splitlines() if line.startswith("missed")]
    assert missed == [bound.what for bound in speed_report.bounds(found) if not bound.kept]

    found["parts"] = {"start": {"ready": {OURS: 10.0}}}
    assert told(found, tmp_path) == 0
    assert "| `sluicegate up`, nothing there → /readyz is 200, s | 10.0 |" in capsys.readouterr().out

    found["failed"] = [{"part": "tokens", "case": "50", "subject": OURS, "error": "TimeoutError()"}]
    assert told(found, tmp_path) == 1
    assert "not measured: tokens, 50, Sluicegate" in capsys.readouterr().err


def told(found: dict[str, Any], directory: Path) -> int:
    path = directory / "speed.json"
    path.write_text(json.dumps(found), encoding="utf-8")
    return speed_report.main([str(path)])


def test_plots_are_the_same_bytes_each_time(found: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="of the extra `bench`")
    from bench.speed_plots import draw

    first, second = (draw(found, tmp_path / name) for name in ("first", "second"))
    assert [path.name for path in first] == [
        f"performance-{name}.svg" for name in ("stops", "cpu", "unpaced", "memory")
    ]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_what_fails_hinders_no_other_and_all_is_in_the_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "speed.json"
    seen_before: list[Any] = []

    async def measured(subject: Subject) -> int:
        seen_before.append(json.loads(path.read_text(encoding="utf-8")) if path.exists() else None)
        if subject.name == NAIVE:
            raise TimeoutError
        return 7

    subjects = [Subject(name, "") for name in (DIRECT, NAIVE, OURS)]
    run = speed.Run("", subjects, speed.SHORT, speed.Record(path))
    asyncio.run(run.each("unpaced", "20", measured))

    assert [saved and saved["parts"] for saved in seen_before] == [None, *[{"unpaced": {"20": {DIRECT: 7}}}] * 2]
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["parts"] == {"unpaced": {"20": {DIRECT: 7, OURS: 7}}}
    assert [(one["part"], one["case"], one["subject"]) for one in found["failed"]] == [("unpaced", "20", NAIVE)]


def test_a_p99_of_a_hundred_is_not_the_slowest() -> None:
    seconds: list[float | None] = [number / 1000 for number in range(1, 101)]
    assert speed_parts.summary([*seconds, None]) == {"p50": 50.5, "p99": pytest.approx(99), "n": 100, "missing": 1}
