"""The example inputs run through a tiny model of every modality."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from prunec.errors import ModelError
from prunec.models import example_inputs

TEXT = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SIDES = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 16}
HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
VISION = {k: v for k, v in TEXT.items() if k != "vocab_size" and "token" not in k}
MODELS: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "LlamaForCausalLM": (TEXT, {"input_ids": (2, 11)}),
    "GPT2LMHeadModel": (
        {"vocab_size": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 9},
        {"input_ids": (2, 9)},
    ),
    "BertForMaskedLM": (TEXT, {"input_ids": (2, 11)}),
    "T5ForConditionalGeneration": (
        {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2},
        {"input_ids": (2, 11), "decoder_input_ids": (2, 7)},
    ),
    "BartForConditionalGeneration": (
        {**TEXT, **SIDES, **HEADS},
        {"input_ids": (2, 11), "decoder_input_ids": (2, 7)},
    ),
    "PerceiverForMaskedLM": (  # its own name for them is "inputs"
        {"vocab_size": 64, "d_latents": 16, "d_model": 16, "num_latents": 5,
         "num_self_attends_per_block": 1, "max_position_embeddings": 11},
        {"input_ids": (2, 11)},
    ),
    "ViTForImageClassification": (
        {**VISION, "image_size": 32, "patch_size": 8, "num_channels": 1},
        {"pixel_values": (2, 1, 32, 32)},
    ),
    "ResNetForImageClassification": (
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
        {"pixel_values": (2, 3, 64, 64)},
    ),
    "VideoMAEForVideoClassification": (
        {**VISION, "image_size": 32, "patch_size": 16, "num_frames": 4},
        {"pixel_values": (2, 4, 3, 32, 32)},
    ),
    "CLIPModel": (
        {
            "text_config": {**TEXT, "max_position_embeddings": 64},
            "vision_config": {**VISION, "image_size": 32, "patch_size": 8},
            "projection_dim": 8,
        },
        {"input_ids": (2, 11), "pixel_values": (2, 3, 32, 32)},
    ),
    "WhisperForConditionalGeneration": (
        {**TEXT, **SIDES, **HEADS, "num_mel_bins": 8, "max_source_positions": 16},
        {"input_features": (2, 8, 32), "decoder_input_ids": (2, 7)},
    ),
    "Speech2TextForConditionalGeneration": (
        {**TEXT, **SIDES, **HEADS, "input_feat_per_channel": 10, "conv_channels": 16},
        {"input_features": (2, 64, 10), "decoder_input_ids": (2, 7)},
    ),
    "Wav2Vec2ForCTC": (
        {**TEXT, "conv_dim": [8, 8], "conv_stride": [5, 2], "conv_kernel": [10, 3],
         "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4,
         "num_conv_pos_embedding_groups": 2},
        {"input_values": (2, 200)},
    ),
    "ASTForAudioClassification": (
        {**VISION, "max_length": 32, "num_mel_bins": 16, "patch_size": 8, "time_stride": 8,
         "frequency_stride": 8},
        {"input_values": (2, 32, 16)},
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_the_example_runs(name: str) -> None:
    values, shapes = MODELS[name]
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**values)).eval()
    example = example_inputs(model)
    assert {key: tuple(value.shape) for key, value in example.items()} == shapes
    with torch.no_grad():
        assert model(**example)[0].isfinite().all()


def test_ids_are_ordinary_tokens_and_the_same_each_time() -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**TEXT, "vocab_size": 8}))
    ids = example_inputs(model)["input_ids"]
    assert ids.dtype == torch.int64
    assert torch.equal(ids, example_inputs(model)["input_ids"])
    assert not torch.isin(ids, torch.tensor([0, 1, 2])).any()


def test_a_module_of_unknown_inputs_is_refused() -> None:
    with pytest.raises(ModelError, match="no example inputs are known for Linear") as caught:
        example_inputs(nn.Linear(2, 2))
    assert "factory" in str(caught.value)
