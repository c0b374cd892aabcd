"""Choose the device, the precision and the number of workers by what accelerate and the machine report."""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch

from finealign.errors import ConfigError
from finealign.runtime.cores import usable_cores
from finealign.runtime.distributed import process_state
from finealign.types import Precision, WantedPrecision

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # constants of malloc.h
CPU_BF16_CHECKS = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")  # of torch.cpu: private, may be missing


def choose_device(wanted: str) -> torch.device:
    """The device that accelerate picks for ``auto``, or the wanted one.

    ``wanted`` is ``auto``, a type such as ``cuda``, or one device of several, such as ``cuda:1``. Raises ConfigError
    where it is not available.
    """
    if wanted == "cpu":
        return torch.device("cpu")
    device: torch.device = process_state().device
    if device.type == "cpu":
        device = torch.device("cpu")  # several processes get cpu:0, cpu:1, ..., which safetensors refuses
    if wanted in ("auto", device.type):
        return device
    kind, _, number = wanted.partition(":")
    if kind == device.type != "cpu" and number.isdecimal():
        return _numbered(device, int(number))
    raise ConfigError(
        f"Device {wanted!r} is not to be had here; accelerate finds {device.type!r}. Use auto, cpu or {device.type}"
        f"{f', or one of several as {device.type}:1' if device.type != 'cpu' else ''}."
    )


def _numbered(device: torch.device, number: int) -> torch.device:
    """The device ``number`` of this type.

    Raises ConfigError where there are fewer, or where a launcher has given this process another one.
    """
    count = torch.accelerator.device_count()
    if number >= count:
        raise ConfigError(
            f"Device '{device.type}:{number}' is not to be had here: there are {count}, numbered from 0. Use auto, or "
            f"a number below {count}."
        )
    if process_state().num_processes > 1 and number != device.index:
        raise ConfigError(
            f"Each process of a launcher has a device of its own, so '{device.type}:{number}' cannot be that of all. "
            f"Use {device.type}, and choose among the GPUs with CUDA_VISIBLE_DEVICES."
        )
    return torch.device(device.type, number)


def device_name(device: torch.device) -> str:
    """The name of the GPU, or of this machine's processor; ``cpu`` or ``mps`` where there is no name to be had."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "cpu"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "cpu")


def hardware(device: torch.device, precision: Precision) -> dict[str, str]:
    """What a result was computed on, for a record beside it: nothing that tells one machine of a kind from another."""
    system = " ".join(filter(None, (platform.system(), platform.machine())))
    return {"device": device_name(device), "precision": precision, "cores": str(usable_cores()), "system": system}


def keep_freed_memory() -> bool:
    """Make glibc keep large freed blocks of memory for reuse. Return whether this succeeded.

    By default glibc returns them to the kernel, which clears every page again at the next allocation. On a CPU that can
    take as long as the encoding itself (``benchmarks/allocator.py`` measures it). The setting applies to the whole
    process, so only the command calls this function, never the library.
    """
    try:
        libc = ctypes.CDLL(None)
        return bool(libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, -1))
    except (AttributeError, OSError):
        return False  # not glibc


def good_at_bf16(device: torch.device) -> bool:
    """Whether bf16 is faster than fp32 on the device: tensor cores on a GPU, AMX tiles or AVX-512 BF16 on a CPU.

    Other CPUs emulate bf16, which is many times slower than fp32.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        return any(bool(getattr(torch.cpu, name)()) for name in CPU_BF16_CHECKS if hasattr(torch.cpu, name))
    return False


def good_at_fp16(device: torch.device) -> bool:
    """Whether the device is a GPU with units for products in fp16 (Volta and later), which are many times faster."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)


def choose_precision(wanted: WantedPrecision, device: torch.device) -> Precision:
    """The wanted precision; for ``auto``, bf16 or else fp16 where the device is good at it, and otherwise fp32."""
    if wanted != "auto":
        return wanted
    if good_at_bf16(device):
        return "bf16"
    return "fp16" if good_at_fp16(device) else "fp32"


@contextmanager
def fast_products(device: torch.device) -> Iterator[None]:
    """A context in which a GPU that can (Ampere and later) computes products of float32 in TF32, with 10 bits of 23.

    It is for towers that are asked to run in fp32. Convolutions are computed so by PyTorch anyway. What is outside, as
    scores and losses, keeps all bits, and so does a backward pass, which runs after the context.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def choose_workers(wanted: int | Literal["auto"], device: torch.device) -> int:
    """The number of processes that make views; 0 means a thread.

    For ``auto`` it is 0 on a CPU, where the model uses every core and one thread makes views fast enough, and one less
    than the number of cores that this process may use, from 1 to 8, for other devices.
    """
    if wanted != "auto":
        return wanted
    return 0 if device.type == "cpu" else min(8, max(1, usable_cores() - 1))
