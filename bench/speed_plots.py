"""Plots of what `bench/speed.py` found, as SVG: the same figures give the same bytes.

    python -m bench.speed_plots bench/results/speed.json docs/images

matplotlib, in the extra `bench`: nothing that runs, tests or checks the system needs it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from bench.speed_report import DATABASE, DIRECT, NAIVE, OURS, RESUMABLE, at

NAMES: Final = (DIRECT, NAIVE, RESUMABLE, OURS)
# Okabe and Ito's, which the colour-blind can tell apart.
COLOURS: Final = dict(zip(NAMES, ("#999999", "#e69f00", "#56b4e9", "#0072b2"), strict=True))
INKS: Final = dict(zip(NAMES, ("black", "black", "black", "white"), strict=True))
"""Of figures inside of a bar."""
SMALL: Final[Any] = {"ha": "center", "fontsize": 7}
WIDTH: Final = 0.22
"""Of a bar, where four and what is between two groups have 1."""
LEAST_MS: Final = 0.1
"""At which bars begin: so low that the shortest has room for its figure."""
SETTINGS: Final = {
    "font.family": "sans-serif",
    "font.size": 9,
    # A reader's own fonts: smaller files, and text that can be searched.
    "svg.fonttype": "none",
    # Ids are drawn by chance without it.
    "svg.hashsalt": "sluicegate",
    "axes.axisbelow": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": "#dddddd",
}
METADATA: Final = {"Date": None, "Creator": None}
Figures = Mapping[str, Any]


def draw(found: Figures, directory: Path) -> list[Path]:
    """Write `performance-*.svg` for what was measured; the paths."""
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for name, plot in PLOTS.items():
        with mpl.rc_context(SETTINGS):
            figure = Figure(figsize=(7.2, 3.6), layout="constrained", facecolor="white")
            axes = figure.add_subplot()
            if plot(axes, found):
                path = directory / f"performance-{name}.svg"
                figure.savefig(path, format="svg", metadata=METADATA)
                written.append(path)
    return written


def _stops(axes: Axes, found: Figures) -> bool:
    """Bars of medians, with a mark at the p99."""
    groups = [
        ("first token", "streaming", "first token"),
        ("stop → freed,\nstreaming", "streaming", "freed"),
        ("stop → freed,\nsilent", "silent", "freed"),
        ("stop → freed,\nbeside 50", "beside 50", "freed"),
    ]
    groups = [group for group in groups if at(found, "stops", group[1])]
    drawn = False
    for index, name in enumerate(NAMES):
        figures = [at(found, "stops", case, name, step) for _, case, step in groups]
        points = [(place, one) for place, one in enumerate(figures) if one and one["n"]]
        drawn |= bool(points)
        _bars(axes, name, [place + (index - 1.5) * WIDTH for place, _ in points], [one for _, one in points])
    axes.set_xticks(range(len(groups)), [title for title, _, _ in groups])
    axes.tick_params(axis="x", length=0)
    axes.set_yscale("log")
    axes.set_ylim(bottom=LEAST_MS)
    _finish(axes, "First token, and from a stop to the upstream's freedom", "", "ms: bars are medians, lines p99")
    return drawn


def _bars(axes: Axes, name: str, places: Sequence[float], summaries: Sequence[Figures]) -> None:
    if not places:
        return
    medians, slow = [one["p50"] for one in summaries], [one["p99"] for one in summaries]
    axes.bar(places, medians, width=WIDTH, color=COLOURS[name], label=name)
    axes.scatter(places, slow, marker="_", s=170, color="#333333", zorder=3)
    for place, median, p99 in zip(places, medians, slow, strict=True):
        inside, above = {"va": "top", "color": INKS[name]}, {"va": "bottom", "color": "#333333"}
        for value, up_points, look in ((median, -3, inside), (p99, 2, above)):
            text = f"{value:,.0f}" if value >= 10 else f"{value:.1f}"
            axes.annotate(text, (place, value), (0, up_points), textcoords="offset points", **SMALL, **look)


def _cpu(axes: Axes, found: Figures) -> bool:
    """A line for each subject and pace."""
    drawn = False
    for part, pace, style in (("tokens", 50, "-"), ("memory", 5, "--")):
        for name in NAMES:
            points = _points(found, part, name, lambda one: sum(one.get("cpu", {}).values()))
            drawn |= _line(axes, f"{name}, {pace} tokens/s", name, points, style)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    _streams(axes, "CPU for 100,000 tokens, all processes of each", "CPU seconds")
    return drawn


def _unpaced(axes: Axes, found: Figures) -> bool:
    drawn = [_line(axes, name, name, _points(found, "unpaced", name, float), "-") for name in NAMES]
    _streams(axes, "Tokens of models that speak as fast as they are listened to", "tokens a second, all streams")
    axes.set_ylim(bottom=0)
    return any(drawn)


def _memory(axes: Axes, found: Figures) -> bool:
    """Ours once with the database, which the others do not have, and once without."""
    drawn = [_line(axes, name, name, _points(found, "memory", name, _kilobytes), "-") for name in NAMES]
    own = _points(found, "memory", OURS, lambda one: _kilobytes(one, without=DATABASE))
    drawn.append(_line(axes, f"{OURS}, without its database", OURS, own, "--"))
    _streams(axes, "Memory of each stream of 5 tokens a second, beyond that with none", "KB")
    axes.set_ylim(bottom=0)
    return any(drawn)


def _kilobytes(figures: Figures, without: str = "") -> float:
    return sum(value for kind, value in figures["kb"].items() if kind != without) if "cpu" in figures else 0.0


def _points(found: Figures, part: str, name: str, value: Callable[[Any], float]) -> list[tuple[int, float]]:
    """Streams, and a figure; what is 0 was not measured."""
    cases: Iterable[tuple[str, Any]] = (at(found, part) or {}).items()
    points = [(int(case), value(subjects[name])) for case, subjects in cases if name in subjects]
    return sorted(point for point in points if point[0] and point[1])


def _line(axes: Axes, label: str, name: str, points: Sequence[tuple[int, float]], style: str) -> bool:
    if points:
        streams, values = zip(*points, strict=True)
        axes.plot(streams, values, style, marker="o", markersize=4, color=COLOURS[name], label=label)
    return bool(points)


def _streams(axes: Axes, title: str, unit: str) -> None:
    """Streams to the right, by powers of ten; only those that were measured are marked."""
    axes.set_xscale("log")
    marks = sorted({int(value) for line in axes.lines for value in line.get_xdata()})  # type: ignore[union-attr]
    axes.set_xticks(marks, [f"{mark:,}" for mark in marks])
    axes.minorticks_off()
    _finish(axes, title, "streams at the same time", unit)


def _finish(axes: Axes, title: str, below: str, unit: str) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(below)
    axes.set_ylabel(unit)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.grid(axis="y")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))


PLOTS: Final[Mapping[str, Callable[[Axes, Figures], bool]]] = {
    "stops": _stops,
    "cpu": _cpu,
    "unpaced": _unpaced,
    "memory": _memory,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("json", type=Path, help="what a run has written")
    parser.add_argument("directory", type=Path, help="performance-*.svg are written there")
    options = parser.parse_args(arguments)
    for path in draw(json.loads(options.json.read_text(encoding="utf-8")), options.directory):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
