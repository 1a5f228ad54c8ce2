"""What enters: a MODEL spec becomes a model, its tokenizer, and inputs to trace it with."""

from prunec.models.digest import state_digest
from prunec.models.example import example_inputs
from prunec.models.source import Source, open_model, open_tokenizer

__all__ = ["Source", "example_inputs", "open_model", "open_tokenizer", "state_digest"]
