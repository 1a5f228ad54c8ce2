"""BERT with real weights: a language model of antibodies, 26 M parameters.

    pip install --no-deps antiberty==0.1.3

Calibrated on variants that the model itself proposes of four known sequences. The measure: masked
residues of two other antibodies that are restored, top 1.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM

import prunec

SEEN = (  # trastuzumab and adalimumab, the variable domains
    "EVQLVESGGGLVQPGGSLRLSCAASGFNIKDTYIHWVRQAPGKGLEWVARIYPTNGYTRYADSVKGRFTISADTSKNTAYLQMNSLRAEDTAVYYC",
    "DIQMTQSPSSLSASVGDRVTITCRASQDVNTAVAWYQQKPGKAPKLLIYSASFLYSGVPSRFSGSRSGTDFTLTISSLQPEDFATYYCQQHYTTPP",
    "EVQLVESGGGLVQPGRSLRLSCAASGFTFDDYAMHWVRQAPGKGLEWVSAITWNSGHIDYADSVEGRFTISRDNAKNSLYLQMNSLRAEDTAVYYC",
    "DIQMTQSPSSLSASVGDRVTITCRASQGIRNYLAWYQQKPGKAPKLLIYAASTLQSGVPSRFSGSGSGTDFTLTISSLQPEDVATYYCQRYNRAPY",
)
HELD_OUT = (  # bevacizumab's
    "EVQLVESGGGLVQPGGSLRLSCAASGYTFTNYGMNWVRQAPGKGLEWVGWINTYTGEPTYAADFKRRFTFSLDTSKSTAYLQMNSLRAEDTAVYYC",
    "DIQMTQSPSSLSASVGDRVTITCSASQDISNYLNWYQQKPGKAPKVLIYFTSSLHSGVPSRFSGSGSGTDFTLTISSLQPEDFATYYCQQYSTVPW",
)


def folder() -> Path:
    spec = find_spec("antiberty")
    if spec is None or spec.origin is None:
        raise SystemExit("this needs its weights: pip install --no-deps antiberty==0.1.3")
    return Path(spec.origin).parent / "trained_models"


def open_model() -> BertForMaskedLM:
    weights = folder() / "AntiBERTy_md_smooth"
    model = BertForMaskedLM(BertConfig.from_pretrained(weights))
    state = torch.load(weights / "pytorch_model.bin", "cpu", weights_only=True)
    missing = model.load_state_dict(state, strict=False).missing_keys
    assert not [name for name in missing if "position_ids" not in name], missing
    return model.eval().requires_grad_(False)


def vocabulary() -> dict[str, int]:
    return {t: i for i, t in enumerate((folder() / "vocab.txt").read_text().split())}


def tokens(sequences: tuple[str, ...]) -> Tensor:
    known = vocabulary()
    rows = [[known["[CLS]"], *(known[r] for r in s), known["[SEP]"]] for s in sequences]
    return torch.tensor(rows)


def masked(ids: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """The ids with one residue in seven hidden, and which."""
    chosen = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < 1 / 7
    chosen[:, [0, -1]] = False
    return ids.masked_fill(chosen, vocabulary()["[MASK]"]), chosen


@torch.no_grad()
def variants(model: nn.Module, ids: Tensor, count: int) -> list[Tensor]:
    """Hidden residues drawn anew from what the model proposes for them, again and again."""
    generator, made = torch.Generator().manual_seed(0), []
    for seed in range(count):
        given, chosen = masked(ids, seed)
        proposed = model(input_ids=given).logits[chosen].softmax(-1)
        ids = ids.clone()
        ids[chosen] = torch.multinomial(proposed, 1, generator=generator).flatten()
        made.append(ids)
    return made


@torch.no_grad()
def restored(model: nn.Module, ids: Tensor) -> float:
    right = total = 0
    for seed in range(100, 106):
        given, chosen = masked(ids, seed)
        guessed = model(input_ids=given).logits.argmax(-1)
        right += int((guessed == ids)[chosen].sum())
        total += int(chosen.sum())
    return right / total


def main() -> dict[str, float]:
    model = open_model()
    calibration = [{"input_ids": ids} for ids in variants(model, tokens(SEEN), 12)]
    result = prunec.prune(model, recipe="slimgpt", ratio=0.2, calibration=calibration)
    held_out = tokens(HELD_OUT)
    before, after = restored(model, held_out), restored(result.model, held_out)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, result.model)]
    print(f"parameters {sizes[0]:,} -> {sizes[1]:,}; restored {before:.1%} -> {after:.1%}")
    return {"before": before, "after": after, "parameters": sizes[1] / sizes[0]}


if __name__ == "__main__":
    main()
