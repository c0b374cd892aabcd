"""The table of the 13 sets beside the published rows, from a machine that has the weights, the data and a GPU.

Zero-shot accuracy is checked first (``zero_shot.py``), then a grid is run (``grid.py``), and what comes out is a
result: a JSON file and a page, which say on what and with what they were made, to be sent to ``docs/results``. All of
it lies in one folder, and what is done there is not done again.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finealign.benchmark.catalogue import DATA_SETS, DPA_TABLE, LabelledSet, load_set
from finealign.benchmark.grid import Cell, Grid, begin_or_resume, check_methods, claims, run_grid
from finealign.benchmark.table import Table, against_published, as_json, gains, make_table, markdown
from finealign.benchmark.zero_shot import FOLDER, TOLERANCE, Checked, check_zero_shot, how_to_wait, known_of
from finealign.config import without_folder
from finealign.errors import FinealignError, ImageInputError, OutputError, unknown_name
from finealign.runtime.atomic import save_text
from finealign.runtime.progress import Progress

METHODS = ("fair", "fair@reconstruction", "dpa", "cupl")
SEEDS = (0, 1, 2)
GRID, SEND = "grid", "send"  # folders under --out, beside that of the check
RESULT_FORMAT = 1


@dataclass(frozen=True)
class Reproduction:
    """What came of it: the check, and, where the grid was run, its table and the result to be sent."""

    checked: tuple[Checked, ...]
    result: dict[str, Any] | None = None
    page: str = ""  # the result in Markdown
    saved: tuple[Path, ...] = ()
    waiting: str = ""  # what to do about cells that other processes run; empty where there are none


class OutOfToleranceError(FinealignError):
    """Zero-shot accuracy is not what is known of the backbone, so that other figures would not compare."""


def reproduce(
    grid: Grid,
    *,
    check_only: bool = False,
    anyway: bool = False,
    progress: Progress | None = None,
    on_checked: Callable[[Sequence[Checked]], None] = lambda checked: None,
    on_cell: Callable[[Cell], None] = lambda cell: None,
) -> Reproduction:
    """Check zero-shot accuracy, run the grid, and write the result under ``grid.out``.

    ``check_only`` stops after the check, for which only its own sets have to be there. ``anyway`` goes on where the
    check is out of tolerance. ``on_checked`` is called with what the check found, ``on_cell`` with each cell that is
    run. The result is written when no cell is missing; cells that other processes are running are.

    Raises FinealignError before anything is run for an unknown data set or method, settings that are not valid, sets
    that are not on disk, all of them in one message, or a folder that holds something else. Raises
    OutOfToleranceError after the check.
    """
    for name in grid.datasets:
        if name not in DPA_TABLE:
            told = unknown_name("data set", name, DPA_TABLE)
            raise FinealignError(f"{told} Other sets are for finealign benchmark.")
    check_methods(grid)
    _refuse_foreign(grid.out)
    needed = [one.dataset for one in known_of(grid.backbone, grid.datasets)] if check_only else grid.datasets
    sets = load_sets(needed, grid.data_root, download=grid.download)
    main = replace(grid, out=grid.out / GRID)
    if not check_only:
        begin_or_resume(main)
    checked = check_zero_shot(grid, sets, progress=progress, on_cell=on_cell)
    on_checked(checked)
    out = [one for one in checked if not one.within]
    if out and not anyway:
        raise OutOfToleranceError(_out_of_tolerance(out, check_only=check_only))
    if check_only:
        return Reproduction(tuple(checked))
    cells = run_grid(main, sets=sets, progress=progress, on_cell=on_cell)
    table = make_table(cells, grid.datasets, grid.methods, grid.seeds)
    result = result_of(grid, sets, checked, cells, table)
    page = result_page(result, table)
    if table.missing:
        waiting = how_to_wait(len(table.missing), claims(main))
        return Reproduction(tuple(checked), result, page, waiting=waiting)
    return Reproduction(tuple(checked), result, page, _save(result, page, grid.out / SEND, _file_name(result)))


def load_sets(names: Sequence[str], root: Path, *, download: bool = False) -> dict[str, LabelledSet]:
    """The data sets of the catalogue by name.

    Raises ImageInputError where some cannot be loaded, with all of them and the names of those that can be.
    """
    sets: dict[str, LabelledSet] = {}
    problems: list[str] = []
    for name in names:
        try:
            sets[name] = load_set(name, root, download=download)
        except FinealignError as error:
            problems.append(f"{name}: {error}")
    if problems:
        rest = f"Without them: --datasets {','.join(sets)}." if sets else f"None of the sets is under {root}."
        raise ImageInputError("\n".join([f"{len(problems)} of {len(names)} data sets cannot be had.", *problems, rest]))
    return sets


def _refuse_foreign(out: Path) -> None:
    """Raise OutputError where the folder holds something that is not of an earlier such run."""
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if names - {GRID, SEND, FOLDER}:
        raise OutputError(f"{out} is not empty and holds no such run. Choose another --out.")


def _out_of_tolerance(out: Sequence[Checked], *, check_only: bool) -> str:
    sets = "1 data set" if len(out) == 1 else f"{len(out)} data sets"
    lines = [f"Zero-shot accuracy is more than {TOLERANCE:g} point from what is known on {sets}."]
    lines += [f"{one.dataset}: {one.found:.1f}, known {one.known:.1f}. {one.advice}" for one in out]
    return "\n".join(
        lines if check_only else [*lines, "To run the rest nevertheless, add --anyway; the result says so."]
    )


# --- the result -------------------------------------------------------------------------------------------------------


def result_of(
    grid: Grid, sets: Mapping[str, LabelledSet], checked: Sequence[Checked], cells: Sequence[Cell], table: Table
) -> dict[str, Any]:
    """The result as JSON values: what was run, on what, with what, the check and the table. No path of this machine."""
    return {
        "format": RESULT_FORMAT,
        "backbone": without_folder(grid.backbone),
        "methods": list(grid.methods),
        "seeds": list(grid.seeds),
        "settings": _that_matter(grid.settings),
        "hardware": _counted(cell.hardware for cell in cells),
        "weights": _counted(cell.weights for cell in cells),
        "versions": _counted(cell.versions for cell in cells),
        "images": {
            name: {"unlabelled": len(task.unlabelled), "test": len(task.test.paths), "described": task.described}
            for name, task in sets.items()
        },
        "check": [one.as_json() for one in checked],
        "table": as_json(table),
    }


def _that_matter(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without where and how much is cached, which changes no result and may be a path of this machine."""
    data = {name: value for name, value in settings.get("data", {}).items() if not name.startswith("cache")}
    rest = {name: value for name, value in settings.items() if name != "data"}
    return {**rest, **({"data": data} if data else {})}


