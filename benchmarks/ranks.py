"""One process against several: the same run, so the same pseudo-labels, weights and accuracy?

    python benchmarks/ranks.py --set eurosat --precision fp32,bf16 [--threads 1]

Runs the command alone and under torchrun and compares what the two leave behind. The processes have ``--threads`` each,
or else divide the cores: then one rounds otherwise than two, which sum in other orders.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from on_device import add_device
from task import Task, finealign, make_task
from torch import Tensor

from finealign.training.checkpoints import read_last_checkpoint


def run(
    task: Task, out: Path, precision: str, device: str, processes: int, threads: int, more: list[str]
) -> dict[str, float]:
    """Adapt and evaluate; the accuracy of both in percent, and the seconds."""
    arguments = task.adapt(out, "--keep-adapted", "--precision", precision, "--device", device, *more)
    done = finealign(*arguments, processes=processes, threads=threads)
    found = finealign("evaluate", str(out), str(task.labelled), "--precision", precision, "--device", device)
    return {"top1": 100 * found["adapted"]["top1"], "seconds": done["seconds"]}


def left(out: Path) -> dict[str, Tensor]:
    found = read_last_checkpoint(out / "checkpoints")
    assert found is not None
    return found.tensors


def compare(one: dict[str, Tensor], other: dict[str, Tensor]) -> str:
    """Pseudo-labels that differ, and how far norms and anchors are apart, in all and the worst tensor."""
    labels = f"{int((one['labels'] != other['labels']).sum())} of {len(one['labels'])}"
    norms = [name for name in one if name.startswith("norms.")]

    def apart(names: list[str]) -> float:
        first, second = (torch.cat([left[name].flatten() for name in names]) for left in (one, other))
        return float((second - first).norm() / first.norm())

    worst = max(apart([name]) for name in norms)
    return f"{labels} | {apart(norms):.1e} | {worst:.1e} | {apart(['method.anchors']):.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", default="demo", help="demo, or a set of real photos")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--processes", default="2", help="numbers with commas between")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--precision", default="fp32,bf16")
    add_device(parser, default="cpu")  # the CPU's runs are the same bit for bit
    known = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        task = make_task(known.set, Path(folder))
        print("| precision | processes | pseudo-labels that differ | norms | worst norm | anchors | top-1 | s |")
        print("|---|---|---|---|---|---|---|---|")
        more = ["--set", f"training.epochs={known.epochs}", "--set", f"data.cache={folder}/cache"]
        for precision in known.precision.split(","):
            outs = {count: Path(folder, f"{precision}-{count}") for count in (1, *map(int, known.processes.split(",")))}
            for count, out in outs.items():
                found = run(task, out, precision, known.device, count, known.threads, more)
                cells = compare(left(outs[1]), left(out)) if count > 1 else "| | |"
                print(f"| {precision} | {count} | {cells} | {found['top1']:.2f} | {found['seconds']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
