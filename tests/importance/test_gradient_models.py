"""Gradients of real architectures, and what criteria make of them, against plain reverse mode."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from prunec.graph.trace import trace_loss
from prunec.importance.gradients import gradient_statistics
from prunec.importance.statistics import statistic_of
from prunec.models.loss import loss_samples, own_loss

WORDS = 60


def albert() -> nn.Module:
    """Every block is the same weights."""
    return AlbertForMaskedLM(
        AlbertConfig(
            vocab_size=WORDS,
            embedding_size=8,
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=20,
            max_position_embeddings=32,
        )
    )


def mixtral() -> nn.Module:
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=WORDS,
            hidden_size=16,
            intermediate_size=20,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=3,
            num_experts_per_tok=2,
            tie_word_embeddings=True,
        )
    )


def t5() -> nn.Module:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=WORDS,
            d_model=16,
            d_kv=4,
            d_ff=20,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
        )
    )


def mamba() -> nn.Module:
    return MambaForCausalLM(
        MambaConfig(vocab_size=WORDS, hidden_size=16, state_size=4, num_hidden_layers=2)
    )


def batch_of(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    batch = {"input_ids": torch.randint(1, WORDS, (2, 9), generator=generator)}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = torch.randint(1, WORDS, (2, 5), generator=generator)
    return batch


@pytest.mark.parametrize("make", [albert, mixtral, t5, mamba])
@pytest.mark.filterwarnings("ignore")
def test_gradients_of_real_models(make) -> None:
    torch.manual_seed(0)
    model = make().eval().requires_grad_(False)
    samples = loss_samples(model, [batch_of(model)], labels=True)
    program = trace_loss(model, own_loss, samples[0])
    names = [name for name in program.parameters if program.state[name].is_floating_point()]
    axes = [(name, 0) for name in names]
    found = gradient_statistics(program, samples, ["weight_grad", "fisher_diag"], axes)

    parameters = dict(model.named_parameters())
    each = []
    model.requires_grad_(True)
    for sample in samples:
        loss = model(**sample, use_cache=False).loss if make is not albert else model(**sample).loss
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        each.append(dict(zip(parameters, gradients, strict=True)))
    reached = 0
    for name in names:
        gradients = [
            torch.zeros_like(parameters[name]) if one[name] is None else one[name] for one in each
        ]
        mean = torch.stack(gradients).mean(0)
        squares = torch.stack(gradients).square().mean(0)
        close = {"rtol": 1e-3, "atol": 1e-3 * float(mean.abs().max()) + 1e-12}
        torch.testing.assert_close(found[statistic_of("weight_grad", name)], mean, **close)
        close = {"rtol": 1e-3, "atol": 1e-3 * float(squares.max()) + 1e-12}
        torch.testing.assert_close(found[statistic_of("fisher_diag", name)], squares, **close)
        reached += bool(mean.abs().max() > 0)
    assert reached > 0.8 * len(names)
