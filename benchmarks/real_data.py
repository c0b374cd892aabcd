"""Where the real photos and the models for tests and benchmarks lie. They are no part of the project."""

import os
import sys
from pathlib import Path

ADVICE = "Set FINEALIGN_SHARED to the folder that holds data/ and models/miniclip/."


def shared_folder() -> Path:
    """The folder that FINEALIGN_SHARED names, else the one beside the project; whether it is there or not."""
    return Path(os.environ.get("FINEALIGN_SHARED", Path(__file__).parents[2] / "shared"))


def require_shared() -> Path:
    """The same; ends the benchmark where it is not to be had."""
    folder = shared_folder()
    if not (folder / "data").is_dir():
        sys.exit(f"No real photos at {folder}. {ADVICE}")
    return folder


def miniclip() -> Path:
    """The small image-text model that most benchmarks run on."""
    return shared_folder() / "models" / "miniclip"
