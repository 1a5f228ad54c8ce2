"""The dense model's predictions, and how far those of a pruned model are from them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from prunec.errors import PlanError
from prunec.graph.padding import Padding
from prunec.graph.program import Program

# All predictions that are held, together: a token of a vocabulary of 262,144 has 1 MiB of them.
_BYTES = 2**30
# Tokens that are compared at a time.
_CHUNK = 64


class Predictions:
    """The dense model's log-probabilities at some tokens of each batch, fp32.

    They are the log-softmax over the last axis of the program's output. Padding is left out.
    Tokens are drawn without replacement where a batch has more than `most`, or where all of them
    would take more than 1 GiB.

    Args:
        program: the dense program; tells which tokens of its output are padding.
        batches: its inputs.
        outputs: its output by batch, [..., classes]; read one by one.
        most: tokens of a batch; None for all.
        seed: draws the tokens.
    """

    def __init__(
        self,
        program: Program,
        batches: Sequence[Mapping[str, Tensor]],
        outputs: Iterable[Tensor],
        *,
        most: int | None = None,
        seed: int = 0,
    ):
        padding = Padding(program, batches)
        (result,) = program.graph.find_nodes(op="output")
        generator = torch.Generator().manual_seed(seed)
        self._dense: list[tuple[Tensor, Tensor]] = []
        for number, output in enumerate(outputs):
            real = padding.real_tokens(number, result.args[0][0], output)
            shown = torch.ones(output.shape[:-1], dtype=torch.bool) if real is None else real.cpu()
            tokens = shown.flatten().nonzero().flatten()
            held = max(1, _BYTES // (4 * output.shape[-1] * len(batches)))
            order = torch.randperm(len(tokens), generator=generator)
            drawn = tokens[order[: min(held, most or held)]].sort().values.to(output.device)
            self._dense.append((drawn, _rows(output, drawn)))

    def divergence(self, outputs: Iterable[Tensor], parts: Sequence[int] | None = None) -> float:
        """Mean over tokens of ``KL(dense || other)`` in nats.

        Args:
            outputs: another model's output on the same batches; read one by one.
            parts: which batches these are; None for all.

        Raises:
            PlanError: an output is NaN or Inf.
        """
        chosen = range(len(self._dense)) if parts is None else parts
        total, count = 0.0, 0
        for part, output in zip(chosen, outputs, strict=True):
            tokens, dense = self._dense[part]
            for drawn, log_p in zip(
                torch.split(tokens, _CHUNK), torch.split(dense, _CHUNK), strict=True
            ):
                terms = kl_terms(log_p, _rows(output, drawn))
                total += float(terms.sum(dtype=torch.float64))
            count += len(tokens)
        if not math.isfinite(total):
            raise PlanError("the output is NaN or Inf, so it cannot be compared with the dense one")
        return total / max(count, 1)


def kl_terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    """What each class adds to ``KL(p || q)``; nothing where p is 0, as of a token ruled out."""
    return torch.where(log_p == -math.inf, 0.0, log_p.exp() * (log_p - log_q))


def _rows(output: Tensor, tokens: Tensor) -> Tensor:
    return output.flatten(0, -2)[tokens].float().log_softmax(-1)
