"""The backbones of which this project keeps facts: licence, revision, checksum, input size, what is known of them.

``zoo.json`` has them, each with its source. What could not be established is null and never guessed. All other pairs
that open_clip lists load as well, and nobody has tested them here.
"""

import json
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from finealign.backbone.load import list_backbones

FILE = "zoo.json"
# The licences that weights here have, and what a user must know of each; empty for those that ask for a notice alone.
LICENCES = {
    "MIT": "",
    "Apache-2.0": "",
    "CC-BY-NC-4.0": "not for commercial use",
    "Apple": "a licence of Apple's own, to be read in their repository",
}


@dataclass(frozen=True)
class KnownBackbone:
    """What is known of a pair of architecture and weights."""

    name: str  # ARCH/PRETRAINED
    licence: str  # one of LICENCES
    licence_from: str  # where that is stated
    repository: str  # of the hub, from which open_clip fetches the newest revision
    revision: str | None  # a commit of it that has the weights as safetensors, for hf-hub:REPOSITORY@REVISION
    sha256: str | None  # of the archive that the authors serve themselves; the hub's copy is another file
    input_size: int  # side in pixels
    imagenet: float  # zero-shot top-1 on ImageNet in percent, by open_clip's own table
    verified: str | None  # name of the result in docs/results that verifies it; None: nobody has

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def known_backbones() -> dict[str, KnownBackbone]:
    """The known backbones by name, in the order of the file."""
    return {entry["name"]: KnownBackbone(**entry) for entry in _read()["models"]}


def imagenet_source() -> str:
    """Where the ImageNet accuracies are stated."""
    return str(_read()["imagenet_from"])


def word_on(identifier: str) -> str:
    """What a user should know of a pair of open_clip before adapting it; empty for known pairs that all may use.

    Also empty for what is no such pair: a folder, a file, a repository of the hub, random weights.
    """
    known = known_backbones().get(identifier)
    if known is not None:
        condition = LICENCES[known.licence]
        return f"The weights of {identifier} are licensed {known.licence}: {condition}." if condition else ""
    if identifier not in list_backbones():
        return ""
    return (
        f"{identifier} is untested here: this project keeps no facts of it (`finealign models` lists those it does). "
        "`finealign doctor --verify` says how well it names drawn shapes."
    )


@cache
def _read() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(files(__package__).joinpath(FILE).read_text(encoding="utf-8"))
    return found
