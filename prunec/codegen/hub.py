"""A delivered directory on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from prunec.errors import ExportError


def push(directory: Path, repo: str, *, private: bool = False, token: str | None = None) -> str:
    """Upload a directory as one commit of a model repository, created if absent; its address.

    Raises:
        ExportError: the Hub cannot be reached, refuses the token, or the name is no repository's.
    """
    api = HfApi(token=token)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo, folder_path=directory, commit_message="Pruned by prunec"
        )
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ExportError(
            f"the Hub does not take it: {reason}",
            where=repo,
            fix="check the name, and `hf auth login`",
        ) from error
    return str(getattr(done, "repo_url", done))
