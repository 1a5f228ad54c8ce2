"""Tiny models of every architecture in transformers, built from its configuration classes.

No table of architectures: every attribute of a configuration that is known to be a size gets a
small one, attributes that list a kind per layer get each of their kinds once, and
sub-configurations are treated alike. Sizes differ from each other, so that no axis is taken for
another by its length. What this cannot build is patched in `OVERRIDES`, by type.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto import modeling_auto

from prunec.models.example import example_inputs
from zoo.overrides import MASKED, OVERRIDES

BATCH, LENGTH, VOCABULARY = 5, 11, 67
HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 48, 6, 3, 8

_HIDDEN = "hidden_size d_model n_embd dim attention_hidden_size embedding_size emb_dim lru_width"
_HEADS = (
    "num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads "
    "decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads "
    "swa_num_attention_heads linear_num_value_heads linear_num_heads"
)
_KV_HEADS = "num_key_value_heads kv_n_heads num_kv_heads"
_LAYERS = (
    "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers "
    "num_encoder_layers num_decoder_layers num_blocks"
)
_FEED_FORWARD = (
    "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff dff d_inner n_inner "
    "ffn_hidden_size feed_forward_size intermediate_size_mlp dim_ff hidden_dim mlp_dim "
    "dense_intermediate_size prefix_dense_intermediate_size"
)
_EXPERT_WIDTH = "moe_intermediate_size expert_ffn_hidden_size"
_SHARED_WIDTH = (
    "shared_expert_intermediate_size shared_intermediate_size shared_experts_intermediate_size "
    "moe_shared_expert_intermediate_size"
)
_EXPERTS = "num_experts n_routed_experts num_local_experts moe_num_experts"
_TOP_K = "num_experts_per_tok moe_topk moe_top_k moe_k num_experts_per_token"
_HEAD_DIM = "head_dim d_head dim_head kv_channels attention_head_dim v_head_dim d_kv"
_POSITIONS = "max_position_embeddings n_positions max_seq_len context_length n_ctx"

SIZES: dict[str, int] = {
    **dict.fromkeys(_HIDDEN.split(), HIDDEN),
    **dict.fromkeys(_HEADS.split(), HEADS),
    **dict.fromkeys(_KV_HEADS.split(), KV_HEADS),
    **dict.fromkeys(_FEED_FORWARD.split(), 52),
    **dict.fromkeys(_EXPERT_WIDTH.split(), 20),
    **dict.fromkeys(_SHARED_WIDTH.split(), 28),
    **dict.fromkeys(_EXPERTS.split(), 9),
    **dict.fromkeys(_TOP_K.split(), 2),
    **dict.fromkeys(_HEAD_DIM.split(), HEAD_DIM),
    **dict.fromkeys(_POSITIONS.split(), 64),
    "vocab_size": VOCABULARY,
    "decoder_vocab_size": VOCABULARY,
    "type_vocab_size": 2,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "qk_head_dim": 20,
    "q_lora_rank": 26,
    "kv_lora_rank": 22,
    "n_group": 3,
    "num_expert_group": 3,
    "topk_group": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": 9,
    "sliding_window": 7,
    "attention_window_size": 7,
    "sliding_window_size": 7,
    "local_attention": 8,
    "attention_chunk_size": 8,
    "window_size": 7,
    "chunk_size": 4,
    "mamba_chunk_size": 4,
    "state_size": 7,
    "ssm_state_size": 7,
    "mamba_d_state": 7,
    "mamba_dt_rank": 5,
    "time_step_rank": 5,
    "mamba_n_heads": 12,
    "mamba_num_heads": 12,
    "n_mamba_heads": 2,
    "mamba_d_head": 8,
    "mamba_head_dim": 8,
    "mamba_headdim": 8,
    "mamba_d_ssm": 96,
    "mamba_n_groups": 3,
    "n_groups": 3,
    "mamba_ngroups": 3,
    "linear_num_key_heads": 3,
    "linear_key_head_dim": 10,
    "linear_value_head_dim": 8,
    "linear_head_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 4,
    "query_pre_attn_scalar": 8,
    "relative_attention_num_buckets": 9,
    "relative_attention_max_distance": 16,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 14,
    "rotary_dim": 4,
    "word_embed_proj_dim": 40,
    "input_embedding_size": 36,
    "output_embedding_size": 44,
    "laurel_rank": 10,
    "adapter_rank": 10,
    "d_rel": 10,
    "rel_extent": 16,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 34,
    "num_mel_bins": 16,
    "max_source_positions": 16,
    "max_target_positions": 64,
    "router_hidden_size": 18,
    "o_lora_rank": 18,
    "o_groups": 3,
    "hc_mult": 2,
    "hc_sinkhorn_iters": 2,
    "block_multiple_of": 4,
    "attention_head_size": 8,
    "moe_latent_size": 30,
    "num_query_groups": 3,
    "zero_expert_num": 3,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
}

# by family: the table of model classes in transformers. A name is "type", or "family/type".
FAMILIES = {
    "causal": ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",),
    "encoder": ("MODEL_FOR_MASKED_LM_MAPPING_NAMES",),
    "seq2seq": ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",),
    "vision": (
        "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
        "MODEL_FOR_BACKBONE_MAPPING_NAMES",
        "MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES",
        "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES",
        "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES",
    ),
    "audio": (
        "MODEL_FOR_CTC_MAPPING_NAMES",
        "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
        "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    ),
    "vlm": ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",),
    "image": ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",),
}
# of the larger families, these: "vlm" is given text alone, so that its vision tower is kept whole,
# "image" text and an image
CHOSEN = {
    "vision": (
        *("beit", "bit", "clip", "conditional_detr", "convnext", "convnextv2", "data2vec-vision"),
        *("deit", "detr", "dinov2", "dinov2_with_registers", "dinov3_convnext", "dinov3_vit"),
        *("donut-swin", "efficientnet", "focalnet", "hgnet_v2", "hiera", "ijepa", "levit"),
        *("maskformer-swin", "mobilenet_v1", "mobilenet_v2", "mobilevit", "mobilevitv2"),
        *("poolformer", "pp_lcnet", "pvt", "pvt_v2", "regnet", "resnet", "segformer", "siglip"),
        *("swiftformer", "swin", "swinv2", "table-transformer", "vit", "vit_msn", "vitdet"),
        "yolos",
    ),
    "audio": (
        *("audio-spectrogram-transformer", "data2vec-audio", "hubert", "moonshine"),
        *("parakeet_ctc", "sew", "sew-d", "speech_to_text", "unispeech", "unispeech-sat"),
        *("wav2vec2", "wav2vec2-bert", "wav2vec2-conformer", "wavlm", "whisper"),
    ),
    "vlm": (
        *("aya_vision", "gemma3", "idefics3", "internvl", "llava", "mistral3", "paligemma"),
        *("qwen2_5_vl", "qwen2_vl", "smolvlm", "vipllava"),
    ),
    "image": ("aya_vision", "gemma3", "internvl", "llava", "paligemma", "vipllava"),
}


def all_types(family: str = "causal") -> list[str]:
    """The zoo's names of one family, or of all."""
    if family == "all":
        return [name for known in FAMILIES for name in all_types(known)]
    names = CHOSEN.get(family, _classes(family))
    return [name if family == "causal" else f"{family}/{name}" for name in names]


