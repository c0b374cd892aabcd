"""Models from the Hugging Face hub, with their commit, so that a run can record it and another run can request it."""

from pathlib import Path

from finealign.backbone.clip_folder import is_clip_folder
from finealign.backbone.identifiers import of_transformers
from finealign.backbone.model import CONFIG, WEIGHTS
from finealign.errors import BackboneError

PICKLES = {".bin", ".pt", ".pth", ".ckpt"}
# Only these are downloaded: the configuration, the tokenizer's files, and weights as safetensors (never pickles).
FILES = ("*.json", "*.txt", "*.model", "open_clip*.safetensors")
CLIP_WEIGHTS = "model*.safetensors"  # of transformers' CLIPModel


def fetch(name: str) -> tuple[Path, str]:
    """Download ``ORG/MODEL`` or ``ORG/MODEL@REVISION``. Returns the folder that holds it, and its commit.

    Files in the cache are not downloaded again. Raises BackboneError if the repository holds no model for open_clip and
    no CLIPModel of transformers, or no safetensors weights of it. Errors of ``huggingface_hub`` are passed on
    unchanged.
    """
    from huggingface_hub import snapshot_download

    repo, _, revision = name.partition("@")
    if told := of_transformers(repo):
        raise BackboneError(told)
    folder = Path(snapshot_download(repo, revision=revision or None, allow_patterns=list(FILES)))
    commit = folder.name  # the cache names the folder of a snapshot after its commit
    if not (folder / CONFIG).is_file() and is_clip_folder(folder):
        folder = Path(snapshot_download(repo, revision=commit, allow_patterns=[*FILES, CLIP_WEIGHTS]))
        if not list(folder.glob(CLIP_WEIGHTS)):
            raise BackboneError(_without_weights(repo, commit))
        return folder, commit
    if not (folder / CONFIG).is_file():
        raise BackboneError(
            f"The repository {repo} holds no model for open_clip: {CONFIG} is not in it. Choose another repository, or "
            "a pair from `finealign models`."
        )
    if not list(folder.glob("open_clip*.safetensors")):
        raise BackboneError(_without_weights(repo, commit))
    return folder, commit


def _without_weights(repo: str, commit: str) -> str:
    """The message for a repository with the configuration and no safetensors weights."""
    from huggingface_hub import list_repo_files

    try:
        found = [name for name in list_repo_files(repo, revision=commit) if Path(name).suffix in PICKLES]
    except Exception:  # the hub's client raises many types; the message can do without the names
        found = []
    has = f"its weights as {', '.join(found[:3])} alone" if found else f"no {WEIGHTS}"
    return (
        f"The repository {repo} has {has}. Wanted: {WEIGHTS}, as other formats can hold code and are not taken from a "
        f"hub. If you trust the repository: hf download {repo} --local-dir FOLDER, then --backbone local-dir:FOLDER."
    )


def cached_commit(repo: str) -> str:
    """The commit that a repository's main branch pointed to when it was cached; empty if it is not in the cache."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    reference = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo, repo_type="model"), "refs", "main")
    return reference.read_text(encoding="utf-8").strip() if reference.is_file() else ""
