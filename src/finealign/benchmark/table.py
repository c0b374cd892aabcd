"""The grid's cells as one table: Markdown, CSV and JSON, and the published rows above it.

Top-1 in percent. A figure is the mean over seeds with the standard deviation; a gain is over zero-shot with the same
descriptions, with the 95 % interval of the paired difference on the same images. Always the last epoch.
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
from finealign.evaluate import Interval, bootstrap_interval
from finealign.storage import save_text

RESAMPLES = 2000
START = "start"


@dataclass(frozen=True)
class Entry:
    """A method on a set, over its seeds; all in percent or points."""

    method: str
    dataset: str
    seeds: tuple[int, ...]
    top1: float
    deviation: float | None  # over seeds; None for one seed
    gain: Interval
    seconds: float  # of fit, mean over seeds


@dataclass(frozen=True)
class Row:
    """A method over all sets it has cells of."""

    method: str
    entries: dict[str, Entry]
    top1: float  # mean over sets
    gain: Interval  # of the mean over sets
    worst: float  # the smallest gain of a set
    seconds: float  # of fit, summed over sets


@dataclass(frozen=True)
class Table:
    """Rows by method, the start first; columns by set."""

    datasets: tuple[str, ...]
    rows: tuple[Row, ...]
    start: dict[str, float]  # zero-shot with the same descriptions, by set
    versus: dict[str, Interval]  # the first method's mean over sets less each other's, paired on the same images
    missing: tuple[str, ...]  # cells that are not done


def make_table(cells: Sequence[Cell], datasets: Sequence[str], methods: Sequence[str], seeds: Sequence[int]) -> Table:
    """Gather cells. A method that lacks a set has no mean, so that means are over the same sets; so has its row."""
    by_place = {(cell.dataset, cell.method, cell.seed): cell for cell in cells}
    found: dict[str, dict[str, list[Cell]]] = {
        method: {
            name: cells_there
            for name in datasets
            if (cells_there := [by_place[name, method, s] for s in seeds if (name, method, s) in by_place])
        }
        for method in methods
    }
    start = {
        name: 100 * next(cells[name][0].top1[START] for cells in found.values() if name in cells)
        for name in datasets
        if any(name in cells for cells in found.values())
    }
    rows = tuple(_row(method, by_set, datasets) for method, by_set in found.items() if by_set)
    first = next(iter(methods))
    versus = {
        method: _mean_interval([_difference(found[first][name], found[method][name]) for name in datasets])
        for method in methods[1:]
        if all(name in found[first] and name in found[method] for name in datasets)
    }
    missing = tuple(
        f"{name}/{method}-seed{seed}"
        for name in datasets
        for method in methods
        for seed in seeds
        if (name, method, seed) not in by_place
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
        gain=_mean_interval([_gain(cells) for cells in by_set.values()])
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
    """How often each image is right over the seeds, in percent: (n,)."""
    found: NDArray[np.float64] = 100 * np.asarray([cell.right for cell in cells], dtype=np.float64).mean(axis=0)
    return found


def _gain(cells: Sequence[Cell]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = _right(cells) - 100 * cells[0].start_right
    return found


def _difference(first: Sequence[Cell], second: Sequence[Cell]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = _right(first) - _right(second)
    return found


def _mean_interval(sets: Sequence[NDArray[np.float64]]) -> Interval:
    """The mean over sets of each set's mean, every set resampled by itself: sets are fixed, images are drawn."""
    rng = np.random.default_rng(0)
    means = np.zeros(RESAMPLES)
    for values in sets:
        distinct, counts = np.unique(values, return_counts=True)
        drawn = rng.multinomial(len(values), counts / len(values), size=RESAMPLES)
        means += drawn @ distinct / len(values) / len(sets)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(mean(float(values.mean()) for values in sets), float(low), float(high))


def markdown(table: Table) -> str:
    """The table for people, with what it leaves out said below it."""
    heads = [short(name) for name in table.datasets]
    lines = [
        f"| method | {' | '.join(heads)} | mean | gain (95 %) | worst set | minutes |",
        "|---" * (len(heads) + 5) + "|",
    ]
    known = [table.start.get(name) for name in table.datasets]
    average = "-" if None in known else f"{mean(one for one in known if one is not None):.1f}"
    cells = ["-" if one is None else f"{one:.1f}" for one in known]
    lines.append(f"| start: zero-shot, same descriptions | {' | '.join(cells)} | {average} | | | |")
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
            f"- {method}: {gap.mean:+.2f} points ({gap.low:+.1f} to {gap.high:+.1f})"
            for method, gap in table.versus.items()
        ]
    if table.missing:
        lines += ["", f"Not done: {len(table.missing)} cells, as {', '.join(table.missing[:4])}."]
    return "\n".join(lines) + "\n"


def gains(table: Table) -> str:
    """Markdown: the gain of each method on each set with its paired interval."""
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
    """Markdown: our rows under the published ones, on the sets both have."""
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
        lines.append(_published(f"**{own.method} (ours)**", {n: own.entries[n].top1 for n in own.entries}, sets))
    if not shared:
        lines += ["", "None of the grid's sets is in the published table, so no row of ours stands under it."]
    lines += ["", *(f"- {row.method}: {row.source}" for row in PUBLISHED)]
    return "\n".join(lines) + "\n"


def _published(method: str, top1: Mapping[str, float], sets: Sequence[str]) -> str:
    cells = [f"{top1[name]:.2f}" if name in top1 else "-" for name in sets]
    whole = all(name in top1 for name in sets)
    return f"| {method} | {' | '.join(cells)} | {f'{mean(top1[n] for n in sets):.2f}' if whole else '-'} |"


def as_csv(table: Table) -> str:
    """A line a method and set."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("method", "dataset", "seeds", "top1", "sd", "gain", "gain_low", "gain_high", "seconds"))
    for row in table.rows:
        for entry in row.entries.values():
            gain = (f"{value:.3f}" for value in (entry.gain.mean, entry.gain.low, entry.gain.high))
            deviation = "" if entry.deviation is None else f"{entry.deviation:.3f}"
            place = (entry.method, entry.dataset, " ".join(map(str, entry.seeds)))
            rows.writerow((*place, f"{entry.top1:.3f}", deviation, *gain, f"{entry.seconds:.1f}"))
    return text.getvalue()


def as_json(table: Table) -> dict[str, Any]:
    """Everything in the table, for a program; no NaN."""
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
        "versus": {method: _interval(gap) for method, gap in table.versus.items()},
        "missing": list(table.missing),
    }  # fmt: skip


def save_table(table: Table, folder: Path) -> None:
    """``table.md``, ``table.csv`` and ``table.json`` in the grid's folder, made anew. Raises OutputError."""
    save_text(f"{markdown(table)}\n{gains(table)}", folder / "table.md")
    save_text(as_csv(table), folder / "table.csv")
    save_text(json.dumps(as_json(table), indent=1) + "\n", folder / "table.json")


def short(name: str) -> str:
    """What a set is called in a table's head."""
    if name.startswith("path:"):
        return Path(name.removeprefix("path:")).name
    return DATA_SETS[name].title


def _figure(entry: Entry | None) -> str:
    if entry is None:
        return "-"
    return f"{entry.top1:.1f}" + (f" ± {entry.deviation:.1f}" if entry.deviation is not None else "")


def _number(value: float) -> float | None:
    return None if np.isnan(value) else value


def _interval(found: Interval) -> dict[str, float | None]:
    return {"mean": _number(found.mean), "low": _number(found.low), "high": _number(found.high)}
