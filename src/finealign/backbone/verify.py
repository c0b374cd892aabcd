"""Check a backbone by cosines between drawn pictures and sentences, recorded once from genuine weights.

Weights that load are not always right: another activation, other means, a tokenizer of another model all load, and
only lower the accuracy. A dozen drawn pictures and their names find that out in a second.
"""

import json
from dataclasses import asdict, dataclass
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from finealign.backbone.base import Backbone
from finealign.errors import BackboneError, sentence

TOLERANCE = 1e-3  # of a cosine
RECORDS = "cosines.json"  # by identifier, as ``as_json`` returns them
_SIDE = 224  # pixels
_COLOURS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 70, 210), "yellow": (245, 215, 40)}
_SHAPES = ("circle", "square", "triangle")
SENTENCES = tuple(f"a {colour} {shape}" for colour, shape in product(_COLOURS, _SHAPES))


@dataclass(frozen=True)
class Cosines:
    """The cosine of each picture (row) with each sentence (column), and of which weights."""

    identifier: str
    checksum: str  # of the weights
    cosines: tuple[tuple[float, ...], ...]

    @property
    def named(self) -> int:
        """How many of the pictures are nearest to the sentence that names them."""
        found = np.array(self.cosines)
        return int((found.argmax(1) == np.arange(len(found))).sum())

    def difference(self, other: "Cosines") -> float:
        """The largest difference of a cosine."""
        return float(np.abs(np.array(self.cosines) - np.array(other.cosines)).max())

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def pictures() -> list[Image.Image]:
    """The drawn pictures, in the order of ``SENTENCES``: a shape of one colour in the middle of a white square.

    They are drawn without a library, so that each pixel is the same everywhere.
    """
    across, down = np.meshgrid(np.arange(_SIDE) + 0.5, np.arange(_SIDE) + 0.5)
    x, y = across / _SIDE - 0.5, down / _SIDE - 0.5
    inside: dict[str, NDArray[np.bool_]] = {
        "circle": x**2 + y**2 < 0.3**2,
        "square": np.maximum(abs(x), abs(y)) < 0.27,
        "triangle": (y < 0.27) & (abs(x) < (y + 0.3) * 0.55),
    }
    return [
        Image.fromarray(np.where(inside[shape][..., None], colour, 255).astype(np.uint8))
        for colour, shape in product(_COLOURS.values(), _SHAPES)
    ]


def measure(backbone: Backbone) -> Cosines:
    """Encode the pictures and the sentences."""
    views = [torch.from_numpy(np.array(backbone.geometry(picture))).permute(2, 0, 1) for picture in pictures()]
    cosines = backbone.embed(torch.stack(views)).cpu() @ backbone.encode_sentences(SENTENCES).cpu().T
    rows = tuple(tuple(round(float(value), 5) for value in row) for row in cosines)
    return Cosines(backbone.identifier, backbone.checksum, rows)


def recorded(identifier: str) -> Cosines | None:
    """What somebody recorded from genuine weights and sent in; None where nobody has."""
    known = json.loads(files(__package__).joinpath(RECORDS).read_text(encoding="utf-8"))
    return _parsed(known[identifier], RECORDS) if identifier in known else None


def read(path: Path) -> Cosines:
    """Read cosines from a file. Raises BackboneError if they are not there, or of other pictures or sentences."""
    try:
        return _parsed(json.loads(path.read_text(encoding="utf-8")), str(path))
    except (OSError, ValueError) as error:
        raise BackboneError(f"No cosines in {path}: {sentence(error)} Write them with --record.") from error


def _parsed(found: Any, where: str) -> Cosines:
    count = len(SENTENCES)
    try:
        rows = np.array(found["cosines"], dtype=float)
        if rows.shape == (count, count) and np.isfinite(rows).all():
            return Cosines(str(found["identifier"]), str(found["checksum"]), tuple(map(tuple, rows.tolist())))
    except (KeyError, TypeError, ValueError):
        pass
    raise BackboneError(
        f"{where} holds no cosines of the pictures: wanted identifier, checksum and {count} rows of {count} numbers. "
        "Write them with finealign doctor --verify --record FILE."
    )
