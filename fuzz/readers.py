"""Fuzz what reads files from outside, guided by coverage: ``python fuzz/readers.py config --seconds 240``.

``all`` splits the time over every target. The corpus grows in ``runs/fuzz/TARGET``; what breaks a target lies beside
it in ``TARGET-findings``: the input, and the traceback unless it took too long or too much memory.
Needs ``pip install atheris``.
"""

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PLACE = HERE.parent / "runs" / "fuzz"
NAMES = ("config", "classes", "descriptions", "lists", "run", "model", "image")
INSTRUMENTED = {"config": ["yaml"], "image": ["PIL"]}  # beside finealign; the json and csv modules are in C
SLOWEST, MEMORY = 10, 3000  # seconds, MB of one input


def fuzz(name: str, seconds: int) -> None:
    """In this process; ends it. Exceptions are written down and passed over, so that the rest is still explored."""
    atheris: Any = import_module("atheris")
    with atheris.instrument_imports(include=["finealign", *INSTRUMENTED.get(name, [])]):
        targets: Any = import_module("targets")
    target = targets.TARGETS[name]
    findings = PLACE / f"{name}-findings"

    def attempt(data: bytes) -> None:
        try:
            targets.only_errors(target, data)
        except Exception as error:
            trace = [(Path(frame.filename), frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
            path, line = [place for place in trace if place[0].parent == HERE or "finealign" in place[0].parts][-1]
            where = f"{type(error).__name__}-{path.stem}-{line}"
            if not (findings / f"{where}.txt").exists():
                (findings / where).write_bytes(data)
                (findings / f"{where}.txt").write_text(traceback.format_exc(), encoding="utf-8", errors="replace")

    for seed in target.seeds():
        (PLACE / name / hashlib.sha1(seed).hexdigest()).write_bytes(seed)
    options = [f"-max_total_time={seconds}", f"-timeout={SLOWEST}", f"-rss_limit_mb={MEMORY}", "-print_final_stats=1"]
    options += [f"-artifact_prefix={findings}/", "-max_len=20000", "-len_control=50", f"-dict={HERE / 'words.dict'}"]
    atheris.Setup([sys.argv[0], *options, str(PLACE / name)], attempt)
    atheris.Fuzz()


def run(name: str, seconds: int) -> None:
    """Fuzz in processes of their own until the time is up: an input too slow or too large ends a process."""
    for folder in (PLACE / name, PLACE / f"{name}-findings"):
        folder.mkdir(parents=True, exist_ok=True)
    before = set((PLACE / f"{name}-findings").iterdir())
    executions, end = 0, time.monotonic() + seconds
    memory = Path("/dev/shm")
    with (
        (PLACE / f"{name}.log").open("w", encoding="utf-8") as log,
        tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as scratch,
    ):
        while (left := round(end - time.monotonic())) > 2:
            command = [sys.executable, str(HERE / "readers.py"), name, "--seconds", str(left), "--here"]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": scratch}
            done = subprocess.run(command, env=environment, capture_output=True, check=False)
            text = (done.stdout + done.stderr).decode("utf-8", "replace")
            log.write(text)
            found = re.search(r"number_of_executed_units: (\d+)", text)
            if found is None:
                raise SystemExit(f"{name} did not run:\n{text[-3000:]}")
            executions += int(found[1])
    new = {path for path in (PLACE / f"{name}-findings").iterdir() if path.suffix != ".txt"} - before
    print(f"{name}: {executions} executions, {len(new)} findings{''.join(f' {path.name}' for path in sorted(new))}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("target", choices=[*NAMES, "all"])
    parser.add_argument("--seconds", type=int, default=240)
    parser.add_argument("--here", action="store_true", help="in this process, for debugging")
    parser.add_argument("--input", type=Path, help="run this one input, without atheris")
    arguments = parser.parse_args()
    if arguments.input:
        targets: Any = import_module("targets")
        targets.only_errors(targets.TARGETS[arguments.target], arguments.input.read_bytes())
        return
    if arguments.here:
        fuzz(arguments.target, arguments.seconds)
    names = NAMES if arguments.target == "all" else [arguments.target]
    for name in names:
        run(name, arguments.seconds // len(names))


if __name__ == "__main__":
    main()
