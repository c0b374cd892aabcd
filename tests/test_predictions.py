"""Predictions in files: each format read back by someone else's reader."""

import csv
import errno
import io
import itertools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finealign.errors import ConfigError, OutputError
from finealign.model import predictions as room
from finealign.model.predictions import WRITERS, best_rows, check_destination, write_csv, write_predictions
from finealign.types import Prediction

NAMES = ["Straßenköter", 'a "tame", old cat', "日本の犬"]
NOT_UTF_8 = os.fsdecode(b"caf\xe9/\xff.png")
PATHS = ["photos/a.png", "фото/é, è.png", NOT_UTF_8, "two\nlines.png"]
PROBABILITIES = [[0.2, 0.7, 0.1], [1 / 3, 0.5, 1 / 6], [0.0, 0.25, 0.75], [0.9, 0.06, 0.04]]
# What the four above must read as, worked out by hand: path, then label and confidence from the best down.
EXPECTED: list[tuple[str, list[str], list[float]]] = [
    ("photos/a.png", [NAMES[1], NAMES[0], NAMES[2]], [0.7, 0.2, 0.1]),
    ("фото/é, è.png", [NAMES[1], NAMES[0], NAMES[2]], [0.5, 0.333333, 0.166667]),
    ("caf\\xe9/\\xff.png", [NAMES[2], NAMES[1], NAMES[0]], [0.75, 0.25, 0.0]),
    ("two\nlines.png", [NAMES[0], NAMES[1], NAMES[2]], [0.9, 0.06, 0.04]),
]
NONE = [0.25, None, 0.75, 1 / 3]  # how likely each shows none of the classes; the second is of a model that cannot say
NONE_WRITTEN = [0.25, None, 0.75, 0.333333]
ENDINGS = [".csv", ".jsonl", ".parquet"]


def prediction(path: str | Path, probabilities: list[float], none: float | None = None) -> Prediction:
    values = np.array(probabilities, dtype=np.float32)
    return Prediction(Path(path), scores=np.log(values + 1e-9), probabilities=values, none=none)


def predictions() -> list[Prediction]:
    return [prediction(path, row, none) for path, row, none in zip(PATHS, PROBABILITIES, NONE, strict=True)]


def read_csv(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.reader(stream))


def read_parquet(path: Path) -> list[dict[str, Any]]:
    parquet = pytest.importorskip("pyarrow.parquet")
    rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    return rows


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.part"))


# --- round trips ------------------------------------------------------------------------------------------------------


