"""Statistics that are taken before anything is pruned: those of the loss's gradients."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from prunec.events import Progress, silent
from prunec.graph.trace import Loss, trace_loss
from prunec.importance.curves import Criterion
from prunec.importance.gradients import GRADIENT_STATISTICS, Part, gradient_statistics
from prunec.models.loss import loss_samples, own_loss
from prunec.passes.compensation.closed_form import Compensation
from prunec.passes.distributed import processes
from prunec.passes.sites import Site


def reads_no_input(criterion: Criterion, compensation: Compensation | None = None) -> bool:
    """Whether weights and gradients are all that units are ranked and mended by."""
    names = criterion.statistics | (compensation.statistics if compensation else frozenset())
    fits = compensation is not None and compensation.regression is not None
    return not fits and names <= set(GRADIENT_STATISTICS)


def prior_statistics(
    model: nn.Module,
    sites: Sequence[Site],
    names: Collection[str],
    batches: Sequence[Mapping[str, Tensor]],
    *,
    loss: Loss | None = None,
    weights: Callable[[str], Tensor] | None = None,
    device: torch.device | None = None,
    progress: Progress = silent,
) -> dict[str, Tensor]:
    """The gradient statistics among ``names`` of every member of the sites' groups.

    Args:
        batches: inputs by name; an index of their first axis is a sample. Each of several processes
            differentiates its share of them.
        loss: ``loss(model, inputs)``, a scalar for one sample; by default the model's own, with
            the inputs' ``labels``, or their tokens where there are none.
        weights: gives the tensors of a model on meta by name.
        device: where to compute; by default where the weights are.

    Raises:
        PlanError: the model has no loss of its own and none is given.
        TraceError: the loss cannot be traced or differentiated.
    """
    wanted = set(names) & set(GRADIENT_STATISTICS)
    if not wanted:
        return {}
    samples, together = loss_samples(model, batches, labels=loss is None), processes()
    with progress.task("trace the loss"):
        program = trace_loss(model, loss or own_loss, samples[0])
    axes = dict.fromkeys(
        (member.parameter, member.axis)
        for site in sites
        for group in site.groups
        for member in group.members
    )

    def weight(name: str) -> Tensor:
        own = program.state[name]
        return weights(name) if own.is_meta and weights is not None else own

    return gradient_statistics(
        program,
        together.share(samples),
        wanted,
        axes,
        weight=weight,
        device=device or program.state[next(iter(program.parameters))].device,
        part=Part(range(together.rank, len(samples), together.size), len(samples), together.total),
        progress=progress,
    )
