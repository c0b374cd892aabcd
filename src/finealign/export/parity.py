"""An export held against FineAlign: what its own program says in a process of its own, and how far that is off."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finealign.classifier import FineAlign
from finealign.errors import ModelError
from finealign.export.wording import one_line
from finealign.types import Prediction, Score, Texts

COSINE = 1e-5  # what is promised of cosines of the same pixels
TEXTS = 64  # texts whose embeddings are compared


def prompts(texts: Texts) -> list[str]:
    """Every class name in the first template, then the first name in the other templates."""
    first, *others = texts.templates
    names = [first.replace("{}", name) for name in texts.classes]
    return names + [template.replace("{}", texts.classes[0]) for template in others]


def own_scores(saved: FineAlign, images: Sequence[Path], kind: Score) -> NDArray[np.float32]:
    """FineAlign's own scores of images that can be read: (n, C)."""
    return np.stack([one.scores for one in saved.iter_predictions(images, score=kind) if isinstance(one, Prediction)])


def run_usage(
    folder: Path, aside: Path, images: Sequence[Path], code: str = "", **given: Any
) -> Mapping[str, NDArray[Any]]:
    """What an export's usage.py makes of images, and ``code`` after it, in a process without FineAlign.

    ``code`` reads ``given`` and adds arrays or tensors to ``found``. Raises ModelError when it ends with an error.
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
    asked = {"images": [str(path) for path in images], "answer": str(answer), **given}
    run = subprocess.run(
        [sys.executable, "-B", "-c", program],
        input=json.dumps(asked).encode(),
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        check=False,
    )
    if run.returncode != 0:
        said = run.stderr.decode(errors="replace").strip().splitlines()
        why = said[-1] if said else f"exit code {run.returncode}"
        raise ModelError(f"The export does not open, and was removed: {one_line(why)}")
    return load_file(answer)


def largest(one: NDArray[Any], other: NDArray[Any]) -> float:
    """The largest difference; no number where a value is none, infinite where the shapes differ."""
    return float(np.abs(one - other).max()) if one.shape == other.shape else float("inf")
