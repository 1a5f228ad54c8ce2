"""The dense model's predictions, kept on disk, and the losses of following them.

Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network, arXiv 1503.02531: both
distributions at temperature T, and T squared before the loss, so that the gradient's size stays.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from prunec.errors import PlanError
from prunec.models.cache import cache_directory
from prunec.models.digest import state_digest, token_digest
from prunec.recovery.packing import IGNORED

_EVERYTHING_ELSE = 1e-8  # least probability of the tokens beyond the top k, in either model


@dataclass(frozen=True, eq=False)
class Targets:
    """What a teacher says of each position: its likeliest tokens and their log-probabilities.

    `tokens` int32 and `log_p` float32 are [positions, k], at the temperature.
    """

    tokens: Tensor
    log_p: Tensor


def soft_targets(logits: Tensor, temperature: float, top_k: int) -> Targets:
    """The `top_k` likeliest tokens of logits [positions, vocabulary]; 0 or too many for all."""
    log_p = F.log_softmax(logits.float() / temperature, dim=-1)
    best = log_p.topk(min(top_k or log_p.shape[-1], log_p.shape[-1]), dim=-1)
    return Targets(best.indices.to(torch.int32), best.values)


def distillation_loss(logits: Tensor, targets: Targets, temperature: float) -> Tensor:
    """T squared times KL(teacher || student) of each position, in nats [positions].

    `logits` are the student's, [positions, vocabulary]. The tokens beyond the teacher's top k count
    as one: the sum is then a lower bound of the whole KL (data processing inequality), and equal
    to it where k is the vocabulary.
    """
    log_q = F.log_softmax(logits.float() / temperature, dim=-1)
    log_q = log_q.gather(-1, targets.tokens.long())
    p = targets.log_p.exp()
    kl = (p * (targets.log_p - log_q)).sum(-1)
    if targets.tokens.shape[-1] < logits.shape[-1]:
        rest_p = (1 - p.sum(-1)).clamp(min=_EVERYTHING_ELSE)
        rest_q = (1 - log_q.exp().sum(-1)).clamp(min=_EVERYTHING_ELSE)
        kl = kl + rest_p * (rest_p.log() - rest_q.log())
    return kl * temperature**2


def hidden_loss(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], learnt: Tensor) -> Tensor:
    """Squared distance of the hidden states over the teacher's squared norm, summed over positions.

    States are [batch, n, hidden] after the embedding and after each layer; a shallower student is
    compared with the teacher's layers at the same relative depth. `learnt` is bool [batch, n].

    Raises:
        PlanError: the hidden sizes differ.
    """
    if student[0].shape[-1] != teacher[0].shape[-1]:
        raise PlanError(
            f"hidden states of {student[0].shape[-1]} and {teacher[0].shape[-1]} features do not "
            "compare",
            fix="--set hidden=0: the logits alone",
        )
    last, depth = len(teacher) - 1, len(student) - 1
    total = student[0].new_zeros((), dtype=torch.float32)
    for index in range(1, depth + 1):
        wanted = teacher[round(index * last / depth)][learnt].float()
        found = student[index][learnt].float()
        size = wanted.pow(2).sum(-1).clamp(min=1e-6)
        total = total + ((found - wanted).pow(2).sum(-1) / size).sum()
    return total / depth


class Teacher:
    """The dense model as a source of targets; what it said of a row is kept on disk.

    It may lie on another device than the student. Rows are told apart by their tokens and
    positions, so a second epoch, a resumed run and another recovery on the same data cost nothing.

    Args:
        model: the dense model, in eval mode.
        temperature, top_k: as in `Recovery`.
    """

    def __init__(self, model: Any, *, temperature: float, top_k: int) -> None:
        self.model = model.eval()
        self.temperature = temperature
        self.top_k = top_k
        self.misses = 0
        key = f"1 {state_digest(model)} {temperature} {top_k}"
        name = hashlib.sha256(key.encode()).hexdigest()[:32]
        self._folder = cache_directory() / "teacher" / name

    def targets(self, inputs: Mapping[str, Tensor]) -> Targets:
        """Of every learnt position of a batch, row by row; on the batch's device.

        A position is learnt if the label after it counts.
        """
        rows = [
            {name: value[i] for name, value in inputs.items()} for i in range(len(inputs["labels"]))
        ]
        paths = [self._folder / f"{_digest(row)}.safetensors" for row in rows]
        absent = [i for i, path in enumerate(paths) if not path.is_file()]
        if absent:
            self._ask(
                {name: value[absent] for name, value in inputs.items()}, [paths[i] for i in absent]
            )
        loaded = [load_file(path) for path in paths]
        device = inputs["labels"].device
        return Targets(*(torch.cat([t[n] for t in loaded]).to(device) for n in ("tokens", "log_p")))

    def hidden(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """The hidden states of a batch, on its device; not kept on disk."""
        output = self._run(inputs, output_hidden_states=True)
        return tuple(state.to(inputs["labels"].device) for state in output.hidden_states)

    def _ask(self, inputs: Mapping[str, Tensor], paths: list[Path]) -> None:
        logits = self._run(inputs).logits
        learnt = learnt_positions(inputs["labels"]).to(logits.device)
        self._folder.mkdir(parents=True, exist_ok=True)
        for row, path in enumerate(paths):
            found = soft_targets(logits[row, learnt[row]], self.temperature, self.top_k)
            tensors = {"tokens": found.tokens.cpu(), "log_p": found.log_p.cpu()}
            whole = path.with_suffix(f".{os.getpid()}")
            save_file(tensors, whole)
            whole.rename(path)
            self.misses += 1

    def _run(self, inputs: Mapping[str, Tensor], **options: Any) -> Any:
        device = next(self.model.parameters()).device
        given = {n: v.to(device) for n, v in inputs.items() if n != "labels"}
        with torch.no_grad():
            return self.model(**given, use_cache=False, **options)


def learnt_positions(labels: Tensor) -> Tensor:
    """The positions whose next token is learnt, bool [batch, n]."""
    learnt = torch.zeros_like(labels, dtype=torch.bool)
    learnt[:, :-1] = labels[:, 1:] != IGNORED
    return learnt


def _digest(row: Mapping[str, Tensor]) -> str:
    """Of a row up to its last learnt label: padding, which its batch decides, has no part in it."""
    learnt = (row["labels"] != IGNORED).nonzero()
    end = int(learnt[-1]) + 1 if len(learnt) else 0
    names = sorted(row.keys() - {"attention_mask"})  # of padding on the right alone
    return token_digest(*(row[name][:end] for name in names))[:32]
