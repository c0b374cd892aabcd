"""What this machine has: versions, device, suitable precision, cached weights, and whether it reaches the hub."""

import os
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch

from finealign.config import ViewSettings
from finealign.images.prefetch import AHEAD
from finealign.run.folder import versions
from finealign.runtime.cores import SHARED_MEMORY, shared_memory, usable_cores
from finealign.runtime.devices import CPU_BF16_CHECKS, choose_device, choose_precision, choose_workers, device_name
from finealign.training.features import RENDER_CHUNK

HUB_TIMEOUT = 3.0  # seconds
SIDE = 224  # pixels of an input side


def examine() -> dict[str, Any]:
    """The facts about this machine as a JSON object. Nothing is downloaded."""
    device = choose_device("auto")
    return {
        "versions": versions(),
        "device": device.type,
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        "cores": usable_cores(),
        "shared_memory": shared(choose_workers("auto", device)),
        "precision": choose_precision("auto", device),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cpu_bf16": {  # the checks are private functions of torch, which a version may lack
            name.removeprefix("_is_").removesuffix("_supported"): bool(getattr(torch.cpu, name, lambda: False)())
            for name in CPU_BF16_CHECKS
        },
        "hub": hub(),
        "cache": cached_models(),
    }


def shared(workers: int) -> dict[str, Any]:
    """The memory that processes share and what worker processes need of it, in bytes; None where there is none.

    The need is that of chunks of a label pass, of eight crops at 224 pixels, of which each worker has two in hand.
    """
    size, free = shared_memory() or (None, None)
    needed = workers * AHEAD * RENDER_CHUNK * (1 + ViewSettings().crops) * 3 * SIDE**2
    return {"folder": str(SHARED_MEMORY), "size": size, "free": free, "workers": workers, "needed": needed}


def hub() -> dict[str, Any]:
    """The hub's address, and whether a connection to it opens (None: unknown)."""
    from huggingface_hub import constants

    endpoint = constants.ENDPOINT
    if constants.HF_HUB_OFFLINE:
        return {"endpoint": endpoint, "reachable": False, "reason": "HF_HUB_OFFLINE is set"}
    address = urlparse(endpoint)
    port = address.port or (443 if address.scheme == "https" else 80)
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return {"endpoint": endpoint, "reachable": None, "reason": "behind a proxy: only a download would tell"}
    try:
        socket.create_connection((address.hostname, port), timeout=HUB_TIMEOUT).close()
    except OSError as error:
        return {"endpoint": endpoint, "reachable": False, "reason": str(error)}
    return {"endpoint": endpoint, "reachable": True, "reason": ""}


def cached_models() -> dict[str, Any]:
    """The folder of the hub's cache on this machine, and the models in it."""
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    folder = Path(constants.HF_HUB_CACHE)
    try:
        repos = scan_cache_dir(folder).repos
    except CacheNotFound:
        return {"folder": str(folder), "models": []}
    return {"folder": str(folder), "models": sorted(repo.repo_id for repo in repos if repo.repo_type == "model")}
