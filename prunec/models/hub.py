"""Models on the Hugging Face Hub: downloaded to its own cache, then opened as a directory."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from prunec.errors import ModelError
from prunec.models.quiet import quiet

_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FILES = ["*.json", "*.jinja", "*.model", "*.txt"]


def is_hub_id(spec: str) -> bool:
    """Whether a spec has the form of a Hub id: "name" or "owner/name"."""
    return _ID.fullmatch(spec) is not None


def download(spec: str, *, weights: bool, trust_remote_code: bool) -> Path:
    """The local directory of a Hub model; downloads what the Hub's own cache lacks.

    Never downloads pickles, nor code unless `trust_remote_code`.

    Raises:
        ModelError: no such model, no access to it, or the Hub cannot be reached.
    """
    files = [*_FILES, *(["*.safetensors"] if weights else []), *(["*.py"] * trust_remote_code)]
    try:
        with quiet():
            return Path(snapshot_download(spec, allow_patterns=files, ignore_patterns=["*/*"]))
    except GatedRepoError as error:
        fix = "ask for access on its page, then log in: hf auth login"
        raise ModelError(f"the Hub model {spec} needs permission", fix=fix) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise _absent(spec, "the Hub has no model of that name") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise _absent(spec, "the Hub cannot be reached, and its cache lacks the model") from error
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"cannot download {spec} from the Hub: {reason}") from error


def _absent(spec: str, why: str) -> ModelError:
    return ModelError(
        f"no model {spec!r}: no such path here, and {why}",
        fix="check the path or the name",
    )
