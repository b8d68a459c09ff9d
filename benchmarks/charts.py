"""Draw what was measured, as SVG that is readable by day, by night and on a phone."""

from __future__ import annotations

import io
from html import escape
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.figure import Figure

from .budgets import PLACE_NAMES, verdicts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from .results import Results

WIDTH = 5.8
"""Inches: with 72 points each and letters of 12, 11 are left on a phone of 390."""
ROW = 0.26
COLOURS = {  # by day, and by night
    "ground": ("#ffffff", "#12171d"),
    "ink": ("#1b2530", "#e6edf3"),
    "quiet": ("#c5ced8", "#3b4857"),
    "blue": ("#1f5fa8", "#79b8ff"),
    "red": ("#b3261e", "#ff8a80"),
    "green": ("#1d7a46", "#6fd49b"),
    "violet": ("#7a3fa0", "#cf9bf0"),
}
SERIES = (("blue", "o"), ("red", "s"), ("green", "^"), ("violet", "D"))
FONT = 'system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif'
SETTINGS: Any = {  # its keys are typed as literals
    "svg.fonttype": "none",
    "svg.hashsalt": "asgi-uow",
    "font.family": ["DejaVu Sans"],
    "font.size": 12,
    "text.color": COLOURS["ink"][0],
    "axes.labelcolor": COLOURS["ink"][0],
    "axes.edgecolor": COLOURS["quiet"][0],
    "axes.facecolor": COLOURS["ground"][0],
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "figure.facecolor": COLOURS["ground"][0],
    "grid.color": COLOURS["quiet"][0],
    "legend.frameon": False,
    "xtick.color": COLOURS["ink"][0],
    "ytick.color": COLOURS["ink"][0],
}
FRAMEWORKS = {"asgi": "no framework", "starlette": "Starlette", "fastapi": "FastAPI"}
KINDS = {
    "untouched": "A request that touches no database",
    "select": "One SELECT",
    "insert": "One INSERT",
    "hooks": "One INSERT with three hooks",
}


def draw_all(results: Results, folder: Path) -> dict[str, str]:
    """Write a chart of everything that was measured; return names and titles."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn: dict[str, str] = {}
    with mpl.rc_context(SETTINGS):
        charts = [
            (
                "budgets",
                "Share of its budget that each number takes",
                _budgets(results),
            ),
            *(
                (f"peers-{kind}", f"{title}: {results.counted}", _peers(results, kind))
                for kind, title in KINDS.items()
            ),
            (
                "growth",
                f"{results.counted} for one more".capitalize(),
                _growth(results),
            ),
            ("throughput", "Requests per second on uvicorn", _throughput(results)),
        ]
        for name, title, figure in charts:
            file = folder / f"{name}.svg"
            file.unlink(missing_ok=True)
            if figure is not None:
                file.write_text(_svg(figure, title), "utf-8")
                drawn[name] = title
    return drawn


def _svg(figure: Figure, title: str) -> str:
    """Write the figure without date and with colours for the night."""
    buffer = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(buffer, format="svg", metadata=nothing, bbox_inches="tight")
    text = buffer.getvalue()
    night = "\n".join(
        f"    [style*='{kind}: {day}'] {{ {kind}: {dark} !important; }}"
        for day, dark in COLOURS.values()
        for kind in ("fill", "stroke")
    )
    unstyled = "    text:not([style*='fill']) { fill: #e6edf3; }"
    style = (
        f"<style>\n  text {{ font-family: {FONT} !important; }}\n"
        f"  text:not([style*='fill']) {{ fill: {COLOURS['ink'][0]}; }}\n"
        f"  @media (prefers-color-scheme: dark) {{\n{night}\n{unstyled}\n  }}\n</style>"
    )
    head, mark, rest = text.partition("<defs>")
    head = head.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ')
    lines = f"{head}{style}\n {mark}{rest}".splitlines()
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _dots(
    axes: Axes, rows: Sequence[str], series: Mapping[str, Mapping[str, float]]
) -> None:
    """Draw a line of the chart for each row, and a mark for each series."""
    for (name, values), (colour, mark) in zip(series.items(), SERIES, strict=False):
        places = [rows.index(row) for row in values]
        axes.plot(
            list(values.values()),
            places,
            mark,
            color=COLOURS[colour][0],
            label=name,
            markersize=6,
        )
    axes.set_yticks(range(len(rows)), labels=rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="y", linestyle=":")


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower left", ncols=2, bbox_to_anchor=(0.0, 1.0))


def _mark_one(axes: Axes) -> None:
    axes.axvline(1.0, color=COLOURS["ink"][0], linewidth=1)


def _figure(rows: int) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, 0.6 + ROW * rows), layout="constrained")
    return figure, figure.subplots()


def _budgets(results: Results) -> Figure | None:
    found = verdicts(results)
    if not found:
        return None
    rows = list(dict.fromkeys(each.what for each in found))
    names = {"times the time": "in time"}
    counted = f"in {results.counted}"
    series: dict[str, dict[str, float]] = {counted: {}, "in time": {}, "other": {}}
    for each in found:
        other = counted if each.unit.startswith("times") else "other"
        series[names.get(each.unit, other)][each.what] = each.value / each.budget
    figure, axes = _figure(len(rows))
    _dots(axes, [_short(row) for row in rows], _shortened(series))
    _mark_one(axes)
    axes.set_xlim(left=0.0)
    axes.set_xlabel("1 is the budget; left of it is better")
    _legend(figure, axes)
    return figure


def _shortened(
    series: Mapping[str, Mapping[str, float]],
) -> dict[str, dict[str, float]]:
    return {
        name: {_short(row): value for row, value in values.items()}
        for name, values in series.items()
        if values
    }


def _short(what: str) -> str:
    """Leave out of a row's name what a phone has no room for."""
    words = {
        "One ": "",
        "Request that touches no session, on Starlette": "no session touched",
        "Empty asynchronous after-commit hook": "one hook",
        "Parked request, more than in a no-op middleware": "memory, parked",
        "PostgreSQL (asyncpg)": "asyncpg",
        "PostgreSQL (psycopg)": "psycopg",
        "MariaDB (asyncmy)": "asyncmy",
        "SQLite (aiosqlite)": "aiosqlite",
    }
    for long, short in words.items():
        what = what.replace(long, short)
    return what


