"""Generation without a model's own settings: what it computes, not what its makers tuned."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig

from prunec.models.quiet import quiet


def generates(model: Any) -> bool:
    """Whether a model continues text: a decoder with generate()."""
    if not hasattr(model, "can_generate") or not model.can_generate():
        return False
    config: Any = getattr(model, "config", None)
    return not getattr(config, "is_encoder_decoder", False)


@contextmanager
def plain_generation(model: Any, padding: int) -> Iterator[None]:
    """Inside, generate() is greedy search with a KV cache, ended by length alone.

    generate() fills whatever a call leaves open from the model's own settings (end marks,
    penalties, sampling), so they are put aside and restored. Nothing is printed.
    """
    own = model.generation_config
    config: Any = GenerationConfig
    model.generation_config = config(use_cache=True, pad_token_id=padding)
    try:
        with quiet():
            yield
    finally:
        model.generation_config = own
