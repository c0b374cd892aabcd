"""What a backbone's identifier probably means that cannot be loaded as it stands, and what to type instead."""

import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from finealign.backbone.clip_folder import is_clip_folder, what_transformers_saved
from finealign.backbone.model import CONFIG, WEIGHTS
from finealign.config import WEIGHT_FILES
from finealign.errors import display_path

WANTED = (
    "Wanted: ARCH/PRETRAINED (as ViT-B-32-quickgelu/openai), ARCH/FILE (as ViT-B-32/epoch_10.pt), ARCH/random, "
    "hf-hub:ORG/NAME or local-dir:FOLDER. "
    "`finealign models` lists the pairs."
)
# Repositories of transformers' models, whose weights open_clip has under names of its own.
OPENAI = {
    "openai/clip-vit-base-patch32": "ViT-B-32-quickgelu/openai",
    "openai/clip-vit-base-patch16": "ViT-B-16-quickgelu/openai",
    "openai/clip-vit-large-patch14": "ViT-L-14-quickgelu/openai",
    "openai/clip-vit-large-patch14-336": "ViT-L-14-336-quickgelu/openai",
}
_HUB = re.compile(r"^(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/|^(?:hf|huggingface|hub|hf_hub)[:/]+")
_FOLDER = re.compile(r"^(?:local[_-]?dir|dir|folder|path|file)(?:://|:)")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(?:@[\w.-]+)?")


def explain_identifier(identifier: str, pairs: Sequence[str]) -> str:
    """The message for an identifier whose architecture is unknown; ``pairs`` are all ``ARCH/PRETRAINED``."""
    shown = f"Backbone {identifier!r:.200}"
    repository = _HUB.sub("", identifier).rstrip("/")
    if told := _of_path(identifier) or of_transformers(repository):
        return told
    for kind, name in (("hf-hub:", repository), ("local-dir:", _FOLDER.sub("", identifier))):
        if name != identifier:
            return f"{shown} is not spelled as it should be. Type {kind}{name}. {WANTED}"
    if alike := _alike(identifier, pairs):
        few = " or ".join(alike[:3]) + (f" ({len(alike) - 3} more have other weights)" if len(alike) > 3 else "")
        lacks = "is no pair as spelled here" if "/" in identifier else "names no weights"
        return f"{shown} {lacks}. Did you mean {few}? {WANTED}"
    if "/" not in identifier:
        return f"{shown} names no weights. {WANTED}"
    told = f"Unknown architecture {identifier.rpartition('/')[0]!r:.200} in the backbone {identifier!r:.200}."
    if nearest := _nearest(identifier, pairs):
        told += f" Did you mean {nearest!r}?"
    if _REPOSITORY.fullmatch(identifier):
        told += f" If it is a repository of the Hugging Face hub, type hf-hub:{identifier}."
    return f"{told} A folder is named by local-dir:FOLDER; here is none called so. {WANTED}"


def of_transformers(repository: str) -> str:
    """The message for a repository of OpenAI's weights for transformers; else an empty text."""
    pair = OPENAI.get(repository.partition("@")[0].casefold())
    if pair is None:
        return ""
    return f"{repository!r} is a repository for transformers, not open_clip. The same weights are {pair}: type that."


def not_open_clips(folder: Path) -> str:
    """The message for a folder without open_clip's configuration."""
    shown = display_path(folder)
    told = f"No open_clip model in {shown}: {CONFIG} is not there. Wanted: a folder with {CONFIG} and {WEIGHTS}."
    try:
        names = {path.name for path in folder.iterdir()}
    except OSError:
        return told
    if transformers := what_transformers_saved(folder):
        return f"{told} {transformers}"
    if files := sorted(name for name in names if name.lower().endswith(WEIGHT_FILES)):
        return f"{told} There are weights alone: type ARCH/{shown}/{files[-1]}, with the architecture for ARCH."
    inner = sorted(name for name in names if (folder / name / CONFIG).is_file() or is_clip_folder(folder / name))
    return f"{told} There is one in local-dir:{shown}/{inner[0]}." if inner else told