def test_write_predictions__csv(tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder" / "labels.csv"
    assert write_predictions(predictions(), NAMES, out) == 4
    header, *rows = read_csv(out)
    assert header == ["path", "label", "confidence", "none"]
    assert [(path, label, float(confidence)) for path, label, confidence, _ in rows] == [
        (path, labels[0], confidences[0]) for path, labels, confidences in EXPECTED
    ]
    assert [row[-1] for row in rows] == ["0.25", "", "0.75", "0.333333"]
    assert not leftovers(tmp_path)


@pytest.mark.parametrize(("top_k", "kept"), [(2, 2), (3, 3), (50, 3)])
def test_write_predictions__csv_with_the_next_best(tmp_path: Path, top_k: int, kept: int) -> None:
    assert write_predictions(predictions(), NAMES, tmp_path / "labels.csv", top_k=top_k) == 4
    header, *rows = read_csv(tmp_path / "labels.csv")
    wanted = ["path", "label", "confidence", "label_2", "confidence_2", "label_3", "confidence_3"]
    assert header == [*wanted[: 1 + 2 * kept], "none"]
    for row, (path, labels, confidences) in zip(rows, EXPECTED, strict=True):
        assert row[0] == path
        assert row[1:-1:2] == labels[:kept]
        assert [float(value) for value in row[2:-1:2]] == confidences[:kept]


@pytest.mark.parametrize(("top_k", "kept"), [(1, 1), (2, 2), (50, 3)])
def test_write_predictions__jsonl(tmp_path: Path, top_k: int, kept: int) -> None:
    out = tmp_path / "labels.jsonl"
    assert write_predictions(predictions(), NAMES, out, top_k=top_k) == 4
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").removesuffix("\n").split("\n")]
    assert rows == [
        {
            "path": path,
            "label": labels[0],
            "confidence": confidences[0],
            "top": [
                {"label": label, "confidence": confidence}
                for label, confidence in zip(labels[:kept], confidences[:kept], strict=True)
            ],
            "none": none,
        }
        for (path, labels, confidences), none in zip(EXPECTED, NONE_WRITTEN, strict=True)
    ]
    assert "日本の犬" in out.read_text(encoding="utf-8")  # legible, not escaped


@pytest.mark.parametrize(("top_k", "kept"), [(1, 1), (2, 2), (50, 3)])
@pytest.mark.parametrize("rows_at_once", [1, 3, 4096])
def test_write_predictions__parquet(
    tmp_path: Path, top_k: int, kept: int, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "PARQUET_ROWS", rows_at_once)
    out = tmp_path / "labels.parquet"
    assert write_predictions(predictions(), NAMES, out, top_k=top_k) == 4
    rows = read_parquet(out)
    assert list(rows[0]) == ["path", "label", "confidence", "top_labels", "top_confidences", "none"]
    assert [row["none"] for row in rows] == pytest.approx(NONE, abs=1e-6)
    for row, (path, labels, confidences) in zip(rows, EXPECTED, strict=True):
        assert (row["path"], row["label"], row["top_labels"]) == (path, labels[0], labels[:kept])
        assert row["confidence"] == pytest.approx(confidences[0])
        assert row["top_confidences"] == pytest.approx(confidences[:kept])


def test_write_predictions__csv_of_a_path_with_a_carriage_return(tmp_path: Path) -> None:
    write_predictions([prediction("one\rfile.png", [1, 0, 0])], NAMES, tmp_path / "labels.csv")
    assert read_csv(tmp_path / "labels.csv")[1:] == [["one\rfile.png", NAMES[0], "1.0", ""]]


@pytest.mark.parametrize("ending", ENDINGS)
def test_write_predictions__none_at_all(tmp_path: Path, ending: str) -> None:
    out = tmp_path / f"labels{ending}"
    assert write_predictions([], NAMES, out, top_k=2) == 0
    if ending == ".csv":
        assert read_csv(out) == [["path", "label", "confidence", "label_2", "confidence_2", "none"]]
    elif ending == ".jsonl":
        assert out.read_bytes() == b""
    else:
        assert read_parquet(out) == []


def test_write_csv__to_a_stream_is_as_to_a_file(tmp_path: Path) -> None:
    stream = io.StringIO()
    assert write_csv(best_rows(predictions(), NAMES, 2), stream, 2) == 4
    write_predictions(predictions(), NAMES, tmp_path / "labels.csv", top_k=2)
    assert stream.getvalue().encode() == (tmp_path / "labels.csv").read_bytes()


# --- images that are refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [1, 2, 3, 50])
def test_best_rows__a_refused_image_is_none_of_these_and_then_its_classes(top_k: int) -> None:
    plain = list(best_rows(predictions(), NAMES, top_k))
    for row, usual, none in zip(
        best_rows(predictions(), NAMES, top_k, refused_from=0.75), plain, NONE_WRITTEN, strict=True
    ):
        assert row.none == none
        if none == 0.75:  # as much as is asked for is refused, too
            assert row.labels == ["none of these", *usual.labels[:-1]]
            assert row.confidences == [0.75, *usual.confidences[:-1]]
        else:
            assert row == usual


@pytest.mark.parametrize("ending", ENDINGS)
def test_write_predictions__with_refused_images(tmp_path: Path, ending: str) -> None:
    out = tmp_path / f"labels{ending}"
    assert write_predictions(predictions(), NAMES, out, top_k=50, refused_from=0.3) == 4
    if ending == ".csv":
        labels = [row[1] for row in read_csv(out)[1:]]
        assert {len(row) for row in read_csv(out)} == {8}
    elif ending == ".jsonl":
        labels = [json.loads(line)["label"] for line in out.read_text(encoding="utf-8").splitlines()]
    else:
        labels = [row["label"] for row in read_parquet(out)]
    assert labels == [NAMES[1], NAMES[1], "none of these", "none of these"]


def test_write_csv__none_is_last_after_the_start(tmp_path: Path) -> None:
    values = np.array([0.75, 0.25], dtype=np.float32)
    found = Prediction(Path("a.png"), values, values, values, values, none=0.875)
    write_predictions([found], ["robin", "wren"], tmp_path / "labels.csv", with_start=True)
    assert read_csv(tmp_path / "labels.csv") == [
        ["path", "label", "confidence", "start_label", "start_confidence", "none"],
        ["a.png", "robin", "0.75", "robin", "0.75", "0.875"],
    ]


# --- the order of a row -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("probabilities", "expected"),
    [
        ([0.25, 0.25, 0.25, 0.25], "abcd"),
        ([0.1, 0.4, 0.1, 0.4], "bdac"),
        ([0.0, 0.0, 1.0, 0.0], "cabd"),
    ],
)
def test_best_rows__ties_go_to_the_class_named_first(probabilities: list[float], expected: str) -> None:
    for top_k in (1, 2, 3, 4, 9):
        (row,) = best_rows([prediction("x.png", probabilities)], "abcd", top_k)
        assert "".join(row.labels) == expected[:top_k]
        assert row.confidences == sorted(row.confidences, reverse=True)


