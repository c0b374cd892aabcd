"""The table of the grid, on cells made by hand: every figure against one computed here in another way."""

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from finealign.benchmark.catalogue import DPA_TABLE
from finealign.benchmark.grid import Cell
from finealign.benchmark.published import PUBLISHED
from finealign.benchmark.table import (
    Table,
    against_published,
    as_csv,
    as_json,
    gains,
    make_table,
    markdown,
    save_table,
    short,
)
from finealign.evaluate.metrics import Interval

N = {"dtd": 300, "path:/photos/birds": 120}  # images of each set
SETS, METHODS, SEEDS = tuple(N), ("fair", "wca"), (0, 1, 2)
SHARE = {"start": 0.5, "fair": 0.7, "wca": 0.55}  # of the images that are right


def letters(right: NDArray[np.bool_]) -> str:
    return "".join("01"[int(one)] for one in right)


def right(dataset: str, method: str, seed: int = 0) -> NDArray[np.bool_]:
    return np.random.default_rng([N[dataset], len(method), seed]).random(N[dataset]) < SHARE[method]


def cell(dataset: str, method: str, seed: int = 0, **changed: Any) -> Cell:
    own, start = right(dataset, method, seed), right(dataset, "start")
    by_score = {"global": ~own, "las": own, "start": start}
    values: dict[str, Any] = {
        "dataset": dataset, "method": method, "seed": seed, "score": "las",
        "top1": {score: float(one.mean()) for score, one in by_score.items()},
        "correct": {score: letters(one) for score, one in by_score.items()}, "images": 50,
        "seconds": {"fit": 30.0 + 60 * seed, "predict": 1000.0}, "epochs": 1,
        "verdict": None, "settings": {}, "versions": {},
    }  # fmt: skip
    return Cell(**values | changed)


CELLS = [cell(dataset, method, seed) for dataset in SETS for method in METHODS for seed in SEEDS]


def table_of(cells: Sequence[Cell] = CELLS, datasets: Sequence[str] = SETS, methods: Sequence[str] = METHODS) -> Table:
    return make_table(cells, datasets, methods, SEEDS)