def _classes(family: str) -> dict[str, Any]:
    """Type -> class name (or names) of one family; the first table that has a type counts."""
    found: dict[str, Any] = {}
    for table in FAMILIES[family]:
        found = {**getattr(modeling_auto, table), **found}
    return found


def digest(name: str) -> str:
    """Of the configuration that a zoo entry is built from."""
    text = tiny_config(name).to_json_string(use_diff=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def build(name: str) -> nn.Module:
    """A tiny model of this name with seeded random weights, on the CPU."""
    torch.manual_seed(0)
    model: nn.Module = _model_class(name)._from_config(tiny_config(name))
    return model.eval().requires_grad_(False)


def _model_class(name: str) -> Any:
    family, _, model_type = name.rpartition("/")
    names = _classes(family or "causal")[model_type]
    return getattr(transformers, names if isinstance(names, str) else names[0])


def inputs_of(name: str, model: nn.Module) -> dict[str, Tensor]:
    """Inputs of tiny, unusual sizes for the model of this name."""
    inputs = example(model, image=name.startswith("image/"))
    for tokens in MASKED.get(name, ()):
        inputs[tokens.replace("input_ids", "attention_mask")] = torch.ones_like(inputs[tokens])
    return inputs


def example(model: nn.Module, *, image: bool = False) -> dict[str, Tensor]:
    """Inputs of tiny, unusual sizes: tokens, or what `example_inputs` makes for other models.

    Args:
        image: pixels beside the tokens, some of which stand for them.
    """
    generator = torch.Generator().manual_seed(0)

    def tokens(length: int) -> Tensor:
        return torch.randint(5, VOCABULARY - 1, (BATCH, length), generator=generator)

    config: Any = model.config
    if image:
        return _with_image(model, tokens)
    if getattr(model, "main_input_name", "") != "input_ids":
        return example_inputs(model)
    if config.is_encoder_decoder and "decoder_input_ids" in signature(model.forward).parameters:
        return {"input_ids": tokens(LENGTH), "decoder_input_ids": tokens(LENGTH - 4)}
    return {"input_ids": tokens(LENGTH)}


def _with_image(model: nn.Module, tokens: Callable[[int], Tensor]) -> dict[str, Tensor]:
    """One image a row, and as many of its marks as the model turns it into features."""
    config: Any = model.config
    marker = getattr(config, "image_token_id", None) or config.image_token_index
    size = config.vision_config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    pixels = torch.randn(BATCH, 3, height, width, generator=torch.Generator().manual_seed(0))
    for count in range(1, 65):
        ids = tokens(count + 6)
        ids[:, 1 : count + 1] = marker
        inputs = {"input_ids": ids, "pixel_values": pixels}
        try:
            model(**inputs)
        except (ValueError, RuntimeError):  # as it refuses another number of marks
            continue
        return inputs
    raise ValueError("no number of image tokens fits")


def tiny_config(name: str) -> PreTrainedConfig:
    """The configuration of this name with every known size made small."""
    model_type = name.rpartition("/")[-1]
    kind = _model_class(name).config_class or CONFIG_MAPPING[model_type]
    # of a sub-configuration: a dict by its name
    overrides = OVERRIDES.get(name, OVERRIDES.get(model_type, {}))
    config = kind(**_tiny_arguments(kind(), overrides))
    config.use_cache = False
    return config


def _tiny_arguments(default: PreTrainedConfig, overrides: dict[str, Any]) -> dict[str, Any]:
    attributes = {k: v for k, v in vars(default).items() if not k.startswith("_")}
    arguments: dict[str, Any] = {}
    layers = _layer_lists(attributes)
    kinds = [len(set(values)) for name, values in layers.items() if name not in SIZES]
    depth = max([2, *(count for count in kinds if count <= _MOST_KINDS)])
    depth = overrides.get("num_hidden_layers", depth)
    for name, value in attributes.items():
        if isinstance(value, PreTrainedConfig):
            arguments[name] = _tiny_arguments(value, overrides.get(name) or {})
        elif name in overrides:
            continue
        elif name in layers and name in SIZES:
            arguments[name] = [SIZES[name]] * depth
        elif name in layers and len(set(value)) > _MOST_KINDS:
            arguments[name] = None
        elif name in layers:
            distinct = list(dict.fromkeys(value))
            arguments[name] = [distinct[i % len(distinct)] for i in range(depth)]
        elif name in _LAYERS.split():
            arguments[name] = depth
        elif _is_size(name) and isinstance(value, int) and not isinstance(value, bool):
            arguments[name] = SIZES[name.removeprefix("swa_")]
        elif name in _REQUIRED and value is None:
            arguments[name] = SIZES[name]
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            arguments[name] = min(value, _SPECIAL.get(name, 3))
    _settle(arguments, attributes)
    given = {k: v for k, v in overrides.items() if v is not None and k not in arguments}
    return {k: v for k, v in arguments.items() if overrides.get(k, 0) is not None} | given


def _is_size(name: str) -> bool:
    return name.removeprefix("swa_") in SIZES


_MOST_KINDS = 4
# sizes that some configurations leave open and their models need
_REQUIRED = (
    *("head_dim", "n_routed_experts", "num_experts_per_tok", "n_shared_experts"),
    *("indexer_n_heads", "indexer_kv_heads", "indexer_head_dim"),
)
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _layer_lists(attributes: dict[str, Any]) -> dict[str, list[Any]]:
    """Attributes that list something per layer."""
    depths = {attributes.get(name) for name in _LAYERS.split()}
    return {
        name: list(value)
        for name, value in attributes.items()
        if isinstance(value, (list, tuple))
        and len(value) > 1
        and len(value) in depths
        and all(isinstance(item, (str, int, bool, float)) for item in value)
    }


def _settle(arguments: dict[str, Any], attributes: dict[str, Any]) -> None:
    """Sizes that depend on one another."""
    same_heads = attributes.get("num_key_value_heads") == attributes.get("num_attention_heads")
    if same_heads and "kv_lora_rank" in attributes and "num_key_value_heads" in arguments:
        arguments["num_key_value_heads"] = HEADS
    rope = attributes.get("rope_parameters")
    if isinstance(rope, dict) and "mrope_section" in rope:
        arguments["rope_parameters"] = {**rope, "mrope_section": [2, 1, 1]}
