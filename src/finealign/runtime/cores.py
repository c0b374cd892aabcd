"""How many processor cores this process may use, and how large the memory is that worker processes share."""

import math
import os
import shutil
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # cgroup v2, as a container sees its own
_QUOTA_V1, _PERIOD_V1 = (Path(f"/sys/fs/cgroup/cpu/cpu.cfs_{name}_us") for name in ("quota", "period"))


def usable_cores() -> int:
    """The cores that this process may run on: those of its affinity, and no more than its cgroup's quota is worth."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        cores = os.cpu_count() or 1
    return max(1, math.ceil(min(cores, _quota())))


def shared_memory() -> tuple[int, int] | None:
    """The size of the memory that processes share and what is free of it, in bytes; None where there is none."""
    try:
        usage = shutil.disk_usage(SHARED_MEMORY)
    except OSError:
        return None
    return usage.total, usage.free


def _quota() -> float:
    """How many cores' worth of time the cgroup has; infinite where it is not bounded, or nothing can be read."""
    for quota in (_quota_v2, _quota_v1):
        try:
            return quota()
        except (OSError, ValueError):
            continue
    return math.inf


def _quota_v2() -> float:
    most, period = _QUOTA.read_text(encoding="ascii").split()
    return math.inf if most == "max" else int(most) / int(period)


def _quota_v1() -> float:
    most = int(_QUOTA_V1.read_text(encoding="ascii"))
    return math.inf if most < 0 else most / int(_PERIOD_V1.read_text(encoding="ascii"))