def lines_of(text: str) -> list[list[str]]:
    """The cells of a Markdown table's lines."""
    return [[one.strip() for one in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def drawn(sets: Sequence[NDArray[np.float64]], draws: int = 4000) -> tuple[float, float]:
    """A plain bootstrap: the images of every set drawn one by one, the sets' means averaged."""
    rng = np.random.default_rng(7)
    means = [one[rng.integers(0, len(one), (draws, len(one)))].mean(axis=1) for one in sets]
    low, high = np.percentile(np.mean(means, axis=0), [2.5, 97.5])
    return float(low), float(high)


def check(found: Interval, sets: Sequence[NDArray[np.float64]]) -> None:
    """The mean exactly, the interval within what two bootstraps differ by."""
    low, high = drawn(sets)
    assert found.mean == pytest.approx(sum(float(one.mean()) for one in sets) / len(sets), abs=1e-9)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.12 * (high - low))


def points(dataset: str, method: str) -> NDArray[np.float64]:
    """How often each image is right over the seeds, in percent."""
    return np.asarray(sum(100.0 * right(dataset, method, seed) for seed in SEEDS) / len(SEEDS), dtype=np.float64)


# --- make_table -------------------------------------------------------------------------------------------------------


def test_make_table__means_and_deviations_over_seeds() -> None:
    table = table_of()
    assert [row.method for row in table.rows] == list(METHODS)
    assert (table.datasets, table.missing) == (SETS, ())
    for row in table.rows:
        for dataset in SETS:
            top1 = [100 * float(right(dataset, row.method, seed).mean()) for seed in SEEDS]
            centre = sum(top1) / 3
            entry = row.entries[dataset]
            assert (entry.method, entry.dataset, entry.seeds) == (row.method, dataset, SEEDS)
            assert entry.top1 == pytest.approx(centre)
            assert entry.deviation == pytest.approx(math.sqrt(sum((one - centre) ** 2 for one in top1) / 2))
            assert entry.seconds == pytest.approx(90)
        assert row.top1 == pytest.approx(sum(entry.top1 for entry in row.entries.values()) / 2)
        assert row.worst == pytest.approx(
            min((points(one, row.method) - 100 * right(one, "start")).mean() for one in SETS)
        )
        assert row.seconds == pytest.approx(180)
    assert table.start == pytest.approx({dataset: 100 * right(dataset, "start").mean() for dataset in SETS})


def test_make_table__gains_are_paired_with_the_start_on_the_same_images() -> None:
    for row in table_of().rows:
        differences = {dataset: points(dataset, row.method) - 100.0 * right(dataset, "start") for dataset in SETS}
        for dataset in SETS:
            check(row.entries[dataset].gain, [differences[dataset]])
        check(row.gain, list(differences.values()))  # sets weigh alike, whatever their size


def test_make_table__versus_is_the_first_method_less_each_other() -> None:
    table = table_of()
    assert list(table.versus) == ["wca"]
    check(table.versus["wca"], [points(dataset, "fair") - points(dataset, "wca") for dataset in SETS])
    assert table.versus["wca"].low > 0  # what the hand-made shares are apart by


def test_make_table__methods_that_answer_alike_differ_by_nothing() -> None:
    same = {dataset: cell(dataset, "fair").correct for dataset in SETS}
    twins = [cell(dataset, method, correct=same[dataset]) for dataset in SETS for method in METHODS]
    assert table_of(twins).versus == {"wca": Interval(0.0, 0.0, 0.0)}


def test_make_table__one_seed_has_no_deviation_and_its_own_score_counts() -> None:
    (row,) = make_table([cell("dtd", "fair", 4, score="global")], ["dtd"], ["fair"], [4]).rows
    assert row.entries["dtd"].deviation is None
    wrong = 100 * float((~right("dtd", "fair", 4)).mean())
    assert (row.entries["dtd"].top1, row.top1) == pytest.approx((wrong, wrong))
    assert row.gain.mean == pytest.approx(wrong - 100 * right("dtd", "start").mean())


def test_make_table__a_method_that_lacks_a_set_has_no_mean() -> None:
    kept = [one for one in CELLS if (one.dataset, one.method) != (SETS[1], "wca")]
    table = table_of(kept)
    fair, wca = table.rows
    assert list(wca.entries) == ["dtd"]
    assert all(map(math.isnan, (wca.top1, wca.gain.mean, wca.gain.low, wca.gain.high)))
    assert wca.worst == pytest.approx(wca.entries["dtd"].gain.mean)
    assert fair == table_of().rows[0]
    assert table.versus == {}
    assert table.missing == tuple(f"{SETS[1]}/wca-seed{seed}" for seed in SEEDS)


def test_make_table__a_method_or_seed_without_cells_is_missing_not_wrong() -> None:
    kept = [one for one in CELLS if one.method == "wca" and (one.dataset, one.seed) != ("dtd", 1)]
    table = table_of(kept)
    assert [row.method for row in table.rows] == ["wca"]
    assert table.rows[0].entries["dtd"].seeds == (0, 2)
    top1 = [100 * float(right("dtd", "wca", seed).mean()) for seed in (0, 2)]
    assert table.rows[0].entries["dtd"].top1 == pytest.approx(sum(top1) / 2)
    assert (table.versus, len(table.missing)) == ({}, 7)
    assert table.start.keys() == set(SETS)


def test_make_table__takes_only_what_was_asked_for() -> None:
    table = make_table(CELLS, ["dtd"], ["wca"], [2])
    assert [(row.method, list(row.entries)) for row in table.rows] == [("wca", ["dtd"])]
    assert table.rows[0].entries["dtd"].top1 == pytest.approx(100 * right("dtd", "wca", 2).mean())
    assert (list(table.start), table.missing, table.versus) == (["dtd"], (), {})


# --- what is written of it --------------------------------------------------------------------------------------------


def test_markdown__has_the_start_first_and_every_figure() -> None:
    table = table_of()
    head, _, start, fair, wca = lines_of(markdown(table))
    assert head == ["method", "DTD", "birds", "mean", "gain (95 %)", "worst set", "minutes"]
    averages = [table.start[dataset] for dataset in SETS]
    assert start[1:4] == [f"{one:.1f}" for one in (*averages, sum(averages) / 2)]
    for line, row in ((fair, table.rows[0]), (wca, table.rows[1])):
        figures = [f"{row.entries[one].top1:.1f} ± {row.entries[one].deviation:.1f}" for one in SETS]
        gain = f"{row.gain.mean:+.2f} ({row.gain.low:+.1f} to {row.gain.high:+.1f})"
        assert line == [row.method, *figures, f"{row.top1:.1f}", gain, f"{row.worst:+.1f}", "3.0"]
    gap = table.versus["wca"]
    assert f"- wca: {gap.mean:+.2f} points ({gap.low:+.1f} to {gap.high:+.1f})" in markdown(table).splitlines()
    assert "Not done" not in markdown(table)


def test_markdown__says_what_is_not_done_and_leaves_its_means_out() -> None:
    text = markdown(table_of([one for one in CELLS if (one.dataset, one.method) != (SETS[1], "wca")]))
    line = lines_of(text)[-1]
    assert (line[2], line[3], line[4]) == ("-", "-", "-")
    assert f"Not done: 3 cells, as {SETS[1]}/wca-seed0, " in text
    assert "nan" not in text


def test_markdown__of_nothing_done_has_no_figures() -> None:
    text = markdown(table_of([]))
    assert lines_of(text)[2][1:4] == ["-", "-", "-"]
    assert "Not done: 12 cells" in text


def test_gains__one_interval_a_method_and_set() -> None:
    table = table_of([one for one in CELLS if (one.dataset, one.method) != (SETS[1], "wca")])
    head, _, fair, wca = lines_of(gains(table))
    assert head == ["gain", "DTD", "birds"]
    wanted = [table.rows[0].entries[one].gain for one in SETS]
    assert fair == ["fair", *(f"{one.mean:+.1f} ({one.low:+.1f} to {one.high:+.1f})" for one in wanted)]
    assert wca[2] == "-" != wca[1]


def test_as_csv__a_line_a_method_and_set() -> None:
    table = table_of([*CELLS[:3], cell(SETS[1], "wca")])
    read = list(csv.DictReader(io.StringIO(as_csv(table))))
    assert [(row["method"], row["dataset"], row["seeds"]) for row in read] == [
        ("fair", "dtd", "0 1 2"),
        ("wca", SETS[1], "0"),
    ]
    entry = table.rows[0].entries["dtd"]
    assert entry.deviation is not None
    wanted = (entry.top1, entry.deviation, entry.gain.mean, entry.gain.low, entry.gain.high, 90.0)
    columns = ("top1", "sd", "gain", "gain_low", "gain_high", "seconds")
    assert [float(read[0][one]) for one in columns] == pytest.approx(wanted, abs=5e-4)
    assert read[1]["sd"] == ""


def test_as_json__is_the_whole_table_without_nan() -> None:
    table = table_of([one for one in CELLS if (one.dataset, one.method) != (SETS[1], "wca")])
    found = json.loads(json.dumps(as_json(table), allow_nan=False))
    fair, wca = found["methods"]
    assert (found["datasets"], found["start"], found["missing"]) == (list(SETS), table.start, list(table.missing))
    assert (wca["mean"], wca["gain"]) == (None, {"mean": None, "low": None, "high": None})
    gain = table.rows[0].gain
    assert fair["gain"] == {"mean": gain.mean, "low": gain.low, "high": gain.high}
    assert (fair["mean"], fair["worst"], fair["seconds"]) == (table.rows[0].top1, table.rows[0].worst, 180)
    assert list(fair["datasets"]) == list(SETS)
    entry = table.rows[0].entries["dtd"]
    assert (fair["datasets"]["dtd"]["top1"], fair["datasets"]["dtd"]["sd"]) == (entry.top1, entry.deviation)
    assert fair["datasets"]["dtd"]["seeds"] == [0, 1, 2]
    assert as_json(table_of())["versus"]["wca"]["mean"] == table_of().versus["wca"].mean


def test_save_table__writes_all_three(tmp_path: Path) -> None:
    table = table_of()
    save_table(table, tmp_path)
    assert (tmp_path / "table.md").read_text() == markdown(table) + "\n" + gains(table)
    assert (tmp_path / "table.csv").read_text() == as_csv(table)
    assert json.loads((tmp_path / "table.json").read_text()) == as_json(table)


def test_short__a_folder_goes_by_its_last_part() -> None:
    assert [short(name) for name in ("dtd", "path:/photos/birds", "path:birds/")] == ["DTD", "birds", "birds"]


# --- the published rows -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "stated", "figures"),
    [
        ("zero-shot", 64.46, {"imagenet": 63.30, "eurosat": 43.84, "stanford_cars": 58.74, "ucf101": 64.20}),
        ("UPL", 64.05, {"imagenet": 58.22, "fgvc_aircraft": 17.07, "stanford_cars": 49.41, "cifar100": 67.41}),
        ("POUF", 64.82, {"caltech101": 94.10, "dtd": 46.10, "sun397": 60.00, "cifar10": 90.50}),
        ("LaFTer", 68.36, {"eurosat": 69.96, "food101": 82.45, "flowers102": 72.43, "oxford_pets": 84.93}),
        ("DPA", 72.29, {"imagenet": 64.64, "eurosat": 80.04, "flowers102": 75.56, "ucf101": 68.49}),
    ],
)
def test_published__rows_have_the_means_their_source_states(
    method: str, stated: float, figures: dict[str, float]
) -> None:
    (row,) = [one for one in PUBLISHED if one.method == method]
    assert list(row.top1) == list(DPA_TABLE)
    assert {name: row.top1[name] for name in figures} == figures
    assert round(sum(row.top1.values()) / 13, 2) == stated


