"""Label images on many machines with Ray Data: a callable class for its ``map_batches``.

Ray itself is not imported here: it calls ``Predictor`` with a batch and takes what that returns.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finealign.classifier import FineAlign
from finealign.errors import ConfigError, ImageInputError, first_few, unknown_name
from finealign.model.predictions import Row, best_rows
from finealign.model.refusal import cutoff, least_confidence
from finealign.types import ClassPrior, Prediction, Reject, Score, SetAside, Use, WantedPrecision

__all__ = ["Predictor"]

COLUMNS = ("bytes", "path")  # that Ray's ``read_binary_files`` gives; the first that a batch has is read
NO_FILE = "an address, not a file that this machine has; read its bytes with ray.data.read_binary_files"


class Predictor:
    """Classifies the images of a batch. Each of Ray's actors makes one, which loads the model once.

        images = ray.data.read_binary_files("s3://bucket/photos", include_paths=True)
        labels = images.map_batches(Predictor, fn_constructor_args=["/models/birds"], concurrency=4, batch_size=64)

    A batch is a mapping of columns, which is ``map_batches``' default, ``batch_format="numpy"``. Of an image it has the
    bytes of its file, its pixels, or the path of a file that the actor's machine has. What comes back has as many rows
    in the same order, with the same columns but for bytes and pixels, and with

    - ``label``, a class name, and ``confidence``, its probability, then ``label_2``, ``confidence_2`` and so on up to
      ``top_k``;
    - ``none``, how likely the image shows none of the classes; NaN where the model cannot say;
    - ``reason``, why the image cannot be read, and otherwise empty. Such an image has an empty label, and NaN for
      numbers.

    A batch that Ray runs again, because a machine was lost, gives the same rows: there is no state but the model.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        column: str | None = None,
        top_k: int = 1,
        use: Use | None = None,
        class_prior: ClassPrior | None = None,
        score: Score | None = None,
        reject: Reject | None = None,
        min_confidence: float | None = None,
        device: str = "auto",
        precision: WantedPrecision = "auto",
    ) -> None:
        """Load the model from a run folder or its ``model/``, which every machine has to see under this path.

        ``column`` has the images; by default it is ``bytes`` or, where there is none, ``path``. ``reject`` and
        ``min_confidence`` are those of ``FineAlign.predict``, ``use``, ``class_prior``, ``device`` and ``precision``
        those of ``FineAlign.load``. Raises ConfigError, ModelError or BackboneError, also where ``FineAlign.predict``
        would for ``score``, ``reject`` or ``min_confidence``.
        """
        if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
            raise ConfigError(f"top_k: found {top_k!r:.100}. Valid: the number of classes a row, from 1.")
        self.model = FineAlign.load(model, use=use, class_prior=class_prior, device=device, precision=precision)
        self.column = column
        self.top_k = min(top_k, len(self.model.classes_))
        self.score = self.model.predictor_.choose_score(score)
        self.refused_from = cutoff(self.model.model_, reject)
        self.unsure_below = least_confidence(self.model.model_, min_confidence)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch with its labels, as the class says. An empty batch gets the columns and no rows.

        Raises ImageInputError where the batch has no column of images, or a column of a name that is to be written.
        """
        column = self._column_of(batch)
        images: list[Any] = list(batch[column])
        told = self._columns(self._rows(images))
        # Images would come out again, thousands of times as large as what is said of them; paths and the rest are kept.
        named = all(item is None or isinstance(item, str) for item in images)
        kept = {name: values for name, values in batch.items() if name != column or named}
        if clash := [name for name in told if name in kept]:
            raise ImageInputError(
                f"The images' table has the column {clash[0]!r}, which the labels are to be written to. Rename it "
                "before, as with Dataset.rename_columns."
            )
        return kept | told

    def _column_of(self, batch: Mapping[str, Any]) -> str:
        if not isinstance(batch, Mapping):
            raise ImageInputError(
                f"Found a batch that is a {type(batch).__name__}, wanted columns by their names. Leave map_batches' "
                'batch_format out, or use batch_format="numpy".'
            )
        if self.column is not None:
            if self.column not in batch:
                raise ImageInputError(unknown_name("column", self.column, batch))
            return self.column
        for name in COLUMNS:
            if name in batch:
                return name
        raise ImageInputError(
            f"Found the columns {first_few(map(str, batch), len(batch), 8)}, none of them {' or '.join(COLUMNS)}. Say "
            "with column=NAME which has the images' bytes or paths."
        )

    def _rows(self, images: Sequence[Any]) -> Iterator[Row | SetAside]:
        """The row of each image, or why there is none, in their order."""
        outcomes = self.model.iter_predictions((_image(item) for item in images), score=self.score)
        names = self.model.texts_.classes
        for item, outcome in zip(images, outcomes, strict=True):
            if isinstance(outcome, Prediction):
                yield from best_rows(
                    [outcome], names, self.top_k, refused_from=self.refused_from, unsure_below=self.unsure_below
                )
            else:
                yield SetAside(outcome.path, NO_FILE) if _is_address(item) else outcome

    def _columns(self, rows: Iterator[Row | SetAside]) -> dict[str, NDArray[Any]]:
        """The columns that the rows are told in."""
        told = list(rows)
        labels, confidences = [""] * self.top_k, [np.nan] * self.top_k
        best = [(row.labels, row.confidences) if isinstance(row, Row) else (labels, confidences) for row in told]
        none = [row.none if isinstance(row, Row) and row.none is not None else np.nan for row in told]
        columns: dict[str, NDArray[Any]] = {}
        for rank in range(self.top_k):
            more = f"_{rank + 1}" if rank else ""
            columns[f"label{more}"] = np.array([names[rank] for names, _ in best], dtype=object)
            columns[f"confidence{more}"] = np.array([values[rank] for _, values in best], dtype=np.float32)
        columns["none"] = np.array(none, dtype=np.float32)
        reasons = ["" if isinstance(row, Row) else row.reason for row in told]
        return columns | {"reason": np.array(reasons, dtype=object)}


def _image(item: Any) -> Any:
    """The bytes, the pixels or the path of an image, as ``FineAlign`` takes them."""
    if isinstance(item, str):
        return Path(item)
    return bytes(item) if isinstance(item, memoryview) else item


def _is_address(item: Any) -> bool:
    return isinstance(item, str) and "://" in item and not Path(item).exists()
