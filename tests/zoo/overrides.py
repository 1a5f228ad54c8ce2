"""What the tiny configurations of some model types need beside small sizes, by type."""

from __future__ import annotations

from typing import Any

_ROTARY = {"rope_type": "default", "rope_theta": 10000.0}
# masks without which export cannot follow: the first two make one themselves but while they are
# exported, the last looks into the tokens for padding; by the inputs that they mask
MASKED = {
    "seq2seq/longt5": ("input_ids",),
    "seq2seq/switch_transformers": ("input_ids",),
    "seq2seq/fsmt": ("input_ids", "decoder_input_ids"),
}

# attributes, `None` to leave the default; by type, or by "family/type" where that matters
OVERRIDES: dict[str, dict[str, Any]] = {
    "blt": {
        "encoder_config": {"hidden_size_global": 48},
        "decoder_config": {"hidden_size_global": 48},
        "encoder_hash_byte_group_vocab": 101,
    },
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROTARY}},
    "musicgen": {"num_codebooks": 5},
    "musicgen_melody": {"num_codebooks": 5},
    "nemotron": {"num_key_value_heads": 3},
    "qwen4_exp": {"indexer_budget": 4, "indexer_compress_ratio": 2},
    "qwen4_exp_text": {"indexer_budget": 4, "indexer_compress_ratio": 2},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 96,
        "attention_head_dim": 16,
    },
    "codegen": {"n_head": 4, "n_embd": 32, "rotary_dim": 4},
    "dbrx": {
        "attn_config": {"kv_n_heads": 3, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 52, "moe_num_experts": 9, "moe_top_k": 2},
    },
    "diffllama": {"num_key_value_heads": 2},
    "encoder-decoder": {"decoder": {"is_decoder": True, "add_cross_attention": True}},
    "esm": {"vocab_size": 67, "pad_token_id": 0, "mask_token_id": 4},
    "esmc": {"num_key_value_heads": 6},
    "gemma3n_text": {"num_hidden_layers": 4, "num_kv_shared_layers": 2},
    "gemma3n": {"num_hidden_layers": 4, "num_kv_shared_layers": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 12},
    "mobilebert": {"intra_bottleneck_size": 36, "embedding_size": 40},
    "mpnet": {"relative_attention_num_buckets": 32},  # what its forward has, whatever is set here
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "encoder/reformer": {"is_decoder": False, "axial_pos_embds": False},
    "neomme": {
        "rope_parameters": {
            "full_attention": {**_ROTARY, "partial_rotary_factor": 0.5},
            "sliding_attention": {**_ROTARY, "partial_rotary_factor": 1.0},
        }
    },
    "perceiver": {
        "num_latents": 10,
        "d_latents": 40,
        "num_self_attends_per_block": 2,
        "num_self_attention_heads": 4,
        "num_cross_attention_heads": 4,
        "max_position_embeddings": 11,
    },
    "fsmt": {"src_vocab_size": 67, "tgt_vocab_size": 67},
    "longt5": {"local_radius": 3, "global_block_size": 4},
    "pegasus_x": {"block_size": 4, "num_global_tokens": 3},
    "switch_transformers": {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    "musicflamingo": {
        "audio_config": {"model_type": "audioflamingo3_encoder"},
        "text_config": {"model_type": "qwen2"},
    },
    "nemo_speechlm": {
        "audio_config": {"diarization_config": {"head_config": {"audio_hidden_size": 48}}}
    },
    "vibevoice_asr": {
        f"{part}_tokenizer_encoder_config": {"num_filters": 2, "depths": [1] * 7}
        for part in ("acoustic", "semantic")
    },
    "xmod": {"default_language": "en_XX"},
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "n_mamba_heads": 12,
        "mamba_headdim": 8,
        "attention_hidden_size": 96,
        "attention_head_dim": 16,
    },
    "zaya": {"num_experts_per_tok": 1},
}

_RESNET = {
    "model_type": "resnet",
    "embedding_size": 16,
    "hidden_sizes": [20, 28, 36, 44],
    "depths": [2, 1, 1, 1],
    "out_features": ["stage4"],
}
_SWIN = {
    "embed_dim": 24,
    "depths": [2, 2],
    "num_heads": [3, 6],
    "window_size": 4,
    "patch_size": 2,
    "num_layers": 2,
}
_PYRAMID = {
    "num_encoder_blocks": 2,
    "depths": [2, 2],
    "hidden_sizes": [24, 36],
    "num_attention_heads": [2, 3],
    "mlp_ratios": [2, 3],
    "strides": [4, 2],
}
_WAVE = {
    "conv_dim": [12, 14, 16],
    "conv_stride": [4, 2, 2],
    "conv_kernel": [8, 4, 4],
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "vocab_size": 67,
    "classifier_proj_size": 20,
}
_ROPE = {**_ROTARY, "mrope_section": [2, 1, 1]}
_QWEN_VL = {
    "text_config": {"rope_parameters": _ROPE},
    "vision_config": {"depth": 2, "embed_dim": 48, "hidden_size": 48, "out_hidden_size": 48},
}
_DETR = {"use_timm_backbone": False, "backbone": None, "backbone_config": _RESNET}

