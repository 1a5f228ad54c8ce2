"""What turns images into a model's inputs, where it lies beside the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from transformers import AutoImageProcessor

from prunec.errors import PluginError
from prunec.models.quiet import quiet


def image_processor(model: nn.Module) -> Callable[..., Mapping[str, Any]] | None:
    """The image processor of a model that was opened from a directory or the Hub's cache.

    Returns:
        None where there is none, or the model's main input is no image.

    Raises:
        PluginError: it needs a package that is absent.
    """
    config: Any = getattr(model, "config", None)
    home = getattr(config, "_name_or_path", "")
    if getattr(model, "main_input_name", None) != "pixel_values" or not home:
        return None
    load: Any = AutoImageProcessor.from_pretrained
    try:
        with quiet():
            found: Callable[..., Mapping[str, Any]] = load(home, local_files_only=True)
    except ImportError as error:
        raise PluginError(
            f"images need another package: {error}", fix="pip install 'prunec[data]'"
        ) from error
    except (OSError, ValueError, TypeError):  # no such file, or of a kind it does not know
        return None
    return found
