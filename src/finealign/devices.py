"""Which device, which precision and how many workers: asked of accelerate and of the machine, never assumed."""

import ctypes
import os
from typing import Literal

import torch

from finealign.backbone import Precision
from finealign.errors import ConfigError
from finealign.ranks import process_state

WantedPrecision = Literal["auto", "fp32", "bf16"]
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h
CPU_BF16_CHECKS = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")


def choose_device(wanted: str) -> torch.device:
    """The device accelerate picks for ``auto``, or the wanted one. Raises ConfigError when it is not there."""
    if wanted == "cpu":
        return torch.device("cpu")
    found: torch.device = process_state().device
    if found.type == "cpu":
        found = torch.device("cpu")  # of several processes accelerate numbers even these, which safetensors refuses
    if wanted == "auto" or wanted == found.type:
        return found
    raise ConfigError(
        f"Device {wanted!r} is not to be had here; accelerate finds {found.type!r}. Use auto, cpu or {found.type}, and "
        "choose among several GPUs with CUDA_VISIBLE_DEVICES."
    )


def keep_freed_memory() -> bool:
    """Tell glibc to keep large freed blocks for the next step; whether it was told.

    By default it hands them back to the kernel, which then clears every page of them anew: on a CPU that can take as
    long as the encoding itself (``benchmarks/allocator.py`` measures it). The setting holds for the whole process, so
    the command makes it, never the library.
    """
    try:
        libc = ctypes.CDLL(None)
        return bool(libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, -1))
    except (AttributeError, OSError):
        return False  # not glibc


def good_at_bf16(device: torch.device) -> bool:
    """Whether bf16 is faster than fp32 there: tensor cores on a GPU, AMX tiles or AVX-512 BF16 on a CPU.

    Elsewhere a CPU emulates it, many times slower than fp32.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        return any(bool(getattr(torch.cpu, name)()) for name in CPU_BF16_CHECKS if hasattr(torch.cpu, name))
    return False


def choose_precision(wanted: WantedPrecision, device: torch.device) -> Precision:
    """bf16 for ``auto`` where the processor is good at it, else fp32."""
    if wanted == "auto":
        return "bf16" if good_at_bf16(device) else "fp32"
    return wanted


def choose_workers(wanted: int | Literal["auto"], device: torch.device) -> int:
    """Processes that make views. On a CPU the model takes every core, and one thread beside it keeps ahead of it."""
    if wanted != "auto":
        return wanted
    return 0 if device.type == "cpu" else min(8, max(1, (os.cpu_count() or 1) - 1))
