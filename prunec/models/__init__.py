"""What enters: a MODEL spec becomes a model, its tokenizer, and inputs to trace it with."""

from prunec.models.digest import state_digest
from prunec.models.example import example_inputs
from prunec.models.source import Source, find_model, open_model, open_tokenizer

__all__ = ["Source", "example_inputs", "find_model", "open_model", "open_tokenizer", "state_digest"]
