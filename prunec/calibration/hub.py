"""Data sets on the Hugging Face Hub or in a directory, by the datasets package, an extra."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from logging import CRITICAL
from pathlib import Path
from typing import Any

from prunec.errors import CalibrationError, PluginError
from prunec.events import Progress, silent
from prunec.models.quiet import quiet


def hub_rows(
    name: str,
    subset: str | None,
    split: str | None,
    progress: Progress = silent,
    *,
    most: int | None = None,
) -> Sequence[Mapping[str, Any]]:
    """A split of a data set, as rows by column name.

    Args:
        name: on the Hub, or a directory that holds one.
        split: train where none is named.
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
    part, folder = split or "train", Path(name).expanduser()
    streaming = most is not None and "[" not in part and not datasets.config.HF_HUB_OFFLINE
    with progress.task(f"fetch {name}"), quiet(), _hushed(datasets):
        try:
            if folder.is_dir() and _was_saved(folder):
                rows = _saved(folder, subset, split)
            else:
                rows = datasets.load_dataset(name, subset, split=part, streaming=streaming)
            return rows if most is None else list(rows.take(most))
        # Absent, offline, no such split; what reads a file's format has errors of its own.
        except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
            cause = error.__cause__ or error  # that it could not be made says less than why
            reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
            raise CalibrationError(
                f"the data set {name} cannot be had: {reason}",
                fix="check the name and the network, or give a file",
            ) from error


def _was_saved(folder: Path) -> bool:
    """Whether Dataset.save_to_disk wrote a folder, which load_dataset does not open."""
    return (folder / "state.json").exists() or (folder / "dataset_dict.json").exists()


def _saved(folder: Path, subset: str | None, split: str | None) -> Any:
    """What was saved: one split, or several by name.

    Raises:
        ValueError: it has not what was named.
    """
    import datasets

    found = datasets.load_from_disk(str(folder))
    if isinstance(found, datasets.DatasetDict):
        named, wanted = {str(name): rows for name, rows in found.items()}, split or "train"
    else:
        named, wanted = {str(found.split or ""): found}, split or str(found.split or "")
    if subset or wanted not in named:
        splits = ", ".join(filter(None, named)) or "one split without a name"
        raise ValueError(f"it was saved with {splits}, and without subsets")
    return named[wanted]


@contextmanager
def _hushed(datasets: Any) -> Iterator[None]:
    """Without the progress bars and log lines of the package: what matters is in its errors."""
    level, shown = datasets.logging.get_verbosity(), not datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if shown:
            datasets.enable_progress_bars()