def test_published__rows_of_other_sets() -> None:
    rows = {one.method: one.top1 for one in PUBLISHED}
    assert (rows["GTA-CLIP"]["cub200"], rows["GTA-CLIP"]["dtd"], rows["GTA-CLIP"]["sun397"]) == (60.48, 57.51, 70.14)
    assert round(sum(rows["GTA-CLIP"].values()) / 12, 2) == 69.55
    assert rows["WCA"] == {"imagenet": 66.84, "cub200": 56.91, "oxford_pets": 89.89, "dtd": 49.39, "food101": 86.40}


def test_against_published__ours_stand_below_on_the_sets_both_have() -> None:
    cells = [cell("dtd", "fair"), cell("dtd", "wca"), cell(SETS[1], "fair")]
    text = against_published(table_of(cells))
    head, _, *rows = lines_of(text)
    assert head == ["method", "DTD", "mean"]
    assert [row[0] for row in rows] == [*(one.method for one in PUBLISHED), "**fair (ours)**", "**wca (ours)**"]
    assert ["DPA", "55.69", "55.69"] in rows
    own = f"{100 * right('dtd', 'fair').mean():.2f}"
    assert rows[-2][1:] == [own, own]
    for row in PUBLISHED:
        assert f"- {row.method}: {row.source}" in text


def test_against_published__a_row_that_lacks_a_set_has_no_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(N, "cub200", 50)
    _, _, *rows = lines_of(against_published(table_of([cell("cub200", "fair")], ("dtd", "cub200"), ["fair"])))
    by_method = {row[0]: row[1:] for row in rows}
    assert by_method["DPA"] == ["55.69", "-", "-"]
    assert by_method["GTA-CLIP"] == ["57.51", "60.48", f"{(57.51 + 60.48) / 2:.2f}"]
    assert by_method["**fair (ours)**"] == ["-", f"{100 * right('cub200', 'fair').mean():.2f}", "-"]


def test_against_published__with_no_set_in_common_says_so() -> None:
    text = against_published(table_of([cell(SETS[1], "fair")], [SETS[1]]))
    head, _, *rows = lines_of(text)
    assert (head[1], head[-2], len(head)) == ("ImageNet", "UCF101", 15)
    assert {row[0]: row[-1] for row in rows}["DPA"] == "72.29"
    assert "None of the grid's sets is in the published table" in text
