"""Adapt to each set of real photos and evaluate, through the command itself; print the table.

    python benchmarks/real_photos.py --out runs/real-photos --seeds 0,1,2 --sets eurosat,dtd10

The folder of sets comes from FINEALIGN_SHARED, else ../shared. A cell that is done is not run again. Everything after
`--` goes to `finealign adapt`, for every set alike.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from on_device import add_device
from task import finealign, real

SETS = ("eurosat", "dtd10", "pets37-small", "cifar100", "flowers12", "food10", "ucmerced")


def cell(name: str, seed: int, out: Path, backbone: str, device: str, extra: list[str]) -> dict[str, Any]:
    """The evaluation of one set and seed, made or read back."""
    folder = out / f"{name}-seed{seed}"
    result = folder.with_suffix(".json")
    if result.exists():
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return found
    task = real(name)
    going_on = ["--resume"] if (folder / "run.json").exists() else []
    on = ("--device", device)
    run = finealign(
        *replace(task, backbone=backbone or task.backbone).adapt(folder, "--seed", str(seed), *on, *going_on, *extra)
    )
    found = {"set": name, "seed": seed, "seconds": run["seconds"], "epochs": run["epochs"]}
    for score in ("las", "global"):
        found[score] = finealign("evaluate", str(folder), str(task.labelled), "--score", score, *on)
    result.write_text(json.dumps(found), encoding="utf-8")
    return found


def table(cells: list[dict[str, Any]]) -> str:
    """Markdown: a row a cell, the mean gain below."""
    lines = [
        "| set | images | seed | start | adapted, global | adapted, LAS | gain | paired 95 % interval | minutes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for found in cells:
        las, whole = found["las"], found["global"]
        gain = las["difference"]
        lines.append(
            f"| {found['set']} | {las['images']} | {found['seed']} | {100 * las['start']['top1']:.1f} "
            f"| {100 * whole['adapted']['top1']:.1f} | {100 * las['adapted']['top1']:.1f} | {100 * gain['top1']:+.1f} "
            f"| {100 * gain['low']:+.1f} to {100 * gain['high']:+.1f} | {found['seconds'] / 60:.1f} |"
        )
    for score in ("las", "global"):
        gains = [100 * found[score]["difference"]["top1"] for found in cells]
        lines.append(f"\nMean gain over {len(cells)} rows, {score} score: {mean(gains):+.2f} points.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--backbone", default="")
    add_device(parser)
    known, extra = parser.parse_known_args()
    known.out.mkdir(parents=True, exist_ok=True)
    extra = [argument for argument in extra if argument != "--"]
    cells = []
    for name in known.sets.split(","):
        for seed in map(int, known.seeds.split(",")):
            cells.append(cell(name, seed, known.out, known.backbone, known.device, extra))
            print(
                f"{name} seed {seed}: {100 * cells[-1]['las']['difference']['top1']:+.1f}", file=sys.stderr, flush=True
            )
    print(table(cells))


if __name__ == "__main__":
    main()
