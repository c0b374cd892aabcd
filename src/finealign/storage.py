"""Files that are whole or not there: written aside, flushed to disk, renamed."""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from finealign.errors import OutputError


def save_tensors(tensors: Mapping[str, Tensor], path: Path, *, metadata: dict[str, str] | None = None) -> None:
    """Write safetensors so that no reader ever sees half a file. Raises OutputError; what was there stays."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    aside = path.with_suffix(".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(_apart(tensors), aside, metadata=metadata)
        with aside.open("rb+") as written:
            os.fsync(written.fileno())
        aside.replace(path)
    except (OSError, SafetensorError) as error:  # a full disk comes as the second
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise OutputError(f"{path} cannot be written: {error}. What was there before is untouched.") from error


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU that share no memory, as safetensors wants them."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        separate[name] = value.clone() if value.data_ptr() in seen else value
        seen.add(value.data_ptr())
    return separate
