"""Data sets on the Hugging Face Hub, by the datasets package, which is optional."""

from __future__ import annotations

from typing import Any

from prunec.errors import CalibrationError, PluginError
from prunec.events import Progress, silent
from prunec.models.quiet import quiet


def hub_rows(name: str, subset: str | None, split: str, progress: Progress = silent) -> Any:
    """A split of a data set on the Hub, as rows by column name.

    Raises:
        PluginError: the datasets package is not installed.
        CalibrationError: no such data set, or it cannot be fetched.
    """
    try:
        import datasets
    except ImportError as error:
        raise PluginError(
            "data sets of the Hub need the datasets package", fix="pip install 'prunec[recovery]'"
        ) from error
    with progress.task(f"fetch {name}"), quiet():
        try:
            return datasets.load_dataset(name, subset, split=split)
        except (OSError, ValueError) as error:  # absent, offline, no such split
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CalibrationError(
                f"the data set {name} cannot be had: {reason}",
                fix="check the name and the network, or give a file",
            ) from error
