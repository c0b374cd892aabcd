"""Models from a hub: which commit they are of, so that a run can say it and another can name it."""

from pathlib import Path

# Weights as safetensors alone, the configuration, and what a tokenizer is read from.
FILES = ("*.json", "*.txt", "*.model", "open_clip*.safetensors")


def fetch(name: str) -> tuple[Path, str]:
    """``ORG/MODEL`` or ``ORG/MODEL@REVISION`` as a folder that holds it, and its commit.

    What is in the cache is not fetched again. Raises what the hub's library raises.
    """
    from huggingface_hub import snapshot_download

    repo, _, revision = name.partition("@")
    folder = Path(snapshot_download(repo, revision=revision or None, allow_patterns=list(FILES)))
    return folder, folder.name


def cached_commit(repo: str) -> str:
    """The commit of a repository's cached files that its main branch led to; empty where none is cached."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    reference = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo, repo_type="model"), "refs", "main")
    return reference.read_text(encoding="utf-8").strip() if reference.is_file() else ""
