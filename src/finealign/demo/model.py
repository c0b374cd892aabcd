"""The demo's model: an open_clip local directory that ships with the package, made by ``recipes/demo_model.py``."""

import hashlib
from pathlib import Path

from finealign.errors import ModelError

WEIGHTS = Path(__file__).parent / "weights"
SHA256 = "75283f52b189e7bf04b8247348d046434d11d2b3bdc51a5e1f787bea77125ebe"


def demo_model() -> str:
    """The model's name for ``load_backbone``, after a check of its SHA-256. Raises ModelError."""
    path = WEIGHTS / "open_clip_model.safetensors"
    try:
        with path.open("rb") as file:
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"The demo's model cannot be read: {error}. Install finealign again.") from None
    if checksum != SHA256:
        raise ModelError(
            f"The demo's model {path} has the SHA-256 {checksum}, not the expected {SHA256}: it is damaged or was "
            "replaced. Install finealign again."
        )
    return f"local-dir:{WEIGHTS}"
