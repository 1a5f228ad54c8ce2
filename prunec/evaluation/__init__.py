"""What a model costs and how well it predicts.

perplexity    on a text in windows, or on batches; the papers' protocols by name
divergence    KL and top-1 agreement with the dense model
tasks         lm-eval tasks, through its own API
accuracy      masked tokens, and classes from a user's data loader
latency       prefill, decode, memory
comparison    several models in one table, with retention against the base
"""

from prunec.evaluation.accuracy import Accuracy, accuracy, loaded_accuracy, masked_accuracy
from prunec.evaluation.comparison import Comparison, Evaluation, Metric
from prunec.evaluation.divergence import Divergence, divergence
from prunec.evaluation.latency import Speed, measure
from prunec.evaluation.perplexity import Perplexity, batch_nll, perplexity
from prunec.evaluation.protocols import PROTOCOLS, named_protocol, wikitext2_test
from prunec.evaluation.size import file_size, parameter_count
from prunec.evaluation.tasks import TaskScore, task_scores

__all__ = [
    "PROTOCOLS",
    "Accuracy",
    "Comparison",
    "Divergence",
    "Evaluation",
    "Metric",
    "Perplexity",
    "Speed",
    "TaskScore",
    "accuracy",
    "batch_nll",
    "divergence",
    "file_size",
    "loaded_accuracy",
    "masked_accuracy",
    "measure",
    "named_protocol",
    "parameter_count",
    "perplexity",
    "task_scores",
    "wikitext2_test",
]
