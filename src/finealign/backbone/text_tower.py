"""Text towers of transformers (RoBERTa, mT5, BERT and the like), built without a hub.

open_clip asks the hub for the configuration of such a tower, which says no more than its sizes. A saved model has it in
``text_tower/config.json``. Where it is not to be had, the tower's weights are kept as they are: images need none of it.
"""

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor, nn

from finealign.errors import BackboneError, sentence
from finealign.runtime.atomic import save_text

TEXT_TOWER, TOWER_CONFIG = "text_tower", "config.json"
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model")
STUB = {"width": 8, "heads": 1, "layers": 1, "vocab_size": 2, "context_length": 2}  # built, then thrown away


class TextTowerError(BackboneError):
    """The text tower or its tokenizer cannot be built here; images can be encoded without them."""


def is_transformers(config: Mapping[str, Any]) -> bool:
    """Whether the text tower of this model_cfg is one of transformers."""
    return bool(config["text_cfg"].get("hf_model_name"))


def needs_transformers(config: Mapping[str, Any]) -> bool:
    """Whether the text tower of this model_cfg, or its tokenizer, is one of transformers."""
    return is_transformers(config) or bool(config["text_cfg"].get("hf_tokenizer_name"))


def kept_in(folder: Path, config: Mapping[str, Any]) -> Path | None:
    """The folder in an open_clip folder that has the text tower's configuration; None where there is none."""
    if not is_transformers(config):
        return None
    named = str(config["text_cfg"]["hf_model_name"])
    places = [folder / TEXT_TOWER, folder / named]
    return next((place for place in places if (place / TOWER_CONFIG).is_file()), None)


def described_by(place: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The text_cfg by which open_clip builds the text tower that the folder ``place`` describes.

    Raises ValueError for a description that asks for code of its own to be run.
    """
    if "auto_map" in tower_settings(place):
        raise ValueError(f"{TEXT_TOWER}/{TOWER_CONFIG} asks for code of its own to be run, by auto_map; remove that")
    return {**config["text_cfg"], "hf_model_name": str(place), "hf_model_pretrained": False}


def tower_settings(place: Path) -> dict[str, Any]:
    """The configuration of transformers in a folder. Raises ValueError if it is none."""
    found = json.loads((place / TOWER_CONFIG).read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"{TEXT_TOWER}/{TOWER_CONFIG} is no configuration of transformers")
    return found


def require_tower(config: Mapping[str, Any], identifier: str, kept: Path | None = None) -> None:
    """Raises TextTowerError where transformers cannot read the configuration of the text tower.

    ``kept`` is the folder that has it; None where it is on a hub, or in the cache of one.
    """
    try:
        from transformers import AutoConfig

        AutoConfig.from_pretrained(kept or config["text_cfg"]["hf_model_name"], trust_remote_code=False)
    except Exception as error:  # transformers and the hub's client raise many types
        raise unavailable(identifier, config, error) from error


def unavailable(identifier: str, config: Mapping[str, Any], error: Exception) -> TextTowerError:
    """The error for a text tower or a tokenizer of transformers that does not load because of ``error``."""
    text = config["text_cfg"]
    part = "text tower" if is_transformers(config) else "tokenizer"
    name = text.get("hf_model_name") or text.get("hf_tokenizer_name")
    reason = " ".join(str(error).split()).partition(". ")[0] or type(error).__name__  # what follows is advice of theirs
    return TextTowerError(
        f"{identifier} cannot encode texts here: its {part} is {str(name)!r:.200} of transformers, which is not to be "
        f"had: {sentence(reason)} Wanted: transformers (pip install 'finealign[export]') and a hub within reach; or a "
        f"folder that has the tokenizer's files and, for a text tower, its configuration as "
        f"{TEXT_TOWER}/{TOWER_CONFIG}, as models that finealign saves have them."
    )


def read_tokenizer(name: str, config: Mapping[str, Any], identifier: str) -> Any:
    """The tokenizer of what open_clip calls ``name``. Raises TextTowerError if one of transformers does not load."""
    import open_clip

    options: dict[str, Any] = {}
    if window := config["text_cfg"].get("context_length"):
        options["context_length"] = window
    if not needs_transformers(config):
        return open_clip.get_tokenizer(name, **options)
    try:
        # transformers would otherwise ask at the terminal whether to run code that came with a tokenizer.
        return open_clip.get_tokenizer(name, **options, trust_remote_code=False)
    except Exception as error:  # transformers and the hub's client raise many types
        raise unavailable(identifier, config, error) from error


def save_text_tower(model: Any, config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Write the configuration of a text tower of transformers into ``folder``, and return the model_cfg to go with it.

    The name of the tower on a hub stays in it, for open_clip; a path of this machine does not.
    """
    kept: dict[str, Any] = copy.deepcopy(dict(config))
    if not is_transformers(kept):
        return kept
    tower = model.text
    values = tower.settings if isinstance(tower, StoredTower) else tower.config.to_diff_dict()
    if not values:  # what is stored came without a description
        return kept
    place = folder / TEXT_TOWER
    place.mkdir(exist_ok=True)
    save_text(json.dumps({**values, "_name_or_path": ""}, indent=1, default=str) + "\n", place / TOWER_CONFIG)
    named = Path(kept["text_cfg"]["hf_model_name"])
    if named.is_absolute() or named.exists():
        kept["text_cfg"]["hf_model_name"] = TEXT_TOWER
    return kept


# --- where it is not to be had ----------------------------------------------------------------------------------------


class StoredTower(nn.Module):
    """The weights of a text tower that cannot be built here: they are saved with the model and refuse texts.

    ``settings`` are its configuration where that is known, else empty; ``why`` is the message for texts.
    """

    def __init__(self, weights: Mapping[str, Tensor], settings: Mapping[str, Any], why: str) -> None:
        super().__init__()
        self.weights = dict(weights)
        self.settings = dict(settings)
        self.why = why

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination.update({f"{prefix}{name}": value for name, value in self.weights.items()})

    def forward(self, *_: Any) -> NoReturn:
        """Raises BackboneError."""
        raise BackboneError(self.why)


class MissingTokenizer:
    """Stands for a tokenizer of transformers that does not load, and refuses texts; its files are in ``folder``."""

    def __init__(self, folder: Path, why: str) -> None:
        self.folder = folder
        self.why = why

    @property
    def tokenizer(self) -> "MissingTokenizer":
        """What is saved with the model, as of open_clip's wrapper around tokenizers of transformers."""
        return self

    def save_pretrained(self, folder: Path) -> None:
        """Copy the tokenizer's files into ``folder``."""
        for path in {path for pattern in TOKENIZER for path in self.folder.glob(pattern)}:
            if path.is_file() and not (folder / path.name).exists():
                shutil.copyfile(path, folder / path.name)

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        """Raises BackboneError."""
        raise BackboneError(self.why)
