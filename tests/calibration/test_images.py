"""A folder of images, through the model's own processor."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_readers import bert, vit, write_images, write_vit
from torch import nn

from prunec.calibration import Calibration, calibrate
from prunec.errors import CalibrationError, PluginError

pytest.importorskip("PIL")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return write_vit(tmp_path_factory.mktemp("vit"))


def drawn(folder: Path, model: Any, **options: Any) -> Calibration:
    return calibrate([str(folder)], model=model, **{"samples": 4, **options})


def test_images_are_what_the_processor_makes_of_them(tmp_path: Path, model: Any) -> None:
    from PIL import Image
    from transformers import AutoImageProcessor

    folder = write_images(tmp_path / "photos", "b.png", "a.png", "c.jpeg", "notes/d.png")
    (folder / "readme.txt").write_text("not an image")
    got = drawn(folder, model)
    (batch,) = got.batches
    assert set(batch) == {"pixel_values"}
    processor = AutoImageProcessor.from_pretrained(model.config._name_or_path)
    with Image.open(folder / "a.png") as image:
        wanted = processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"][:1], wanted)
    (source,) = got.sources
    assert (source.kind, source.samples, source.tokens) == ("images", 4, 0)


def test_folders_are_classes(tmp_path: Path, model: Any) -> None:
    named = write_images(tmp_path / "named", "dog/1.png", "cat/2.png", "dog/3.png")
    (batch,) = drawn(named, model, batch_size=3).batches
    assert batch["labels"].tolist() == [0, 1, 1]
    numbered = write_images(tmp_path / "numbered", "x/1.png", "y/2.png")
    (batch,) = drawn(numbered, model, batch_size=2).batches
    assert batch["labels"].tolist() == [0, 1]
    many = write_images(tmp_path / "many", "a/1.png", "b/2.png", "c/3.png")
    with pytest.raises(CalibrationError, match="has no class 2"):
        drawn(many, model)


def test_a_part_of_the_folder_is_drawn(tmp_path: Path, model: Any) -> None:
    folder = write_images(tmp_path / "photos", *(f"{i}.png" for i in range(9)))
    first, again, other = (drawn(folder, model, seed=seed).digest for seed in (0, 0, 3))
    assert first == again
    assert first != other
    assert drawn(folder, model, samples=100).sources[0].samples == 9


def test_unusable_folders(tmp_path: Path, model: Any) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CalibrationError, match="holds no images"):
        drawn(tmp_path / "empty", model)
    broken = write_images(tmp_path / "broken", "a.png")
    (broken / "b.png").write_bytes((broken / "a.png").read_bytes()[:40])
    with pytest.raises(CalibrationError, match=r"b\.png cannot be read as an image"):
        drawn(broken, model)
    (broken / "b.png").write_text("no image at all")
    with pytest.raises(CalibrationError, match=r"b\.png cannot be read as an image"):
        drawn(broken, model)
    folder = write_images(tmp_path / "photos", "a.png")
    for other in (bert(), nn.Linear(2, 2), None):
        with pytest.raises(CalibrationError, match="the model reads no images"):
            drawn(folder, other)
    with pytest.raises(CalibrationError, match="has no image processor"):
        drawn(folder, vit())


def test_without_pillow_the_extra_is_named(
    tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_images(tmp_path / "photos", "a.png")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(PluginError, match="Pillow") as caught:
        drawn(folder, model)
    assert "prunec[data]" in str(caught.value)
