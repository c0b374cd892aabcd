"""Models from the Hugging Face hub, with their commit, so that a run can record it and another run can request it."""

from pathlib import Path

# Only these are downloaded: the configuration, the tokenizer's files, and weights as safetensors (never pickles).
FILES = ("*.json", "*.txt", "*.model", "open_clip*.safetensors")


def fetch(name: str) -> tuple[Path, str]:
    """Download ``ORG/MODEL`` or ``ORG/MODEL@REVISION``. Returns the folder that holds it, and its commit.

    Files in the cache are not downloaded again. Errors of ``huggingface_hub`` are passed on unchanged.
    """
    from huggingface_hub import snapshot_download

    repo, _, revision = name.partition("@")
    folder = Path(snapshot_download(repo, revision=revision or None, allow_patterns=list(FILES)))
    return folder, folder.name  # the cache names the folder of a snapshot after its commit


def cached_commit(repo: str) -> str:
    """The commit that a repository's main branch pointed to when it was cached; empty if it is not in the cache."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    reference = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo, repo_type="model"), "refs", "main")
    return reference.read_text(encoding="utf-8").strip() if reference.is_file() else ""
