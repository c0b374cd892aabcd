"""Upload of an export to a model hub."""

from pathlib import Path

from finealign.errors import OutputError, sentence
from finealign.export.companions import PARITY


def push(folder: Path, repository: str, private: bool) -> str:
    """Upload an export to the hub's model repository ``ORG/NAME``, created if it does not exist, and return its URL.

    The token is taken from the environment or from the hub's own login. Raises OutputError when the folder is not an
    export, when the upload fails, and when ``private`` is set but the existing repository is public.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if not (folder / PARITY).is_file():
        raise OutputError(f"{folder} is no export: {PARITY} is missing. Wanted: a folder of `finealign export`.")
    silent = are_progress_bars_disabled()
    try:
        disable_progress_bars()
        api = HfApi()
        address = str(api.create_repo(repository, private=private or None, exist_ok=True))
        if private and not api.model_info(repository).private:
            raise OutputError(
                f"The repository {repository} is there already and public, so nothing was uploaded. Make it private "
                "on the hub, choose another name, or leave --private out."
            )
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="Upload an export of finealign",
            ignore_patterns=["__pycache__/*"],
        )
    except OutputError:
        raise
    except Exception as error:  # of many types: no network, no token, a wrong name, no right to write
        raise OutputError(
            f"{folder} cannot be uploaded to {repository}: {sentence(error)} The export "
            "itself is whole. `hf auth login` or HF_TOKEN says who you are."
        ) from error
    finally:
        if not silent:
            enable_progress_bars()
    return address
