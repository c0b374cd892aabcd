"""Predictions as CSV, JSON lines or Parquet, written as they come."""

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

from finealign.errors import OutputError, unknown_name
from finealign.images import display_path
from finealign.storage import row_writer
from finealign.types import Explanation, Prediction

PARQUET_ROWS = 4096


@dataclass(frozen=True)
class Row:
    """One image's best classes, the best first."""

    path: str
    labels: list[str]
    confidences: list[float]
    start: tuple[str, float] | None = None  # the best class of the model adaptation started from, if it was asked

    def as_json(self) -> dict[str, object]:
        return {"path": self.path} | _top(self.labels, self.confidences)


def best_rows(predictions: Iterable[Prediction], classes: Sequence[str], top_k: int) -> Iterator[Row]:
    """The ``top_k`` most probable classes of each prediction; ties go to the class named first."""
    for prediction in predictions:
        before = prediction.start_probabilities
        (label,), (confidence,) = _best(before, classes, 1) if before is not None else ([""], [0.0])
        start = None if before is None else (label, confidence)
        yield Row(display_path(prediction.path), *_best(prediction.probabilities, classes, top_k), start)


def explained(found: Explanation, classes: Sequence[str], top_k: int) -> dict[str, object]:
    """An explanation as JSON: the best classes, those of the start (null where unknown), and each crop's weight.

    Boxes are left, top, right, bottom in pixels of an image of ``width`` by ``height``.
    """
    start = found.start_probabilities
    return {
        **_top(*_best(found.probabilities, classes, top_k)),
        "start": None if start is None else _top(*_best(start, classes, top_k)),
        "score": found.score,
        "width": found.width,
        "height": found.height,
        "crops": [
            {"box": list(box), "weight": round(float(weight), 6)}
            for box, weight in zip(found.boxes, found.weights, strict=True)
        ],
    }


def _best(probabilities: NDArray[np.float32], classes: Sequence[str], top_k: int) -> tuple[list[str], list[float]]:
    order = np.argsort(-probabilities, kind="stable")[:top_k]
    return [classes[index] for index in order], [round(float(probabilities[index]), 6) for index in order]


def _top(labels: list[str], confidences: list[float]) -> dict[str, object]:
    top = [{"label": name, "confidence": value} for name, value in zip(labels, confidences, strict=True)]
    return {"label": labels[0], "confidence": confidences[0], "top": top}


def check_destination(path: Path, *, overwrite: bool) -> None:
    """Raises OutputError for an ending that is none of ours, or a file that is there already."""
    if path.suffix not in WRITERS:
        raise OutputError(unknown_name("ending of --out", path.suffix, WRITERS))
    if path.exists() and not overwrite:
        raise OutputError(f"{path} is there already. Use --overwrite to replace it, or another --out.")
    if path.suffix == ".parquet":
        _pyarrow()


def beside(out: Path) -> Path:
    """Where the images that could not be read are listed: ``labels.jsonl`` has ``labels.set_aside.csv`` beside it."""
    return out.with_name(f"{out.stem}.set_aside.csv")


def write_predictions(
    predictions: Iterable[Prediction], classes: Sequence[str], path: Path, *, top_k: int = 1, with_start: bool = False
) -> int:
    """Write the predictions in the format of the file's ending; how many there were. Raises OutputError.

    ``with_start``, for CSV alone: two columns more, of predictions that were made with the start.
    """
    if with_start and path.suffix != ".csv":
        raise ValueError(f"the start has columns in CSV alone, not in {path.suffix}")
    aside = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write = partial(_write_csv, with_start=True) if with_start else WRITERS[path.suffix]
        count = write(best_rows(predictions, classes, top_k), aside, min(top_k, len(classes)))
        aside.replace(path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error}. Choose another --out.") from error
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
    return count


def write_csv(rows: Iterable[Row], stream: TextIO, top_k: int, *, with_start: bool = False) -> int:
    """``path,label,confidence`` and, for more than one class a row, ``label_2,confidence_2`` and so on.

    ``with_start``: then ``start_label,start_confidence``, of the model adaptation started from.
    """
    write = row_writer(stream)
    header = ["path", "label", "confidence"]
    header += [f"{name}_{rank}" for rank in range(2, top_k + 1) for name in ("label", "confidence")]
    write(header + ["start_label", "start_confidence"] * with_start)
    count = 0
    for row in rows:
        count += 1
        best = zip(row.labels, row.confidences, strict=True)
        write([row.path, *(value for pair in best for value in pair), *((row.start or ()) * with_start)])
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