def _counted(records: Iterable[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Each distinct record with the number of ``cells`` that have it, the most frequent first."""
    counts = Counter(json.dumps(record, sort_keys=True) for record in records)
    return [{**json.loads(record), "cells": count} for record, count in counts.most_common()]


def result_page(result: Mapping[str, Any], table: Table) -> str:
    """The result as Markdown."""
    settings = json.dumps(result["settings"], sort_keys=True) if result["settings"] else "the defaults of each method"
    bare = [DATA_SETS[name].title for name, of in result["images"].items() if not of["described"]]
    lines = [
        f"# {', '.join(result['methods'])} on {len(table.datasets)} sets, {result['backbone']}",
        "",
        f"Top-1 in percent after the last epoch, mean of seeds {', '.join(map(str, result['seeds']))}; settings: "
        f"{settings}. Made by `finealign reproduce`.",
        "",
        *(f"- hardware: {_in_words(record)}" for record in result["hardware"]),
        *(f"- weights: {_in_words(record)}" for record in result["weights"]),
        *(f"- versions: {_in_words(record)}" for record in result["versions"]),
    ]
    if bare:
        lines.append(f"- no descriptions ship for {', '.join(bare)}: filled-in templates stand in for them")
    return "\n".join(
        [
            *lines,
            "",
            "## Zero-shot",
            "",
            check_table(result["check"]),
            "## Beside what is published",
            "",
            against_published(table),
            "The paper of FAIR (arXiv 2507.09615) states a gain of 2.78 points over the best other method, on average "
            "over 13 sets; its rows by set are not among these.",
            "",
            "## By seeds, against the start",
            "",
            markdown(table),
            gains(table),
        ]
    )


def check_table(checked: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of the check, with what was said of sets that are out of tolerance."""
    if not checked:
        return "Not checked: no zero-shot accuracy is known of this backbone on these sets.\n"
    lines = ["| set | known | here | test images | within a point |", "|---" * 5 + "|"]
    for one in checked:
        images = f"{one['images']}" + (
            "" if one["images"] == one["known_images"] else f" (known: {one['known_images']})"
        )
        within = "yes" if one["within"] else "no"
        lines.append(
            f"| {DATA_SETS[one['dataset']].title} | {one['known']:.1f} | {one['found']:.1f} | {images} | {within} |"
        )
    lines += ["", *(f"- {DATA_SETS[one['dataset']].title}: {one['advice']}" for one in checked if one["advice"])]
    return "\n".join(lines).rstrip("\n") + "\n"


def _in_words(record: Mapping[str, Any]) -> str:
    facts = ", ".join(f"{name} {value}" for name, value in record.items() if name != "cells") or "not recorded"
    return f"{facts} ({record['cells']} cells)"


def _file_name(result: Mapping[str, Any]) -> str:
    """A name for the result's files, of the backbone and of what most of it was run on."""
    device = next((record.get("device", "") for record in result["hardware"]), "")
    return re.sub(r"[^a-z0-9]+", "-", f"{result['backbone']} {device}".casefold()).strip("-")


def _save(result: Mapping[str, Any], page: str, folder: Path, name: str) -> tuple[Path, ...]:
    paths = (folder / f"{name}.md", folder / f"{name}.json")
    save_text(page, paths[0])
    save_text(json.dumps(result, indent=1) + "\n", paths[1])
    return paths