def _peers(results: Results, kind: str) -> Figure | None:
    """Draw a panel for each framework: what a contestant costs on each database."""
    panels: dict[str, dict[str, dict[str, float]]] = {}
    for each in results.costs:
        if each.question.startswith(f"peers-{kind}-"):
            series = panels.setdefault(each.question.rpartition("-")[2], {})
            name = PLACE_NAMES.get(each.place, "")
            series.setdefault(name, {})[each.contestant] = each.cost_ratio
    figure, grid = _panels(panels)
    for axes, framework in zip(grid, panels, strict=True):
        axes.set_title(f"on {FRAMEWORKS.get(framework, framework)}")
        _mark_one(axes)
    if grid:
        first = next(iter(next(iter(next(iter(panels.values())).values()))))
        grid[-1].set_xlabel(f"times the {results.counted} of: {first}")
    if grid and len(next(iter(panels.values()))) > 1:
        _legend(figure, grid[0])
    return figure if grid else None


def _panels(
    panels: Mapping[str, Mapping[str, Mapping[str, float]]],
) -> tuple[Figure, list[Axes]]:
    """Draw dots in panels that stand one above the other."""
    rows = [
        list(dict.fromkeys(row for values in series.values() for row in values))
        for series in panels.values()
    ]
    lengths = [len(each) for each in rows]
    height = sum(lengths) * ROW + 0.6 * len(rows) + 0.3
    figure = Figure(figsize=(WIDTH, max(height, 1.0)), layout="constrained")
    if not rows:
        return figure, []
    grid = figure.subplots(
        len(rows), 1, squeeze=False, sharex=True, height_ratios=lengths
    )
    found = list(grid[:, 0])
    for axes, names, series in zip(found, rows, panels.values(), strict=True):
        _dots(axes, names, series)
    return figure, found


def _growth(results: Results) -> Figure | None:
    if not results.growth:
        return None
    figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
    axes = figure.subplots()
    styles = ("-", "--", ":")
    for number, (name, costs) in enumerate(results.growth):
        colour, mark = SERIES[number % len(SERIES)]
        axes.plot(
            [int(each) for each in costs],
            [cost / int(each) for each, cost in costs.items()],
            marker=mark,
            linestyle=styles[number // len(SERIES) % len(styles)],
            color=COLOURS[colour][0],
            label=name.replace("-", " "),
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    numbers = sorted({int(each) for _, costs in results.growth for each in costs})
    shown = [each for each in numbers if str(each).strip("0") == "1"]
    axes.set_xticks(shown, labels=[f"{each:,}" for each in shown])
    axes.set_xlabel("how many there are in the request")
    axes.set_ylabel(f"{results.counted} for each")
    _legend(figure, axes)
    return figure


def _throughput(results: Results) -> Figure | None:
    if results.throughput is None:
        return None
    panels: dict[str, dict[str, dict[str, float]]] = {}
    for title, contestant, rate, *_ in results.throughput.rows:
        question, _, connections = title.rpartition(", ")
        name = connections.removesuffix("s") if connections[:2] == "1 " else connections
        series = panels.setdefault(question, {}).setdefault(name, {})
        series[contestant] = float(rate.replace(",", ""))
    figure, grid = _panels(panels)
    for axes, question in zip(grid, panels, strict=True):
        axes.set_title(question)
        axes.set_xlim(left=0.0)
    grid[-1].set_xlabel("requests per second")
    _legend(figure, grid[0])
    return figure
