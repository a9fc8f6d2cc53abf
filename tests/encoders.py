"""A tiny config of every family of encoders that is taken, and of some that are not."""

from transformers import CONFIG_MAPPING, PreTrainedConfig

_PATCHES = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 37,
    "image_size": 32,
    "patch_size": 4,
}
_STAGES = {"hidden_sizes": [8, 12, 16, 24], "depths": [1, 1, 2, 1], "num_attention_heads": [1, 1, 2, 2]}
_CONVNEXT = {"hidden_sizes": [6, 10, 14], "depths": [1, 2, 1], "num_stages": 3, "patch_size": 2, "image_size": 32}
_RESNET = {"embedding_size": 8, "hidden_sizes": [8, 12, 16], "depths": [1, 2, 1]}
_SWIN = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [1, 2, 1],
    "num_heads": [1, 2, 2],
    "window_size": 4,
}
_CVT = {
    "patch_sizes": [7, 3, 3],
    "patch_stride": [4, 2, 2],
    "patch_padding": [2, 1, 1],
    "embed_dim": [8, 12, 16],
    "num_heads": [1, 2, 2],
    "depth": [1, 2, 3],
}

VISION = {
    **dict.fromkeys(("aimv2_vision_model", "altclip_vision_model", "beit", "blip_vision_model"), _PATCHES),
    **dict.fromkeys(("chinese_clip_vision_model", "clip_vision_model", "clipseg_vision_model"), _PATCHES),
    **dict.fromkeys(("data2vec-vision", "deit", "dinov2", "ijepa", "metaclip_2_vision_model"), _PATCHES),
    **dict.fromkeys(("mlcd_vision_model", "siglip_vision_model", "vit", "vit_msn"), _PATCHES),
    "bit": _RESNET | {"embedding_size": 32, "hidden_sizes": [32, 64, 96], "num_groups": 8},
    "convnext": _CONVNEXT,
    "convnextv2": _CONVNEXT,
    "cvt": _CVT,
    "dinov2_with_registers": _PATCHES | {"num_register_tokens": 2},
    "dinov3_convnext": {"hidden_sizes": [8, 12, 16], "depths": [1, 2, 1], "image_size": 32},
    "dinov3_vit": _PATCHES | {"num_register_tokens": 2},
    "donut-swin": _SWIN,
    "efficientnet": {"image_size": 64, "width_coefficient": 0.1, "depth_coefficient": 0.3, "hidden_dim": 128},
    "focalnet": {
        "image_size": 32,
        "patch_size": 2,
        "embed_dim": 8,
        "depths": [1, 2, 1],
        "focal_levels": [2, 2, 2],
        "focal_windows": [3, 3, 3],
    },
    "glpn": _STAGES,
    "hiera": {
        "image_size": [64, 64],
        "embed_dim": 8,
        "depths": [1, 2, 1],
        "num_heads": [1, 2, 2],
        "query_stride": [2, 2],
        "masked_unit_size": [4, 4],
        "masked_unit_attention": [True, True, False],
        "num_query_pool": 2,
    },
    "levit": {
        "image_size": 64,
        "hidden_sizes": [16, 24, 32],
        "num_attention_heads": [2, 2, 2],
        "depths": [1, 2, 1],
        "key_dim": [8, 8, 8],
        "mlp_ratio": [2, 2, 2],
        "attention_ratio": [2, 2, 2],
    },
    "mobilenet_v1": {"image_size": 64, "depth_multiplier": 0.25, "tf_padding": False},
    "mobilenet_v2": {"image_size": 64, "depth_multiplier": 0.25, "tf_padding": False, "finegrained_output": True},
    "mobilevit": {
        "image_size": 64,
        "hidden_sizes": [24, 32, 40],
        "neck_hidden_sizes": [8, 12, 16, 24, 32, 40, 48],
        "num_attention_heads": 2,
    },
    "mobilevitv2": {"image_size": 64, "width_multiplier": 0.25},
    "poolformer": {"hidden_sizes": [8, 12, 16, 24], "depths": [1, 1, 2, 1]},
    "pvt": _STAGES | {"image_size": 64},
    "pvt_v2": _STAGES | {"image_size": 64},
    "regnet": _RESNET | {"groups_width": 4},
    "resnet": _RESNET | {"layer_type": "basic"},
    "segformer": _STAGES,
    "siglip2_vision_model": {k: v for k, v in _PATCHES.items() if k != "image_size"} | {"num_patches": 64},
    "swiftformer": {"image_size": 64, "embed_dims": [8, 12, 16, 24], "depths": [1, 1, 1, 1]},
    "swin": _SWIN,
    "swinv2": _SWIN,
    "textnet": {
        "image_size": [64, 64],
        "hidden_sizes": [8, 8, 12, 16, 24],
        "stem_out_channels": 8,
        "conv_layer_kernel_sizes": [[[3, 3]], [[3, 3]], [[3, 3]], [[3, 3]]],
        "conv_layer_strides": [[1], [2], [2], [2]],
    },
}

