"""What a model costs and how well it predicts: perplexity, latency, memory, sizes."""

from prunec.evaluation.latency import Speed, measure
from prunec.evaluation.perplexity import Perplexity, perplexity
from prunec.evaluation.size import file_size, parameter_count

__all__ = ["Perplexity", "Speed", "file_size", "measure", "parameter_count", "perplexity"]
