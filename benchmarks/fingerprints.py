"""Checksums of what runs leave behind, to tell a change of shape from a change of results.

    python benchmarks/fingerprints.py --out runs/before            # on the old code
    python benchmarks/fingerprints.py --out runs/after             # on the new code
    diff runs/before/fingerprints.json runs/after/fingerprints.json

Adapts to two sets of real photos with the encoder learning, runs every method on frozen features, a transformer tower
with prompts and salient patches, and the short demo; all by the command, so that the code's shape does not matter. Of
each run it keeps the SHA-256 of every saved tensor and of the predictions. Results are compared on one machine: other
processors and numbers of threads round otherwise.
"""

import argparse
import csv
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from task import finealign, real

FULL_SETS = ("flowers12", "ucmerced")
FROZEN_SET = "flowers12"
FROZEN_METHODS = ("fair", "dpa", "transclip", "stata", "wca", "self-training", "cupl", "zero-shot", "lafter")
TRANSFORMER = "ViT-B-32/random"
TRANSFORMER_METHODS = ("microclip", "lafter", "fair")
TRANSFORMER_IMAGES = 24


def runs(out: Path) -> Iterator[tuple[str, Path]]:
    """Run everything that is not there yet: the name of each run and its run folder."""
    for name in FULL_SETS:
        task = real(name)
        yield adapted(f"full-{name}-fair", out, task.adapt(out / f"full-{name}-fair", "--set", "training.epochs=2"))
    task = real(FROZEN_SET)
    for method in FROZEN_METHODS:
        name = f"frozen-{FROZEN_SET}-{method}"
        settings = ("--method", method, "--set", "training.encoder=frozen")
        yield adapted(name, out, task.adapt(out / name, *settings))
    few = some_images(task.images, out / "few.txt")
    for method in TRANSFORMER_METHODS:
        name = f"transformer-{method}"
        settings = ("--method", method, "--backbone", TRANSFORMER)
        more = [
            part for text in ("views.crops=2", "training.epochs=2", "training.batch_size=8") for part in ("--set", text)
        ]
        yield adapted(name, out, ["adapt", str(few), *task.texts, "--out", str(out / name), *settings, *more])
    if not (out / "demo" / "demo.json").is_file():
        finealign("demo", "--quick", "--out", str(out / "demo"))
    yield "demo-fair", out / "demo" / "fair"
    yield "demo-self-training", out / "demo" / "self-training"


def adapted(name: str, out: Path, arguments: list[str]) -> tuple[str, Path]:
    if not (out / name / "report.html").is_file():
        print(f"running {name}", file=sys.stderr, flush=True)
        finealign(*arguments, "--seed", "0", "--overwrite")
    return name, out / name


def some_images(folder: Path, listed: Path) -> Path:
    """A list of the first images of a folder, in ``listed``."""
    images = sorted(folder.rglob("*.jpg"))[:: max(1, len(list(folder.rglob("*.jpg"))) // TRANSFORMER_IMAGES)]
    listed.parent.mkdir(parents=True, exist_ok=True)
    listed.write_text("".join(f"{image.resolve()}\n" for image in images[:TRANSFORMER_IMAGES]), encoding="utf-8")
    return listed


def fingerprints(run: Path) -> dict[str, Any]:
    """Checksums of a run's tensors by name, of its epochs' figures and of its predictions."""
    found: dict[str, Any] = {}
    for file in sorted((run / "model").glob("*.safetensors")):
        found |= {f"{file.stem}/{name}": digest(tensor) for name, tensor in sorted(load_file(file).items())}
    with (run / "predictions.csv").open(encoding="utf-8", newline="") as opened:
        rows = list(csv.DictReader(opened))
    labels = [(row["label"], row["start_label"]) for row in rows]
    everything = [{**row, "path": Path(row["path"]).name} for row in rows]  # the demo draws its images into the run
    found["predictions/labels"] = hashlib.sha256(json.dumps(labels).encode()).hexdigest()
    found["predictions/all"] = hashlib.sha256(json.dumps(everything).encode()).hexdigest()
    metrics = run / "metrics.jsonl"
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    found["losses"] = [record["loss"] for record in records]
    return found


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    known = parser.parse_args()
    found = {name: fingerprints(run) for name, run in runs(known.out)}
    path = known.out / "fingerprints.json"
    path.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
