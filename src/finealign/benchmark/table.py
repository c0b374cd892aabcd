"""The cells of a grid as one table, in Markdown, CSV and JSON, and beside published results.

Top-1 is in percent, after the last epoch, as the mean over seeds with its standard deviation. A gain is the difference
to the start (the model before adaptation) in points, with the 95 % interval of the paired difference on the same
images.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finealign.benchmark.catalogue import DATA_SETS
from finealign.benchmark.grid import Cell
from finealign.benchmark.published import BACKBONE, PUBLISHED
from finealign.evaluate.metrics import Interval, bootstrap_interval, bootstrap_mean_of_sets
from finealign.runtime.atomic import save_text

RESAMPLES = 2000
START = "start"


@dataclass(frozen=True)
class Entry:
    """The result of a method on a data set over its seeds, in percent; gains in points."""

    method: str
    dataset: str
    seeds: tuple[int, ...]
    top1: float
    deviation: float | None  # standard deviation over seeds; None for one seed
    gain: Interval
    seconds: float  # of the fit, mean over seeds


@dataclass(frozen=True)
class Row:
    """The results of a method on all data sets that it has cells of; the means are NaN where it lacks a set."""

    method: str
    entries: dict[str, Entry]  # by set
    top1: float  # mean over sets
    gain: Interval  # mean over sets
    worst: float  # the smallest gain on a set
    seconds: float  # of the fits, summed over sets


@dataclass(frozen=True)
class Table:
    """The results of a grid: one row per method, one column per data set, and the start's accuracy."""

    datasets: tuple[str, ...]
    rows: tuple[Row, ...]  # in the order of the methods
    start: dict[str, float]  # top-1 of the start, by set
    versus: dict[str, Interval]  # by other method: the first method's mean over sets less its mean, paired by image
    missing: tuple[str, ...]  # cells that are not finished, as "SET/METHOD-seedN"


def make_table(cells: Sequence[Cell], datasets: Sequence[str], methods: Sequence[str], seeds: Sequence[int]) -> Table:
    """The table of a grid's finished cells, for these data sets, methods and seeds.

    Means are given only for methods that have cells of all data sets, so that all means are over the same sets.
    """
    by_key = {(cell.dataset, cell.method, cell.seed): cell for cell in cells}
    grouped: dict[str, dict[str, list[Cell]]] = {
        method: {
            name: of_seeds
            for name in datasets
            if (of_seeds := [by_key[name, method, seed] for seed in seeds if (name, method, seed) in by_key])
        }
        for method in methods
    }
    start = {
        name: 100 * next(by_set[name][0].top1[START] for by_set in grouped.values() if name in by_set)
        for name in datasets
        if any(name in by_set for by_set in grouped.values())
    }
    rows = tuple(_row(method, by_set, datasets) for method, by_set in grouped.items() if by_set)
    first = next(iter(methods))
    versus = {
        method: bootstrap_mean_of_sets([_difference(grouped[first][name], grouped[method][name]) for name in datasets])
        for method in methods[1:]
        if all(name in grouped[first] and name in grouped[method] for name in datasets)
    }
    missing = tuple(
        f"{name}/{method}-seed{seed}"
        for name in datasets
        for method in methods
        for seed in seeds
        if (name, method, seed) not in by_key
    )
    return Table(tuple(datasets), rows, start, versus, missing)


def _row(method: str, by_set: Mapping[str, Sequence[Cell]], datasets: Sequence[str]) -> Row:
    entries = {name: _entry(method, cells) for name, cells in by_set.items()}
    whole = len(entries) == len(datasets)
    nothing = float("nan")
    return Row(
        method=method,
        entries=entries,
        top1=mean(entry.top1 for entry in entries.values()) if whole else nothing,
        gain=bootstrap_mean_of_sets([_gain(cells) for cells in by_set.values()])
        if whole
        else Interval(nothing, nothing, nothing),
        worst=min(entry.gain.mean for entry in entries.values()),
        seconds=sum(entry.seconds for entry in entries.values()),
    )


def _entry(method: str, cells: Sequence[Cell]) -> Entry:
    top1 = [100 * cell.top1[cell.score] for cell in cells]
    return Entry(
        method=method,
        dataset=cells[0].dataset,
        seeds=tuple(cell.seed for cell in cells),
        top1=mean(top1),
        deviation=stdev(top1) if len(top1) > 1 else None,
        gain=bootstrap_interval(_gain(cells), resamples=RESAMPLES),
        seconds=mean(cell.seconds["fit"] for cell in cells),
    )


def _right(cells: Sequence[Cell]) -> NDArray[np.float64]:
    """The share of seeds by which each image is labelled correctly, in percent: (n,)."""
    percent: NDArray[np.float64] = 100 * np.asarray([cell.right for cell in cells], dtype=np.float64).mean(axis=0)
    return percent


def _gain(cells: Sequence[Cell]) -> NDArray[np.float64]:
    """The gain over the start on each image, in points: (n,)."""
    points: NDArray[np.float64] = _right(cells) - 100 * cells[0].start_right
    return points


def _difference(first: Sequence[Cell], second: Sequence[Cell]) -> NDArray[np.float64]:
    points: NDArray[np.float64] = _right(first) - _right(second)
    return points


