"""Data sets on the Hugging Face Hub or in a directory, by the datasets package, an extra."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prunec.errors import CalibrationError, PluginError
from prunec.events import Progress, silent
from prunec.models.quiet import quiet


def hub_rows(
    name: str,
    subset: str | None,
    split: str,
    progress: Progress = silent,
    *,
    most: int | None = None,
) -> Sequence[Mapping[str, Any]]:
    """A split of a data set, as rows by column name.

    Args:
        name: on the Hub, or a directory that holds one.
        most: only the first so many, read as they come where the network is in use: then what
            lies behind them is not downloaded. A split with a slice, ``train[:1%]``, is.

    Raises:
        PluginError: the datasets package is not installed.
        CalibrationError: no such data set, or it cannot be fetched.
    """
    try:
        import datasets
    except ImportError as error:
        raise PluginError(
            "data sets of the Hub need the datasets package", fix="pip install 'prunec[data]'"
        ) from error
    streaming = most is not None and "[" not in split and not datasets.config.HF_HUB_OFFLINE
    with progress.task(f"fetch {name}"), quiet():
        try:
            if Path(name).expanduser().is_dir() and _was_saved(Path(name).expanduser()):
                rows = _saved(Path(name).expanduser(), split)
            else:
                rows = datasets.load_dataset(name, subset, split=split, streaming=streaming)
            return rows if most is None else list(rows.take(most))
        # Absent, offline, no such split; what reads a file's format has errors of its own.
        except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CalibrationError(
                f"the data set {name} cannot be had: {reason}",
                fix="check the name and the network, or give a file",
            ) from error


def _was_saved(folder: Path) -> bool:
    """Whether Dataset.save_to_disk wrote a folder, which load_dataset does not open."""
    return (folder / "state.json").exists() or (folder / "dataset_dict.json").exists()


def _saved(folder: Path, split: str) -> Any:
    import datasets

    found = datasets.load_from_disk(str(folder))
    return found[split] if isinstance(found, datasets.DatasetDict) else found
