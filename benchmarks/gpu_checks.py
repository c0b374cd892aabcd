"""Two checks of benchmarks/gpu.sh: two runs at once on one device, and the demo on two devices.

    python benchmarks/gpu_checks.py twice --out runs/twice --backbone ViT-B-32/random --device cuda
    python benchmarks/gpu_checks.py alike runs/demo-cpu runs/demo

`twice` adapts to the same drawn photos in two processes at once: both have to end, with the same labels but for some
that rounding turns. `alike` compares the top-1 of each method in two demos: within a point, or three test images where
a point is fewer. Either ends with 1 where that is not so.
"""

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path

from on_device import add_device
from step import CLASSES, photos
from task import words

SAME = 0.95  # the share of labels that two runs on a GPU have to have in common
POINT, FEWEST = 0.01, 3  # how far top-1 may be apart, as a share, and in images where that is more


def twice(out: Path, images: int, backbone: str, device: str, settings: list[str]) -> bool:
    """Whether two runs at once end alike."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "photos").is_dir():
        (out / "photos").mkdir()
        photos(out / "photos", images)
    (out / "names.txt").write_text("\n".join(CLASSES), encoding="utf-8")
    arguments = ["adapt", str(out / "photos"), "--classes", str(out / "names.txt"), "--backbone", backbone]
    arguments += ["--device", device, "--seed", "0", "--overwrite", "--json"]
    arguments += [part for setting in settings for part in ("--set", setting)]
    runs = [
        subprocess.Popen(words(*arguments, "--out", str(out / name)), stdout=subprocess.DEVNULL)
        for name in ("first", "second")
    ]
    ended = [run.wait() for run in runs]
    if any(ended):
        print("one of the two runs failed; what it said is above")
        return False
    first, second = (labels(out / name / "predictions.csv") for name in ("first", "second"))
    same = sum(one == other for one, other in zip(first, second, strict=True))
    print(f"two runs at once: {same} of {len(first)} labels are the same")
    return same >= SAME * len(first)


def labels(path: Path) -> list[str]:
    with path.open(encoding="utf-8", newline="") as file:
        return [row["label"] for row in csv.DictReader(file)]


def alike(first: Path, second: Path) -> bool:
    """Whether two demos have the same top-1, about."""
    demos = [json.loads((folder / "demo.json").read_text(encoding="utf-8")) for folder in (first, second)]
    tops, other = ({row["method"]: row["top1"] for row in demo["results"]} for demo in demos)
    most = max(POINT, FEWEST / min(demo["images"]["test"] for demo in demos))
    for method, top1 in tops.items():
        apart = "" if abs(top1 - other[method]) <= most else "  TOO FAR APART"
        print(f"{method:20} {100 * top1:6.2f} {100 * other[method]:6.2f}{apart}")
    return all(abs(top1 - other[method]) <= most for method, top1 in tops.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    checks = parser.add_subparsers(dest="check", required=True)
    at_once = checks.add_parser("twice")
    at_once.add_argument("--out", type=Path, required=True)
    at_once.add_argument("--images", type=int, default=64)
    at_once.add_argument("--backbone", default="ViT-B-32/random")
    at_once.add_argument("--set", action="append", default=[], help="section.key=value")
    add_device(at_once)
    demos = checks.add_parser("alike")
    demos.add_argument("first", type=Path)
    demos.add_argument("second", type=Path)
    known = parser.parse_args()
    if known.check == "twice":
        sys.exit(not twice(known.out, known.images, known.backbone, known.device, known.set))
    sys.exit(not alike(known.first, known.second))


if __name__ == "__main__":
    main()
