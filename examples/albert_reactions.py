"""ALBERT, whose twelve layers are one layer used twelve times: a language model of reactions.

Real weights, of the package rxnmapper (0.8 M parameters): `pip install --no-deps rxnmapper==0.4.3`.
What is removed is removed from every layer, so the twelve calls of a site vote together. The
measure: masked tokens of reactions that are restored, top 1.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from transformers import AlbertConfig, AlbertForMaskedLM

import prunec

TOKEN = re.compile(r"\[[^\]]+\]|Br|Cl|>>|[BCNOSPFIbcnops]|[=#()+\-/\\.@%0-9]")
ACIDS = ("CC", "CCC", "CC(C)C", "c1ccccc1", "c1ccccc1C", "c1ccc(Cl)cc1", "C1CCCCC1", "c1ccncc1")
ALCOHOLS = ("C", "CC", "CCC", "CC(C)C", "CCCC", "Cc1ccccc1", "CCc1ccccc1", "C1CCCCC1", "CCOC")
LENGTH = 40


def folder() -> Path:
    spec = find_spec("rxnmapper")
    if spec is None or spec.origin is None:
        raise SystemExit("this needs its weights: pip install --no-deps rxnmapper==0.4.3")
    return Path(spec.origin).parent / "models/transformers/albert_heads_8_uspto_all_1310k"


def open_model() -> AlbertForMaskedLM:
    model = AlbertForMaskedLM(AlbertConfig.from_pretrained(folder()))
    weights = torch.load(folder() / "pytorch_model.bin", "cpu", weights_only=True)
    missing = model.load_state_dict(weights, strict=False).missing_keys
    assert not [name for name in missing if "position_ids" not in name], missing
    return model.eval().requires_grad_(False)


def reactions() -> list[str]:
    """Esters and amides from their parts."""
    made = []
    for acid, rest in product(ACIDS, ALCOHOLS):
        made.append(f"O=C(O){acid}.O{rest}>>O=C(O{rest}){acid}")
        made.append(f"O=C(Cl){acid}.N{rest}>>O=C(N{rest}){acid}")
    return made


def tokens(texts: list[str]) -> Tensor:
    """int64 [texts, LENGTH], in the model's own vocabulary, cut or padded."""
    vocabulary = {t: i for i, t in enumerate((folder() / "vocab.txt").read_text().split("\n"))}
    rows = []
    for text in texts:
        parts = ["[CLS]", *TOKEN.findall(text), "[SEP]"][:LENGTH]
        parts += ["[PAD]"] * (LENGTH - len(parts))
        rows.append([vocabulary.get(part, vocabulary["[UNK]"]) for part in parts])
    return torch.tensor(rows)


@torch.no_grad()
def restored(model: torch.nn.Module, ids: Tensor) -> float:
    """Part of the masked tokens (one in seven, no padding) that the model restores."""
    vocabulary = (folder() / "vocab.txt").read_text().split("\n")
    pad, mask = vocabulary.index("[PAD]"), vocabulary.index("[MASK]")
    chosen = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 1 / 7
    chosen &= ids != pad
    given = ids.masked_fill(chosen, mask)
    guessed = model(input_ids=given, attention_mask=(ids != pad).long()).logits.argmax(-1)
    return float((guessed == ids)[chosen].float().mean())


def main() -> dict[str, float]:
    model, ids = open_model(), tokens(reactions())
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    calibration, held_out = ids[order[:60]], ids[order[60:]]
    mask = (calibration != int(ids[0, -1])).long()
    batches = [
        {"input_ids": calibration[i : i + 20], "attention_mask": mask[i : i + 20]}
        for i in range(0, 60, 20)
    ]
    result = prunec.prune(model, recipe="slimgpt", ratio=0.25, calibration=batches)
    before, after = restored(model, held_out), restored(result.model, held_out)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, result.model)]
    print(f"parameters {sizes[0]:,} -> {sizes[1]:,}; restored {before:.1%} -> {after:.1%}")
    return {"before": before, "after": after, "parameters": sizes[1] / sizes[0]}


if __name__ == "__main__":
    main()
