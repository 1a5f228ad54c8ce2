"""A folder of images, as the model's own image processor reads them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunec.calibration.forms import Fields, class_names, class_number
from prunec.calibration.text import seeded
from prunec.errors import CalibrationError, PluginError
from prunec.events import Progress
from prunec.models.processors import image_processor

_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def image_samples(
    folder: Path, model: nn.Module | None, count: int, seed: int, progress: Progress
) -> list[Fields]:
    """`count` images of a folder, drawn from `seed`; fewer where there are fewer.

    Folders inside it are classes: by the model's name for the class where all have one, else by
    number, in the order of their names. They give `labels` to a model that learns classes.

    Raises:
        CalibrationError: a model that does not read images or has no image processor; no image,
            a file that cannot be read as one; more classes than the model has.
        PluginError: Pillow is not installed.
    """
    processor = _processor(folder, model)
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file())
    if not paths:
        raise CalibrationError(
            f"{folder.name} holds no images",
            where=str(folder),
            fix=f"files of these kinds are read: {' '.join(sorted(_SUFFIXES))}",
        )
    assert model is not None
    label, dtype = _labels(folder, paths, model), next(model.parameters()).dtype
    order = torch.randperm(len(paths), generator=seeded(seed, f"{len(paths)} images"))[:count]
    samples = []
    with progress.task(f"reading {folder.name}", len(order)) as task:
        for index in sorted(order.tolist()):
            path = paths[index]
            samples.append(_read(path, processor, dtype) | label(path))
            task.advance()
    return samples


def _processor(folder: Path, model: Any) -> Callable[..., Mapping[str, Any]]:
    if getattr(model, "main_input_name", None) != "pixel_values":
        raise CalibrationError(
            f"{folder} is a directory, and the model reads no images",
            fix="name a text file; a plain nn.Module is calibrated by a loader:"
            " package.module:loader",
        )
    found = image_processor(model)
    if found is None:
        raise CalibrationError(
            "the model has no image processor, so images cannot be its calibration",
            where=str(model.config._name_or_path or type(model).__name__),
            fix="put its preprocessor_config.json beside the weights, or use a loader:"
            " package.module:loader",
        )
    return found


def _read(path: Path, processor: Callable[..., Mapping[str, Any]], dtype: torch.dtype) -> Fields:
    try:
        from PIL import Image
    except ImportError as error:
        raise PluginError("images need Pillow", fix="pip install 'prunec[data]'") from error
    try:
        with Image.open(path) as image:
            given = processor(images=image.convert("RGB"), return_tensors="pt")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise CalibrationError(
            f"{path.name} cannot be read as an image: {error}",
            where=str(path),
            fix="mend or remove it",
        ) from error
    return {
        name: v[0].to(dtype) if v.is_floating_point() else v[0]
        for name, v in given.items()
        if isinstance(v, Tensor)
    }


def _labels(folder: Path, paths: list[Path], model: Any) -> Callable[[Path], Fields]:
    """What gives the class of an image: nothing where there are none to learn."""
    names = sorted({p.relative_to(folder).parts[0] for p in paths if p.parent != folder})
    flat = any(p.parent == folder for p in paths)
    classes = class_names(model.config)
    learns = "labels" in inspect.signature(model.forward).parameters
    if not names or flat or not learns:
        return lambda path: {}
    known = all(name in classes for name in names)
    numbers = {name: class_number(classes, name if known else i) for i, name in enumerate(names)}
    return lambda path: {"labels": torch.tensor(numbers[path.relative_to(folder).parts[0]])}
