"""Checks of an export against FineAlign: the measures, the test images, and the differences that are allowed."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from finealign.backbone.model import OpenClipBackbone
from finealign.classifier import FineAlign
from finealign.errors import ConfigError, ModelError, sentence
from finealign.types import ClassPrior, Prediction, Score, Texts, Use

Format = Literal["open_clip", "hf", "onnx"]


@dataclass(frozen=True)
class Measure:
    """The largest difference measured between the export and FineAlign, and the largest that is promised."""

    largest: float
    promised: float

    @property
    def kept(self) -> bool:
        """Whether the measured difference is within the promised one; False where it is NaN."""
        return self.largest <= self.promised


@dataclass(frozen=True)
class Checked:
    """The measures of an export, and notes on it for the user."""

    parity: Mapping[str, Measure]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Exported:
    """An export that was checked and written."""

    folder: Path
    format: Format
    use: Use  # which of the model's two models it is
    class_prior: ClassPrior | None  # how the images to classify are taken to be distributed
    score: Score
    files: tuple[str, ...]  # relative to the folder, sorted
    parity: Mapping[str, Measure]
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """The export as a JSON object, with the total size of its files in bytes."""
        return {
            "out": str(self.folder),
            "format": self.format,
            "use": self.use,
            "class_prior": self.class_prior,
            "score": self.score,
            "files": list(self.files),
            "bytes": sum((self.folder / name).stat().st_size for name in self.files),
            "parity": {name: asdict(measure) for name, measure in self.parity.items()},
            "notes": list(self.notes),
        }


COSINE = 1e-5  # the largest difference promised for cosines of the same pixels
TEXTS = 64  # how many texts have their embeddings compared


def open_clip_backbone(model: FineAlign) -> OpenClipBackbone:
    """The model's backbone as an OpenClipBackbone, because exports need more than the Backbone protocol has.

    Raises ConfigError for a backbone of another kind.
    """
    backbone = model.backbone_
    if not isinstance(backbone, OpenClipBackbone):
        raise ConfigError(
            f"The backbone {backbone.identifier!r} is no model of open_clip, and only those can be exported. Predict "
            "with FineAlign, or save the model."
        )
    return backbone


def prompts(texts: Texts) -> list[str]:
    """Every class name in the first template, then the first class name in each of the other templates."""
    first_template, *other_templates = texts.templates
    names = [first_template.replace("{}", name) for name in texts.classes]
    return names + [template.replace("{}", texts.classes[0]) for template in other_templates]


def own_scores(saved: FineAlign, images: Sequence[Path], kind: Score) -> NDArray[np.float32]:
    """FineAlign's own scores: (n, C). An image that cannot be read has no row."""
    outcomes = saved.iter_predictions(images, score=kind)
    return np.stack([outcome.scores for outcome in outcomes if isinstance(outcome, Prediction)])


def run_usage(
    folder: Path, aside: Path, images: Sequence[Path], code: str = "", **given: Any
) -> Mapping[str, NDArray[Any]]:
    """Run an export's usage.py on images, and then ``code``, in a process that does not use FineAlign.

    Returns the arrays in ``found``: ``scores`` and ``probabilities``, both (n, C), and the arrays or tensors that
    ``code`` adds to it. ``code`` may read the keyword arguments, which must be JSON values, in ``given``. ``aside`` is
    a folder for temporary files. Raises ModelError when the process ends with an error.
    """
    from safetensors.numpy import load_file

    answer = aside / "found.safetensors"
    program = f"""
import json, sys
sys.path.insert(0, "")
import numpy as np
from safetensors.numpy import save_file
import usage
given = json.loads(sys.stdin.buffer.read())
found = dict(zip(["scores", "probabilities"], usage.classify(given["images"])))
{code}
def whole(value):
    array = np.ascontiguousarray(value.detach() if hasattr(value, "detach") else value)
    return array.astype(np.float32) if array.dtype.kind == "f" else array
save_file({{name: whole(value) for name, value in found.items()}}, given["answer"])
"""
    request = {"images": [str(path) for path in images], "answer": str(answer), **given}
    process = subprocess.run(
        [sys.executable, "-B", "-c", program],
        input=json.dumps(request).encode(),
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        check=False,
    )
    if process.returncode != 0:
        lines = process.stderr.decode(errors="replace").strip().splitlines()
        reason = lines[-1] if lines else f"exit code {process.returncode}"
        raise ModelError(f"The export does not open, and was removed: {sentence(reason)}")
    return load_file(answer)


def largest(one: NDArray[Any], other: NDArray[Any]) -> float:
    """The largest absolute difference; NaN where a value is NaN, infinity where the shapes differ."""
    return float(np.abs(one - other).max()) if one.shape == other.shape else float("inf")


def draw_batch(generator: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    """Random test images as uint8, in any shape (..., 3, H, W)."""
    count = math.prod(shape[:-3])
    return torch.stack([_draw(generator, *shape[-2:]) for _ in range(count)]).reshape(shape)


def write_pictures(size: int, folder: Path) -> list[Path]:
    """Write random images into a folder and return their paths.

    They have several sizes, smaller and larger than ``size``, the side in pixels of the model's input. The last ones
    are transparent, or grey of 16 and of 12 bits.
    """
    generator = np.random.default_rng(1)
    sizes = [(size, size), (2 * size, 3 * size + 1), (size // 2 + 1, size), (301, 224), (97, 260), (size + 2, size)]
    paths = []
    for number, (height, width) in enumerate(sizes):
        path = folder / f"{number}.png"
        Image.fromarray(_draw(generator, height, width).permute(1, 2, 0).numpy()).save(path)
        paths.append(path)
    return paths + _unusual(generator, size, folder)


def _unusual(generator: np.random.Generator, size: int, folder: Path) -> list[Path]:
    """Images that Pillow's own conversion to RGB shows otherwise than finealign does."""
    pixels = [_draw(generator, size + 3, size + 40).permute(1, 2, 0).numpy() for _ in range(2)]
    colours, opacity = Image.fromarray(pixels[0]), Image.fromarray(pixels[1][..., 0])
    grey = pixels[0][..., 1].astype(np.uint16)
    see_through = colours.copy()
    see_through.putalpha(opacity)
    grey_see_through = colours.convert("L")
    grey_see_through.putalpha(opacity)
    images = {
        "transparent.png": see_through,
        "transparent.webp": see_through,
        "grey_transparent.png": grey_see_through,
        "16_bits.png": Image.fromarray(grey * 257),
        "12_of_16_bits.png": Image.fromarray(grey << 4),
        "12_of_16_bits.tif": Image.fromarray(grey << 4),
        "floats.tif": Image.fromarray(grey.astype(np.float32) / 255),
    }
    for name, image in images.items():
        image.save(folder / name)
    return [folder / name for name in images]


def _draw(generator: np.random.Generator, height: int, width: int) -> Tensor:
    """A random test image, a gradient between two colours with noise: (3, H, W) uint8."""
    ends = generator.integers(0, 256, (2, 3, 1, 1))
    slope = (np.arange(height)[:, None] / height + np.arange(width) / width) / 2
    noise = generator.normal(0, generator.uniform(0, 60), (3, height, width))
    return torch.from_numpy((ends[0] + (ends[1] - ends[0]) * slope + noise).clip(0, 255).astype(np.uint8))