def missing_file(architecture: str, path: str) -> str:
    """The message where ``path``, in ``ARCH/path``, is no file of weights; else an empty text."""
    file = Path(path).expanduser()
    try:
        if file.is_file():
            return ""
        told = f"No file of weights {display_path(file)}{', but a folder' if file.is_dir() else ''}."
        if not file.is_absolute() and Path("/", path).is_file():
            return f"{told} There is /{path}: type {architecture}//{path}, with two slashes."
    except (OSError, ValueError):
        return f"No file of weights {path!r:.200}."
    return f"{told} Wanted: {architecture}/FILE, the path from this folder, or {architecture}//FILE from the root."


def folder_of_files(architecture: str, path: str) -> str:
    """The message where ``path``, in ``ARCH/path``, is a folder or a file of another ending; else an empty text."""
    try:
        there = Path(path).expanduser()
        if there.is_file():
            return f"{path!r:.200} has none of the endings of weights: {', '.join(WEIGHT_FILES)}. Rename it."
        files = sorted(file.name for file in there.iterdir() if file.name.lower().endswith(WEIGHT_FILES))
    except (OSError, ValueError, RuntimeError):
        return ""
    if files:
        return f"{path!r:.200} is a folder. Type the file of weights: {architecture}/{path.rstrip('/')}/{files[-1]}."
    return f"{path!r:.200} is a folder without files of weights ({', '.join(WEIGHT_FILES)})."


def _of_path(identifier: str) -> str:
    """The message where the identifier is a path that is there or looks like one; else an empty text."""
    try:
        path = Path(identifier).expanduser()
        folder, file = path.is_dir(), path.is_file()
    except (OSError, ValueError, RuntimeError):
        return ""
    if identifier and folder and ((path / CONFIG).is_file() or is_clip_folder(path)):
        return f"Backbone {identifier!r:.200} is a folder. Type local-dir:{identifier}."
    if identifier and folder:
        return f"Backbone {identifier!r:.200} is a folder, which is named by local-dir:FOLDER. {not_open_clips(path)}"
    if file and identifier.lower().endswith(WEIGHT_FILES):
        return (
            f"Backbone {identifier!r:.200} is a file of weights. Type the architecture that was trained before it: "
            f"ARCH/{identifier}, as ViT-B-32/{identifier}."
        )
    if file:
        return f"Backbone {identifier!r:.200} is a file. Wanted: local-dir:FOLDER, in it {CONFIG} and {WEIGHTS}."
    if identifier.startswith(("/", "./", "../", "~")):
        return f"Backbone {identifier!r:.200} looks like a folder, but there is none. {WANTED}"
    return ""


def _alike(identifier: str, pairs: Sequence[str]) -> list[str]:
    """The pairs that differ in case, separators and QuickGELU alone; else those whose architecture does."""
    wanted = _plain(identifier)
    exact = [pair for pair in pairs if _plain(pair) == wanted]
    if exact:
        return exact
    architectures = [pair for pair in pairs if _plain(pair.rpartition("/")[0]) == wanted]
    # OpenAI's weights first: they are those of the paper.
    return sorted(architectures, key=lambda pair: (not pair.endswith("/openai"), pair))


def _nearest(identifier: str, pairs: Sequence[str]) -> str:
    by_plain = {_plain(pair): pair for pair in pairs}
    found = get_close_matches(_plain(identifier), by_plain, n=1, cutoff=0.8)
    return by_plain[found[0]] if found else ""


def _plain(name: str) -> str:
    """The name in lower case, with one separator for all, without QuickGELU and the unit of the image size."""
    words = re.sub(r"[^a-z0-9]+", "-", name.casefold().removesuffix("px").replace("px/", "/")).strip("-")
    return words.replace("-quickgelu", "")
