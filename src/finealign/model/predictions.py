"""Write predictions as CSV, JSON lines or Parquet, each as soon as it is made."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from finealign.errors import OutputError, display_path, unknown_name
from finealign.model.refusal import DIGITS, NONE_OF_THESE, in_place_of_class
from finealign.runtime.atomic import row_writer
from finealign.types import Explanation, Prediction

PARQUET_ROWS = 4096


@dataclass(frozen=True)
class Row:
    """The most probable classes of one image, the best first."""

    path: str
    labels: list[str]
    confidences: list[float]
    start: tuple[str, float] | None = None  # the best class by the model before adaptation, if it was scored
    none: float | None = None  # how likely the image shows none of the classes; None if the model cannot say

    def as_json(self) -> dict[str, object]:
        """Return the row as a dictionary for JSON, without ``start``."""
        return {"path": self.path, **_top(self.labels, self.confidences), "none": self.none}


def best_rows(
    predictions: Iterable[Prediction],
    classes: Sequence[str],
    top_k: int,
    *,
    refused_from: float | None = None,
    unsure_below: float | None = None,
) -> Iterator[Row]:
    """Yield the ``top_k`` most probable classes of each prediction. Ties go to the class named first.

    Where ``none`` is at least ``refused_from``, "none of these" comes first, with ``none`` for its confidence, and then
    the classes with theirs, ``top_k`` in all. Of the others, where no class is as probable as ``unsure_below``,
    "unsure" comes first, with the confidence of the best class.
    """
    for prediction in predictions:
        by_start = prediction.start_probabilities
        (label,), (confidence,) = _best(by_start, classes, 1) if by_start is not None else ([""], [0.0])
        start = None if by_start is None else (label, confidence)
        best = _best(prediction.probabilities, classes, top_k)
        none = _rounded(prediction.none)
        if apart := in_place_of_class(prediction, refused_from, unsure_below):
            best = _behind(apart, best, none)
        yield Row(display_path(prediction.path), *best, start, none)


def explained(
    found: Explanation, classes: Sequence[str], top_k: int, *, refused_from: float | None = None
) -> dict[str, object]:
    """Return an explanation as a dictionary for JSON: the ``top_k`` best classes, and the box and weight of each crop.

    ``refused_from`` is as for ``best_rows``, and never meets the start. ``start`` has the best classes by the model
    before adaptation, or None if it was not scored. Boxes are left, top, right, bottom in pixels of an image of
    ``width`` by ``height``.
    """
    start = found.start_probabilities
    best, none = _best(found.probabilities, classes, top_k), _rounded(found.none)
    if label := in_place_of_class(found, refused_from):
        best = _behind(label, best, none)
    return {
        **_top(*best),
        "start": None if start is None else _top(*_best(start, classes, top_k)),
        "score": found.score,
        "width": found.width,
        "height": found.height,
        "crops": [
            {"box": list(box), "weight": round(float(weight), 6)}
            for box, weight in zip(found.boxes, found.weights, strict=True)
        ],
        "none": none,
    }


def _best(probabilities: NDArray[np.float32], classes: Sequence[str], top_k: int) -> tuple[list[str], list[float]]:
    order = np.argsort(-probabilities, kind="stable")[:top_k]
    return [classes[index] for index in order], [round(float(probabilities[index]), DIGITS) for index in order]


def _behind(label: str, best: tuple[list[str], list[float]], none: float | None) -> tuple[list[str], list[float]]:
    """The best classes behind a label that is none of them."""
    labels, confidences = best
    confidence = none or 0.0 if label == NONE_OF_THESE else confidences[0]
    return [label, *labels[:-1]], [confidence, *confidences[:-1]]


def _rounded(none: float | None) -> float | None:
    return None if none is None else round(none, 6)


def _top(labels: list[str], confidences: list[float]) -> dict[str, object]:
    top = [{"label": name, "confidence": value} for name, value in zip(labels, confidences, strict=True)]
    return {"label": labels[0], "confidence": confidences[0], "top": top}


def check_destination(path: Path, *, overwrite: bool) -> None:
    """Check the path of a predictions file before anything is computed.

    Raises OutputError if its suffix is not one of ``WRITERS``, if it exists and ``overwrite`` is false, or if it is a
    Parquet file and pyarrow is missing.
    """
    if path.suffix not in WRITERS:
        raise OutputError(unknown_name("ending of --out", path.suffix, WRITERS))
    if path.exists() and not overwrite:
        raise OutputError(f"{path} is there already. Use --overwrite to replace it, or another --out.")
    if path.suffix == ".parquet":
        _pyarrow()


def beside(out: Path) -> Path:
    """Return the path of the list of images that could not be read: ``labels.set_aside.csv`` for ``labels.jsonl``."""
    return out.with_name(f"{out.stem}.set_aside.csv")


def write_predictions(
    predictions: Iterable[Prediction],
    classes: Sequence[str],
    path: Path,
    *,
    top_k: int = 1,
    with_start: bool = False,
    refused_from: float | None = None,
    unsure_below: float | None = None,
) -> int:
    """Write the predictions, in the format of the file's suffix, and return how many there were.

    The file is complete or not there. ``with_start``, for CSV only, adds two columns for the model before adaptation;
    the predictions must have been made with it. ``refused_from`` and ``unsure_below`` are as for ``best_rows``.
    Raises OutputError if the file cannot be written, and ValueError if ``with_start`` is used with another format.
    """
    if with_start and path.suffix != ".csv":
        raise ValueError(f"the start has columns in CSV alone, not in {path.suffix}")
    temporary = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write = partial(_write_csv, with_start=True) if with_start else WRITERS[path.suffix]
        top_k = min(top_k, len(classes))
        rows = best_rows(predictions, classes, top_k, refused_from=refused_from, unsure_below=unsure_below)
        count = write(rows, temporary, top_k)
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error}. Choose another --out.") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    return count


def write_csv(rows: Iterable[Row], stream: TextIO, top_k: int, *, with_start: bool = False) -> int:
    """Write rows as CSV and return how many there were.

    The columns are ``path,label,confidence``, then ``label_2,confidence_2`` and so on up to ``top_k``, then, with
    ``with_start``, ``start_label,start_confidence`` for the model before adaptation, and last ``none``, which is empty
    if the model cannot say.
    """
    write = row_writer(stream)
    header = ["path", "label", "confidence"]
    header += [f"{name}_{rank}" for rank in range(2, top_k + 1) for name in ("label", "confidence")]
    if with_start:
        header += ["start_label", "start_confidence"]
    write([*header, "none"])
    count = 0
    for row in rows:
        count += 1
        best = zip(row.labels, row.confidences, strict=True)
        values = [row.path, *(value for pair in best for value in pair)]
        if with_start and row.start:
            values += row.start
        write([*values, "" if row.none is None else row.none])
    return count


def _write_csv(rows: Iterable[Row], path: Path, top_k: int, *, with_start: bool = False) -> int:
    with path.open("w", encoding="utf-8", newline="") as stream:
        return write_csv(rows, stream, top_k, with_start=with_start)


def _write_jsonl(rows: Iterable[Row], path: Path, top_k: int) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as stream:
        for row in rows:
            count += 1
            stream.write(json.dumps(row.as_json(), ensure_ascii=False) + "\n")
    return count


def _write_parquet(rows: Iterable[Row], path: Path, top_k: int) -> int:
    pyarrow, parquet = _pyarrow()
    schema = pyarrow.schema(
        [
            ("path", pyarrow.string()),
            ("label", pyarrow.string()),
            ("confidence", pyarrow.float32()),
            ("top_labels", pyarrow.list_(pyarrow.string())),
            ("top_confidences", pyarrow.list_(pyarrow.float32())),
            ("none", pyarrow.float32()),
        ]
    )
    iterator, count = iter(rows), 0
    with parquet.ParquetWriter(path, schema) as writer:
        while chunk := list(islice(iterator, PARQUET_ROWS)):
            columns = [
                [row.path for row in chunk],
                [row.labels[0] for row in chunk],
                [row.confidences[0] for row in chunk],
                [row.labels for row in chunk],
                [row.confidences for row in chunk],
                [row.none for row in chunk],
            ]
            writer.write_table(pyarrow.table(columns, schema=schema))
            count += len(chunk)
    return count


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise OutputError("Parquet needs pyarrow: pip install 'finealign[parquet]'. Or use .csv or .jsonl.") from None
    return pyarrow, pyarrow.parquet


WRITERS = {".csv": _write_csv, ".jsonl": _write_jsonl, ".parquet": _write_parquet}
