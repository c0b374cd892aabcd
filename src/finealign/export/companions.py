"""The files beside the weights of an export: classes, anchors, ``usage.py`` and the model card."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finealign.classifier import FineAlign
from finealign.export.checks import Format
from finealign.images import channels
from finealign.model.card import model_card
from finealign.runtime.atomic import save_tensors, save_text
from finealign.runtime.render import fill
from finealign.types import Score

CARD, PARITY, CLASSES, ANCHORS = "README.md", "parity.json", "classes.json", "anchors.safetensors"
USAGE, READING, GRAPH = "usage.py", "reading.py", "model.onnx"
USE = """\
`python usage.py IMAGE...` prints the class of each image. `usage.classify(paths)` gives the scores and probabilities of
all classes, in the order of `classes.json`. It needs {needs} (for HEIC photos
pillow-heif as well), and no finealign.

{more}

`parity.json` has how closely the scores agree with finealign's.
"""
NEEDS: Mapping[Format, str] = {
    "open_clip": "open_clip_torch, numpy and Pillow",
    "hf": "transformers, torch, numpy and Pillow",
    "onnx": "onnxruntime, numpy and Pillow",
}
MORE: Mapping[Format, str] = {
    "open_clip": "The folder is an open_clip model: "
    '`open_clip.create_model_and_transforms("local-dir:PATH-OF-THIS-FOLDER")`. The class vectors are in '
    "`anchors.safetensors`.",
    "hf": 'The folder is a CLIP of transformers: `CLIPModel.from_pretrained("PATH-OF-THIS-FOLDER")`. The class vectors '
    "are in `anchors.safetensors`.",
    "onnx": "`model.onnx` takes uint8 pixels as `usage.py` prepares them, and knows its classes: it has no text tower.",
}
LIBRARIES: Mapping[Format, str] = {"open_clip": "open_clip", "hf": "transformers", "onnx": "onnx"}


def write_classes(saved: FineAlign, kind: Score, folder: Path) -> None:
    """Write ``classes.json``: all that is needed to score with the anchors. The scores have ``offsets`` subtracted."""
    offsets = saved.model_.offsets()
    about = {
        "classes": list(saved.texts_.classes),
        "logit_scale": saved.method_.logit_scale,
        "temperature": saved.model_.temperature(kind),
        "class_prior": saved.class_prior_,
        "offsets": [0.0] * len(saved.texts_.classes) if offsets is None else offsets.tolist(),
        "score": kind,
        "templates": list(saved.texts_.templates),
    }
    save_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", folder / CLASSES)


def write_anchors(saved: FineAlign, folder: Path) -> None:
    """Write ``anchors.safetensors``: the class vectors, (C, J, D)."""
    save_tensors({"anchors": saved.method_.classifier()}, folder / ANCHORS)


def write_usage(saved: FineAlign, format: Format, folder: Path, **values: Any) -> None:
    """Write ``usage.py``, and ``reading.py``, by which it reads images as finealign does.

    ``values`` are what its template needs in addition to ``working``, the size that photos are reduced to, and
    ``white``, the white value of images of more than 8 bits a channel.
    """
    settings = saved.model_.inference
    values = {"working": settings.working_size, "white": repr(settings.white_value), **values}
    save_text(Path(channels.__file__).read_text(encoding="utf-8"), folder / READING)
    save_text(fill("finealign.export", f"usage_{format}.py.j2", values), folder / USAGE)


def resampling(preprocess: Mapping[str, Any]) -> str:
    """Pillow's name of the filter that a backbone's images are resized with."""
    return "BILINEAR" if preprocess.get("interpolation") == "bilinear" else "BICUBIC"  # open_clip's own rule


def export_card(model: FineAlign, format: Format) -> str:
    """The text of ``README.md`` for the export of a fitted model."""
    return model_card(
        model.model_,
        library=LIBRARIES[format],
        task="image-classification" if format == "onnx" else "zero-shot-image-classification",
        use=USE.format(needs=NEEDS[format], more=MORE[format]),
    )
