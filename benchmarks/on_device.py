"""Where a benchmark computes: the option, and clocks that wait for a GPU."""

import argparse
import time
from collections.abc import Callable

import torch


def add_device(parser: argparse.ArgumentParser, default: str = "auto") -> None:
    """Add ``--device``. A device that is not there ends the benchmark with the sentence of the command."""
    parser.add_argument("--device", default=default, help=f"auto, cpu, cuda, cuda:1 or mps (default: {default})")


def settle(device: torch.device) -> None:
    """Wait until the device has done what it was asked for."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long the work takes until the device has done it."""
    settle(device)
    began = time.perf_counter()
    work()
    settle(device)
    return time.perf_counter() - began
