"""Tiny models that read something else than a running text, with a tokenizer that marks texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_model import VOCABULARY, tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)


def marking_tokenizer() -> Any:
    """As BERT's: a text stands between two marks; and there is a mask token."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<mask>", "cls_token": "<s>", "sep_token": "</s>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return tokenizer


def bert_config(**changed: Any) -> BertConfig:
    return BertConfig(
        vocab_size=VOCABULARY + 1, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=44, max_position_embeddings=64, attn_implementation="eager", **changed,
    )  # fmt: skip


def bert() -> Any:
    torch.manual_seed(0)
    return BertForMaskedLM(bert_config()).eval().requires_grad_(False)


def classifier() -> Any:
    torch.manual_seed(0)
    config = bert_config(id2label={0: "dull", 1: "bright", 2: "odd"})
    return BertForSequenceClassification(config).eval().requires_grad_(False)


def t5() -> Any:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=44, num_layers=2, num_heads=4,
        decoder_start_token_id=0, pad_token_id=1, eos_token_id=1, dropout_rate=0.0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval().requires_grad_(False)


def vit(classes: tuple[str, ...] = ("cat", "dog")) -> Any:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=44,
        image_size=16, patch_size=8, id2label=dict(enumerate(classes)),
        label2id={name: i for i, name in enumerate(classes)},
    )  # fmt: skip
    return ViTForImageClassification(config).eval().requires_grad_(False)


def write_vit(directory: Path, model: Any = None) -> Any:
    """Save a ViT with its image processor, and open it again."""
    from transformers import ViTImageProcessorPil

    (model or vit()).save_pretrained(directory)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(directory)
    return ViTForImageClassification.from_pretrained(directory).eval().requires_grad_(False)


def write_images(folder: Path, *names: str) -> Path:
    """PNG files of different sizes and colours."""
    from PIL import Image

    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_mandelbrot((20 + i, 30), (-2, -1.5, 1, 1.5 + i / 7), 40).save(path)
    return folder