def test_best_rows__come_one_by_one() -> None:
    endless = (prediction(f"{number}.png", [0.5, 0.3, 0.2]) for number in itertools.count())
    assert [row.path for row in itertools.islice(best_rows(endless, NAMES, 1), 2)] == ["0.png", "1.png"]


# --- where it may be written ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["labels.txt", "labels", "labels.CSV", "labels.csv.gz"])
def test_check_destination__an_unknown_ending_lists_the_valid_ones(tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError, match=r"Unknown ending of --out '.*'.*Valid: \.csv, \.jsonl, \.parquet\."):
        check_destination(tmp_path / name, overwrite=True)


def test_check_destination__an_unknown_ending_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"Did you mean '\.jsonl'"):
        check_destination(tmp_path / "labels.jsnl", overwrite=False)


@pytest.mark.parametrize("ending", ENDINGS)
def test_check_destination__what_is_there_stays(tmp_path: Path, ending: str) -> None:
    out = tmp_path / f"labels{ending}"
    check_destination(out, overwrite=False)
    out.write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError, match=r"is there already. Use --overwrite"):
        check_destination(out, overwrite=False)
    check_destination(out, overwrite=True)
    assert out.read_text(encoding="utf-8") == "mine"


def test_check_destination__parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(OutputError, match=r"pip install 'finealign\[parquet\]'"):
        check_destination(tmp_path / "labels.parquet", overwrite=False)
    check_destination(tmp_path / "labels.csv", overwrite=False)


def test_writers__are_the_three_documented() -> None:
    assert list(WRITERS) == ENDINGS


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("place", ["a folder bears the name", "below a file"])
def test_write_predictions__a_place_that_cannot_be_written(tmp_path: Path, ending: str, place: str) -> None:
    if place == "below a file":
        (tmp_path / "file").write_text("mine", encoding="utf-8")
        out = tmp_path / "file" / f"labels{ending}"
    else:
        out = tmp_path / f"labels{ending}"
        out.mkdir()
    with pytest.raises(OutputError, match=r"cannot be written: .*Choose another --out"):
        write_predictions(predictions(), NAMES, out)
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize(
    ("failure", "raised"),
    [(OSError(errno.ENOSPC, "No space left on device"), OutputError), (ConfigError("no such score"), ConfigError)],
)
def test_write_predictions__a_failure_on_the_way(
    tmp_path: Path, ending: str, failure: Exception, raised: type[Exception]
) -> None:
    def failing() -> Iterator[Prediction]:
        yield predictions()[0]
        raise failure

    out = tmp_path / f"labels{ending}"
    out.write_text("what was there", encoding="utf-8")
    with pytest.raises(raised):
        write_predictions(failing(), NAMES, out)
    assert out.read_text(encoding="utf-8") == "what was there"
    assert not leftovers(tmp_path)
