"""Example images for the report: those whose label adaptation changed, those the model is least sure of, and those that
seem to show none of the classes, which are counted as well.
"""

import heapq
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from finealign.classifier import FineAlign
from finealign.errors import display_path
from finealign.images.decoding import read_image
from finealign.images.files import ImageReadError
from finealign.model.predictions import explained
from finealign.model.refusal import LIKELY
from finealign.run.contract import EXAMPLES_LIST
from finealign.runtime.atomic import make_folder, save_bytes, save_text
from finealign.types import ImagePath, Prediction

EACH = 12  # most images of each kind
SIDE = 360  # pixels on the longer side of a saved picture
QUALITY = 82  # JPEG quality of a saved picture
TOP = 3  # classes listed for an image


@dataclass(frozen=True)
class Strangers:
    """What the images that seem to show none of the classes amount to."""

    share: float  # the estimated share of them, the mean of ``Prediction.none``
    likely: int  # images that likelier show none of the classes than one


@dataclass
class Watch:
    """Selects example images from a stream of predictions, at most EACH of each kind.

    ``changed`` are images whose label differs from the start's, ranked by half the sum of the absolute changes in
    probability, largest first. ``unsure`` are those whose two most probable classes are closest in probability.
    ``strangers`` are those likeliest to show none of the classes, of those that likelier do than not.
    """

    _changed: list[tuple[float, int, ImagePath]] = field(default_factory=list)
    _unsure: list[tuple[float, int, ImagePath]] = field(default_factory=list)
    _strangers: list[tuple[float, int, ImagePath]] = field(default_factory=list)
    _likely: int = 0
    _judged: int = 0  # images of which the model can say whether they show none of the classes
    _none_sum: float = 0.0
    blanks: int = 0  # images that are all but black or white
    first_blank: str = ""

    def over(self, predictions: Iterable[Prediction]) -> Iterator[Prediction]:
        """Record the predictions while passing them on unchanged.

        Without the start's probabilities in them, no image counts as changed.
        """
        for index, prediction in enumerate(predictions):
            if prediction.blank:
                self.blanks += 1
                self.first_blank = self.first_blank or display_path(prediction.path)
            now, before = prediction.probabilities, prediction.start_probabilities
            if before is not None and now.argmax() != before.argmax():
                self._keep(self._changed, float(np.abs(now - before).sum()) / 2, index, prediction.path)
            second, first = np.partition(now, -2)[-2:]
            self._keep(self._unsure, float(second - first), index, prediction.path)
            if prediction.none is not None:
                self._none_sum += prediction.none
                self._judged += 1
                if prediction.none >= LIKELY:
                    self._likely += 1
                    self._keep(self._strangers, prediction.none, index, prediction.path)
            yield prediction

    @staticmethod
    def _keep(heap: list[tuple[float, int, ImagePath]], value: float, index: int, path: ImagePath) -> None:
        heapq.heappush(heap, (value, -index, path))  # negative: of equal values the earlier image is kept
        if len(heap) > EACH:
            heapq.heappop(heap)

    @property
    def chosen(self) -> dict[str, list[ImagePath]]:
        """The selected paths by kind, "changed", "unsure" and "strangers": the most changed, least sure and least like
        any of the classes first.
        """
        kinds = {"changed": self._changed, "unsure": self._unsure, "strangers": self._strangers}
        return {kind: [path for _, _, path in sorted(heap, reverse=True)] for kind, heap in kinds.items()}

    @property
    def strangers(self) -> Strangers | None:
        """How many images seem to show none of the classes; None if the model cannot say of any."""
        return Strangers(share=self._none_sum / self._judged, likely=self._likely) if self._judged else None


def write_examples(model: FineAlign, chosen: dict[str, list[ImagePath]], folder: Path) -> None:
    """Write a small picture of each chosen image, and ``examples.json`` with its crops, their weights and its classes.

    ``chosen`` has the paths by kind, as ``Watch.chosen`` gives them. An image that can no longer be read is left out.
    Raises OutputError.
    """
    make_folder(folder)
    for old in folder.glob("[0-9][0-9].jpg"):  # left by an earlier attempt at this run
        old.unlink(missing_ok=True)
    pictures: dict[ImagePath, dict[str, Any] | None] = {}
    for path in (path for paths in chosen.values() for path in paths):
        if path not in pictures:
            pictures[path] = _example(model, path, folder / f"{len(pictures):02d}.jpg")
    listed = {kind: _there([pictures[path] for path in paths]) for kind, paths in chosen.items()}
    save_text(json.dumps(listed, indent=1, ensure_ascii=False) + "\n", folder / EXAMPLES_LIST)


def _example(model: FineAlign, path: ImagePath, picture: Path) -> dict[str, Any] | None:
    try:
        settings = model.model_.inference
        image = read_image(path, max_pixels=settings.max_pixels, white_value=settings.white_value)
    except ImageReadError:
        return None
    predictor = model.predictor_
    (explanation,) = predictor.explain([predictor.to_photo(image)], with_start=True)
    image.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC, reducing_gap=3.0)
    encoded = BytesIO()
    image.save(encoded, "JPEG", quality=QUALITY)
    save_bytes(encoded.getvalue(), picture)
    return {"path": display_path(path), "picture": picture.name, **explained(explanation, model.texts_.classes, TOP)}


def _there(examples: Sequence[dict[str, Any] | None]) -> list[dict[str, Any]]:
    return [example for example in examples if example is not None]