OVERRIDES |= {
    **dict.fromkeys(
        ("data2vec-audio", "hubert", "unispeech", "unispeech-sat", "wav2vec2", "wavlm"), _WAVE
    ),
    "sew": {**_WAVE, "squeeze_factor": 2},
    "sew-d": {**_WAVE, "squeeze_factor": 2},
    "audio-spectrogram-transformer": {"max_length": 64},
    "speech_to_text": {"conv_channels": 24, "input_feat_per_channel": 16},
    "wav2vec2-bert": {"vocab_size": 67, "feature_projection_input_dim": 16},
    "wav2vec2-conformer": _WAVE,
    "gemma3": {"mm_tokens_per_image": 4},
    "internvl": {"vision_config": {"image_size": [32, 32], "patch_size": [8, 8]}},
    "paligemma": {
        "projection_dim": 48,
        "vision_config": {"projection_dim": 48},
        # as released, its eager forward is causal where a mask is built and not where it is skipped
        "text_config": {"use_bidirectional_attention": False},
    },
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "qwen2_vl": _QWEN_VL,
    "qwen2_5_vl": _QWEN_VL,
    "bit": {"embedding_size": 16, "hidden_sizes": [32, 48], "depths": [2, 2], "num_groups": 4},
    "conditional_detr": {**_DETR, "num_queries": 7},
    "convnext": {"num_stages": 2, "hidden_sizes": [20, 28], "depths": [2, 2], "patch_size": 4},
    "convnextv2": {"num_stages": 2, "hidden_sizes": [20, 28], "depths": [2, 2], "patch_size": 4},
    "cvt": {"embed_dim": [16, 24, 36], "num_heads": [2, 3, 4], "depth": [1, 2, 2]},
    "deformable_detr": {**_DETR, "num_queries": 7},
    "detr": {**_DETR, "num_queries": 7},
    "dinov3_convnext": {"hidden_sizes": [16, 20, 24, 28], "depths": [1, 2, 1, 1]},
    "donut-swin": _SWIN,
    "efficientnet": {
        "width_coefficient": 0.25,
        "depth_coefficient": 0.3,
        "hidden_dim": 320,
        "image_size": 64,
    },
    "focalnet": {
        "embed_dim": 24,
        "depths": [2, 2],
        "hidden_sizes": [24, 48],
        "focal_levels": [2, 2],
        "focal_windows": [3, 3],
        "patch_size": 4,
    },
    "hgnet_v2": {
        "embedding_size": 16,
        "stem_channels": [3, 12, 16],
        "stage_in_channels": [16, 24, 36, 44],
        "stage_mid_channels": [8, 12, 16, 20],
        "stage_out_channels": [24, 36, 44, 52],
        "hidden_sizes": [24, 36, 44, 52],
        "stage_num_blocks": [1, 2, 1, 1],
        "stage_numb_of_layers": [2, 2, 2, 2],
    },
    "hiera": {
        "embed_dim": 24,
        "image_size": [64, 64],
        "patch_size": [7, 7],
        "depths": [1, 2, 2],
        "num_heads": [1, 2, 4],
        "masked_unit_size": [4, 4],
        "num_query_pool": 2,
    },
    "levit": {
        "image_size": 64,
        "patch_size": 16,
        "hidden_sizes": [24, 36, 48],
        "num_attention_heads": [2, 3, 4],
        "depths": [2, 2, 2],
        "key_dim": [8, 8, 8],
    },
    "maskformer-swin": _SWIN,
    "mobilenet_v1": {"depth_multiplier": 0.25, "image_size": 64},
    "mobilenet_v2": {"depth_multiplier": 0.25, "image_size": 64},
    "mobilevit": {
        "hidden_sizes": [24, 36, 48],
        "neck_hidden_sizes": [8, 8, 16, 16, 24, 28, 32],
        "num_attention_heads": 3,
        "image_size": 64,
        "patch_size": 2,
    },
    "mobilevitv2": {"width_multiplier": 0.25, "image_size": 64, "patch_size": 2},
    "poolformer": {
        "num_encoder_blocks": 2,
        "depths": [2, 2],
        "hidden_sizes": [20, 28],
        "patch_sizes": [7, 3],
        "strides": [4, 2],
        "padding": [2, 1],
    },
    "pp_lcnet": {"scale": 0.25},
    "pvt": {
        **_PYRAMID,
        "patch_sizes": [4, 2],
        "sequence_reduction_ratios": [2, 1],
        "image_size": 32,
    },
    "pvt_v2": {
        **_PYRAMID,
        "num_encoder_blocks": 2,
        "patch_sizes": [7, 3],
        "sr_ratios": [2, 1],
        "image_size": 32,
    },
    "regnet": {
        "embedding_size": 16,
        "hidden_sizes": [24, 32],
        "depths": [2, 2],
        "groups_width": 8,
    },
    "resnet": {"embedding_size": 16, "hidden_sizes": [20, 28], "depths": [2, 2]},
    "segformer": {
        **_PYRAMID,
        "patch_sizes": [7, 3],
        "sr_ratios": [2, 1],
        "decoder_hidden_size": 20,
    },
    "swiftformer": {"embed_dims": [16, 20, 24, 28], "depths": [2, 2, 2, 2], "image_size": 64},
    "swin": _SWIN,
    "swinv2": _SWIN,
    "table-transformer": {**_DETR, "num_queries": 7},
    "yolos": {"image_size": [32, 48], "num_detection_tokens": 7},
}