_TEXT = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}
_T5 = {"vocab_size": 61, "d_model": 24, "d_kv": 12, "d_ff": 32, "num_layers": 2, "num_heads": 2}
_LLAMA = _TEXT | {"num_key_value_heads": 1, "head_dim": 12, "bos_token_id": 1, "eos_token_id": 2}
_XLM = {"vocab_size": 61, "emb_dim": 24, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 40}
_GPT = {"vocab_size": 61, "n_embd": 24, "n_layer": 2, "n_head": 2, "n_positions": 40}

TEXT = {
    **dict.fromkeys(("bert", "bert-generation", "big_bird", "camembert", "chinese_clip_text_model"), _TEXT),
    **dict.fromkeys(("clip_text_model", "clipseg_text_model", "data2vec-text", "deberta", "ernie"), _TEXT),
    **dict.fromkeys(("eurobert", "gte", "ibert", "jina_embeddings_v3", "megatron-bert"), _TEXT),
    **dict.fromkeys(("metaclip_2_text_model", "modernbert", "mpnet", "nomic_bert", "roberta"), _TEXT),
    **dict.fromkeys(("roberta-prelayernorm", "siglip2_text_model", "siglip_text_model"), _TEXT),
    **dict.fromkeys(("xlm-roberta", "xlm-roberta-xl", "gpt_neox", "phi"), _TEXT),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "llama", "mistral", "olmo2", "qwen2"), _LLAMA),
    **dict.fromkeys(("qwen3", "smollm3"), _LLAMA),
    **dict.fromkeys(("mt5", "t5", "umt5"), _T5),
    **dict.fromkeys(("flaubert", "xlm"), _XLM),
    **dict.fromkeys(("gpt2", "openai-gpt"), _GPT),
    "albert": _TEXT | {"embedding_size": 10},
    "altclip_text_model": _TEXT | {"project_dim": 14},
    "blip_text_model": _TEXT | {"encoder_hidden_size": 24},
    "bloom": {"vocab_size": 61, "hidden_size": 24, "n_layer": 2, "n_head": 2},
    "deberta-v2": _TEXT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "distilbert": {
        "vocab_size": 61,
        "dim": 24,
        "n_layers": 2,
        "n_heads": 2,
        "hidden_dim": 32,
        "max_position_embeddings": 40,
    },
    "electra": _TEXT | {"embedding_size": 10},
    "opt": _TEXT | {"ffn_dim": 32, "word_embed_proj_dim": 10},
    "rembert": _TEXT | {"input_embedding_size": 10},
    "roformer": _TEXT | {"embedding_size": 24},
}


def vision_config(family: str, **fields) -> PreTrainedConfig:
    """A tiny vision encoder's config."""
    return CONFIG_MAPPING[family](**VISION[family] | fields)


def text_config(family: str, **fields) -> PreTrainedConfig:
    """A tiny text encoder's config: 61 words, up to 40 tokens."""
    config = CONFIG_MAPPING[family]
    known = config().to_dict()
    return config(**{k: v for k, v in TEXT[family].items() if k in known or k in config.attribute_map} | fields)
