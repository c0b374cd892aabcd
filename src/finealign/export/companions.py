"""What lies beside the weights of an export: the classes, their anchors, and the program that scores with them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finealign.classifier import FineAlign
from finealign.export.layout import ANCHORS, CLASSES, USAGE
from finealign.export.record import Format
from finealign.storage import save_tensors, save_text
from finealign.templates import fill
from finealign.types import Score


def write_classes(saved: FineAlign, kind: Score, folder: Path) -> None:
    about = {
        "classes": list(saved.texts_.classes),
        "logit_scale": saved.method_.logit_scale,
        "score": kind,
        "templates": list(saved.texts_.templates),
    }
    save_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", folder / CLASSES)


def write_anchors(saved: FineAlign, folder: Path) -> None:
    save_tensors({"anchors": saved.method_.classifier()}, folder / ANCHORS)


def write_usage(format: Format, folder: Path, **values: Any) -> None:
    """``usage.py``; ``values`` are what its template asks for."""
    save_text(fill(f"usage_{format}.py.j2", values), folder / USAGE)


def resampling(preprocess: Mapping[str, Any]) -> str:
    """Pillow's name for how a backbone's images are resized."""
    return "BILINEAR" if preprocess.get("interpolation") == "bilinear" else "BICUBIC"  # as open_clip reads it
