"""Kill a run with SIGKILL, resume it, and compare: are the weights those of a run that nobody killed, bit for bit?

    python benchmarks/kills.py --kills 20

A moment is drawn for each kill: half at any time after the first image was read, the others aimed: in the midst of a
step, of writing a checkpoint or kept features, of renaming one, and between epochs. Each run is killed once and
then resumed to its end; single process, the demo's birds.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from on_device import add_device
from task import Task, make_task

AIMS = ("in a step", "writing", "renaming", "between epochs")
SETTINGS = (
    *("training.epochs=4", "training.batch_size=16", "training.anchor_steps=10", "training.checkpoint_minutes=0.01"),
    *("views.refresh_epochs=2", "views.crops=4", "precision=fp32"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=96)
    add_device(parser, default="cpu")  # a GPU takes some sums in no fixed order, so that weights differ anyway
    known = parser.parse_args()
    rng = np.random.default_rng(known.seed)
    with tempfile.TemporaryDirectory() as folder:
        task = make_task("demo", Path(folder), images=known.images)
        task = replace(task, texts=(*task.texts, "--device", known.device))
        whole = Path(folder, "whole")
        began = time.monotonic()
        adapt(task, whole)
        seconds = time.monotonic() - began
        wanted = weights(whole)
        survived, landed = 0, Counter[str]()
        for number in range(known.kills):
            aim = AIMS[number // 2 % len(AIMS)] if number % 2 else "any time"
            out, where = Path(folder, f"killed-{number}"), ""
            while not where:  # else it ended before its time came
                shutil.rmtree(out, ignore_errors=True)
                where = killed(task, out, aim, rng, seconds)
            landed[where] += 1
            adapt(task, out, resume=(out / "run.json").exists())
            same = weights(out) == wanted
            survived += same
            print(f"{number + 1}: killed {aim} ({where}); {'the same' if same else 'OTHER'} weights", flush=True)
        print(f"{survived} of {known.kills} runs have the weights of the uninterrupted one; killed at {dict(landed)}")
    sys.exit(survived != known.kills)


def adapt(task: Task, out: Path, *, resume: bool = False) -> None:
    done = subprocess.run(command(task, out, resume=resume), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(done.args)}\n{done.stderr}")


def killed(task: Task, out: Path, aim: str, rng: np.random.Generator, seconds: float) -> str:
    """Start a run and have it killed; what it had left by then, or nothing where it ended first."""
    words = command(task, out)
    environment = dict(os.environ)
    if aim != "any time":
        # The run kills itself there: see ``suicidal``.
        words[1:3] = [__file__, "--suicidal"]
        environment |= {
            "AIM": aim,
            "AFTER": str(int(rng.integers({"in a step": 30, "between epochs": 4}.get(aim, 12)))),
        }
    with subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        if aim == "any time":
            until = time.monotonic() + 0.3 * seconds
            while not (out / "run.json").exists() and time.monotonic() < until:
                time.sleep(0.01)
            time.sleep(float(rng.uniform(0, 0.7 * seconds)))
            process.kill()
        process.wait()
    parts = sorted(path.name for path in out.rglob("*.part"))
    kept = sorted(path.stem for path in (out / "checkpoints").glob("epoch-*"))
    if process.returncode != -signal.SIGKILL:
        return ""
    return f"{kept[-1] if kept else 'no checkpoint'}{', half a file' if parts else ''}"


def suicidal(arguments: list[str]) -> None:
    """The command, killed by itself when it has come so many times to what AIM says."""
    from finealign import cli
    from finealign.runtime import atomic
    from finealign.training import memmap
    from finealign.training.state import State

    aim, left = os.environ["AIM"], int(os.environ["AFTER"])

    def count_down() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(then: Any) -> Any:
        def both(*given: Any, **named: Any) -> Any:
            count_down()
            return then(*given, **named)

        return both

    def torn(path: Path, write: Callable[[Path], None]) -> None:
        def half(aside: Path) -> None:
            write(aside)
            if left == 0:
                os.truncate(aside, aside.stat().st_size // 2)
            count_down()

        write_whole(path, half)

    write_whole = atomic._write_aside
    # Any: what is patched here is not made to be.
    room: Any = {"in a step": State, "between epochs": State, "renaming": Path}.get(aim, atomic)
    if aim == "writing":
        room._write_aside = torn
        kept: Any = memmap.MemmapTensors
        kept.finish = before(kept.finish)
    else:
        name = {"in a step": "encoders", "between epochs": "save", "renaming": "replace"}[aim]
        setattr(room, name, before(getattr(room, name)))  # encoders(): between the gradients and the optimiser's step
    sys.argv = ["finealign", *arguments]
    cli.main()


def command(task: Task, out: Path, *, resume: bool = False) -> list[str]:
    settings = [word for one in SETTINGS for word in ("--set", one)]
    cache = ["--set", f"data.cache={out.parent / 'cache'}"]
    more = [*settings, *cache, "--keep-adapted", *(["--resume"] if resume else [])]
    return [sys.executable, "-m", "finealign", *task.adapt(out, *more)]


def weights(out: Path) -> tuple[bytes, ...]:
    return tuple(
        (out / "model" / name).read_bytes() for name in ("open_clip_model.safetensors", "finealign.safetensors")
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--suicidal"]:
        suicidal(sys.argv[2:])
    else:
        main()
