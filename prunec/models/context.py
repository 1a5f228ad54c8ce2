"""How much a model reads at once."""

from __future__ import annotations

from typing import Any

from torch import nn

from prunec.events import Progress


def context_length(model: nn.Module | None) -> int | None:
    """The most tokens that the positions of a model reach; None where its config sets no limit."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit: int | None = getattr(text, "max_position_embeddings", None)
    return limit if limit and limit > 0 else None  # some say -1 for none


def fitting(default: int, limit: int | None, progress: Progress) -> int:
    """`default` tokens at once, or the `limit` of the model where that is fewer, which is said."""
    if limit is None or limit >= default:
        return default
    progress.message(f"The model reads at most {limit} tokens: {limit} at once, not {default}.")
    return limit