def markdown(table: Table) -> str:
    """The table as Markdown, followed by the differences between methods and the unfinished cells."""
    heads = [short(name) for name in table.datasets]
    lines = [
        f"| method | {' | '.join(heads)} | mean | gain (95 %) | worst set | minutes |",
        "|---" * (len(heads) + 5) + "|",
    ]
    known = [table.start.get(name) for name in table.datasets]
    average = "-" if None in known else f"{mean(top1 for top1 in known if top1 is not None):.1f}"
    cells = ["-" if top1 is None else f"{top1:.1f}" for top1 in known]
    lines.append(f"| start | {' | '.join(cells)} | {average} | | | |")
    for row in table.rows:
        figures = [_figure(row.entries.get(name)) for name in table.datasets]
        whole = len(row.entries) == len(table.datasets)
        gain = f"{row.gain.mean:+.2f} ({row.gain.low:+.1f} to {row.gain.high:+.1f})" if whole else "-"
        lines.append(
            f"| {row.method} | {' | '.join(figures)} | {f'{row.top1:.1f}' if whole else '-'} | {gain} "
            f"| {row.worst:+.1f} | {row.seconds / 60:.1f} |"
        )
    if table.versus and table.rows:
        first = table.rows[0].method
        lines += ["", f"{first} less each other method, mean over the sets, paired on the same images:"]
        lines += [
            f"- {method}: {difference.mean:+.2f} points ({difference.low:+.1f} to {difference.high:+.1f})"
            for method, difference in table.versus.items()
        ]
    if table.missing:
        lines += ["", f"Not done: {len(table.missing)} cells, as {', '.join(table.missing[:4])}."]
    return "\n".join(lines) + "\n"


def gains(table: Table) -> str:
    """A Markdown table of each method's gain on each data set, in points, with its paired interval."""
    heads = [short(name) for name in table.datasets]
    lines = [f"| gain | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for row in table.rows:
        cells = [
            "-" if (entry := row.entries.get(name)) is None
            else f"{entry.gain.mean:+.1f} ({entry.gain.low:+.1f} to {entry.gain.high:+.1f})"
            for name in table.datasets
        ]  # fmt: skip
        lines.append(f"| {row.method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def against_published(table: Table) -> str:
    """A Markdown table of the published rows and, below them, the grid's, on the grid's data sets in the catalogue.

    Where the catalogue has none of the grid's sets, the columns are the 13 sets of DPA's table.
    """
    shared = [name for name in table.datasets if name in DATA_SETS]
    sets = shared or list(DATA_SETS)[:13]
    lines = [
        f"Published for {BACKBONE}; ours below, whatever its backbone. Sources and what sets them apart are beneath.",
        "",
        f"| method | {' | '.join(DATA_SETS[name].title for name in sets)} | mean |",
        "|---" * (len(sets) + 2) + "|",
    ]
    for row in PUBLISHED:
        lines.append(_published(row.method, row.top1, sets))
    for own in table.rows:
        lines.append(_published(f"**{own.method} (ours)**", {key: own.entries[key].top1 for key in own.entries}, sets))
    if not shared:
        lines += ["", "None of the grid's sets is in the published table, so no row of ours stands under it."]
    lines += ["", *(f"- {row.method}: {row.source}" for row in PUBLISHED)]
    return "\n".join(lines) + "\n"


def _published(method: str, top1: Mapping[str, float], sets: Sequence[str]) -> str:
    cells = [f"{top1[name]:.2f}" if name in top1 else "-" for name in sets]
    whole = all(name in top1 for name in sets)
    return f"| {method} | {' | '.join(cells)} | {f'{mean(top1[name] for name in sets):.2f}' if whole else '-'} |"


def as_csv(table: Table) -> str:
    """The table as CSV, one line per method and data set; figures in percent or points, as in ``Entry``."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("method", "dataset", "seeds", "top1", "sd", "gain", "gain_low", "gain_high", "seconds"))
    for row in table.rows:
        for entry in row.entries.values():
            gain = (f"{value:.3f}" for value in (entry.gain.mean, entry.gain.low, entry.gain.high))
            deviation = "" if entry.deviation is None else f"{entry.deviation:.3f}"
            key = (entry.method, entry.dataset, " ".join(map(str, entry.seeds)))
            rows.writerow((*key, f"{entry.top1:.3f}", deviation, *gain, f"{entry.seconds:.1f}"))
    return text.getvalue()


def as_json(table: Table) -> dict[str, Any]:
    """The whole table as JSON values; NaN becomes null."""
    return {
        "datasets": list(table.datasets),
        "start": table.start,
        "methods": [
            {
                "method": row.method,
                "mean": _number(row.top1),
                "gain": _interval(row.gain),
                "worst": row.worst,
                "seconds": row.seconds,
                "datasets": {
                    name: {
                        "top1": entry.top1, "sd": entry.deviation, "gain": _interval(entry.gain),
                        "seeds": list(entry.seeds), "seconds": entry.seconds,
                    }
                    for name, entry in row.entries.items()
                },
            }
            for row in table.rows
        ],
        "versus": {method: _interval(difference) for method, difference in table.versus.items()},
        "missing": list(table.missing),
    }  # fmt: skip


def save_table(table: Table, folder: Path) -> None:
    """Write ``table.md``, ``table.csv`` and ``table.json`` to ``folder``, replacing old ones. Raises OutputError."""
    save_text(f"{markdown(table)}\n{gains(table)}", folder / "table.md")
    save_text(as_csv(table), folder / "table.csv")
    save_text(json.dumps(as_json(table), indent=1) + "\n", folder / "table.json")


def short(name: str) -> str:
    """A data set's name in the head of a table: its title, or the last part of DIR for ``path:DIR``."""
    if name.startswith("path:"):
        return Path(name.removeprefix("path:")).name
    return DATA_SETS[name].title


def _figure(entry: Entry | None) -> str:
    if entry is None:
        return "-"
    return f"{entry.top1:.1f}" + (f" ± {entry.deviation:.1f}" if entry.deviation is not None else "")


def _number(value: float) -> float | None:
    return None if np.isnan(value) else value


def _interval(interval: Interval) -> dict[str, float | None]:
    return {"mean": _number(interval.mean), "low": _number(interval.low), "high": _number(interval.high)}
