"""An export to the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path

from gemma_mlx.errors import InputError

_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def check_push(repository: str) -> None:
    """Raise InputError where an upload could not work: a name that is none, or no token."""
    from huggingface_hub import get_token

    if not _NAME.fullmatch(repository):
        raise InputError(f"--push-to-hub {repository}: expected organisation/name")
    if not get_token():
        raise InputError("--push-to-hub: no token of the Hub; set HF_TOKEN or run: hf auth login")


def push(folder: Path, repository: str, private: bool = False) -> str:
    """Upload a folder; returns a line that says where it is.

    Raises:
        InputError: the Hub did not take it; it says why in one line.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        url = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Exported by gemma-mlx", ignore_patterns=[".cache/*"]
        )
    except Exception as error:  # offline, refused, no such organisation: huggingface_hub has a dozen classes for these
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"--push-to-hub {repository}: the Hub did not take it ({reason}); the export is whole in {folder}"
        ) from error
    return f"uploaded to {url}"
