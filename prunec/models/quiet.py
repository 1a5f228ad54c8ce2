"""Hold back what transformers and the Hub's client print while prunec loads or runs a model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from logging import ERROR
from typing import Any

from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils.tqdm import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from transformers.utils import logging as transformers_logging

logging: Any = transformers_logging


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, warnings or log lines of the two inside; as it was afterwards.

    What matters in them (missing weights, wrong shapes) prunec checks and raises by itself.
    The state is the process's: other threads are silenced too.
    """
    verbosity, hub_verbosity = logging.get_verbosity(), hub_logging.get_verbosity()
    bars, hub_bars = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.set_verbosity_error()
        hub_logging.set_verbosity(ERROR)
        if bars:
            logging.disable_progress_bar()
        elif hub_bars:
            disable_progress_bars()
        try:
            with _no_gguf_bar():
                yield
        finally:
            logging.set_verbosity(verbosity)
            hub_logging.set_verbosity(hub_verbosity)
            if bars:
                logging.enable_progress_bar()
            if hub_bars:
                enable_progress_bars()
            elif bars:
                disable_progress_bars()


@contextmanager
def _no_gguf_bar() -> Iterator[None]:
    # Its reader calls tqdm itself, past transformers' own switch.
    reader: Any = import_module("transformers.modeling_gguf_pytorch_utils")
    bar = getattr(reader, "tqdm", None)
    if bar is None:
        yield
        return
    reader.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        reader.tqdm = bar
