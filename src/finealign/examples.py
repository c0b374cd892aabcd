"""The images worth a look: those that adaptation changed most and those the model is least sure of."""

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
from finealign.images import ImageReadError, display_path, read_image
from finealign.layout import EXAMPLES_LIST
from finealign.predictions import explained
from finealign.storage import make_folder, save_bytes, save_text
from finealign.types import Prediction

EACH = 12  # images of a kind
SIDE = 360  # pixels of a kept picture's longer side
QUALITY = 82  # of its JPEG
TOP = 3  # classes told of an image


@dataclass
class Watch:
    """Looks at predictions as they pass and remembers the paths worth a look, EACH of a kind.

    ``changed`` are images whose label is not the start's, by half the sum of the changes of probability, the largest
    first; ``unsure`` those whose best two classes are nearest to one another.
    """

    _changed: list[tuple[float, int, Path]] = field(default_factory=list)
    _unsure: list[tuple[float, int, Path]] = field(default_factory=list)

    def over(self, predictions: Iterable[Prediction]) -> Iterator[Prediction]:
        """The same predictions, which have to have been made with the start."""
        for place, found in enumerate(predictions):
            now, before = found.probabilities, found.start_probabilities
            if before is not None and now.argmax() != before.argmax():
                self._keep(self._changed, float(np.abs(now - before).sum()) / 2, place, found.path)
            second, first = np.partition(now, -2)[-2:]
            self._keep(self._unsure, float(second - first), place, found.path)
            yield found

    @staticmethod
    def _keep(heap: list[tuple[float, int, Path]], value: float, place: int, path: Path) -> None:
        heapq.heappush(heap, (value, -place, path))  # of equals the first in order stays
        if len(heap) > EACH:
            heapq.heappop(heap)

    @property
    def chosen(self) -> dict[str, list[Path]]:
        """The paths of each kind, the most telling first."""
        kinds = {"changed": self._changed, "unsure": self._unsure}
        return {kind: [path for _, _, path in sorted(heap, reverse=True)] for kind, heap in kinds.items()}


def write_examples(model: FineAlign, chosen: dict[str, list[Path]], folder: Path) -> None:
    """A small picture of each image, and in ``examples.json`` what the model looks at in it and makes of it.

    An image that cannot be read any more is left out. Raises OutputError.
    """
    make_folder(folder)
    for old in folder.glob("[0-9][0-9].jpg"):  # of the run that is being resumed
        old.unlink(missing_ok=True)
    pictures: dict[Path, dict[str, Any] | None] = {}
    for path in (path for paths in chosen.values() for path in paths):
        if path not in pictures:
            pictures[path] = _example(model, path, folder / f"{len(pictures):02d}.jpg")
    listed = {kind: _there([pictures[path] for path in paths]) for kind, paths in chosen.items()}
    save_text(json.dumps(listed, indent=1, ensure_ascii=False) + "\n", folder / EXAMPLES_LIST)


def _example(model: FineAlign, path: Path, picture: Path) -> dict[str, Any] | None:
    try:
        image = read_image(path, max_pixels=model.config_.data.max_pixels)
    except ImageReadError:
        return None
    (found,) = model.explain_pixels([np.array(image)], with_start=True)
    image.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC, reducing_gap=3.0)
    encoded = BytesIO()
    image.save(encoded, "JPEG", quality=QUALITY)
    save_bytes(encoded.getvalue(), picture)
    return {"path": display_path(path), "picture": picture.name, **explained(found, model.texts_.classes, TOP)}


def _there(found: Sequence[dict[str, Any] | None]) -> list[dict[str, Any]]:
    return [one for one in found if one is not None]
