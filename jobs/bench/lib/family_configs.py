"""Tiny random models of every family that transformers has: configurations in which every size is small."""

from __future__ import annotations

from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from tests.support import tiny_models
from tests.support.tiny_models import SERVED, VOCABULARY

_WINDOW = 12
#: Tiny values of the fields that families share; each gets those that its configuration has.
_FIELDS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
    "is_decoder": True,
    # width and depth
    **dict.fromkeys(("hidden_size", "embedding_size", "embedding_dim", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "decoder_layers", "num_decoder_layers", "num_blocks"), 4),
    **dict.fromkeys(("encoder_layers", "num_encoder_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "decoder_attention_heads", "encoder_attention_heads", "n_heads"), 4),
    **dict.fromkeys(("num_decoder_attention_heads", "num_encoder_attention_heads", "num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "attention_head_size", "d_head", "dim_head"), 16),
    "swa_num_attention_heads": 4,
    **dict.fromkeys(("intermediate_size", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_dim", "n_inner", "dff"), 96),
    **dict.fromkeys(("ffn_hidden_size", "expert_ffn_hidden_size", "dim_ff", "intermediate_size_mlp"), 96),
    **dict.fromkeys(("dense_intermediate_size", "shared_intermediate_size", "prefix_dense_intermediate_size"), 96),
    "feed_forward_size": 96,
    "rotary_dim": 8,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCABULARY,
    "query_pre_attn_scalar": 16,
    # experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "n_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("moe_num_shared_experts", "first_k_dense_replace", "num_dense_layers", "zero_expert_num"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 48),
    **dict.fromkeys(("shared_experts_intermediate_size", "moe_shared_expert_intermediate_size"), 48),
    "router_hidden_size": 16,
    # latent attention
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "o_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 8,
    # windows
    **dict.fromkeys(("sliding_window", "sliding_window_size", "window_size", "attention_chunk_size"), _WINDOW),
    **dict.fromkeys(("attention_window_size", "local_attention", "keep_window_size"), _WINDOW),
    "use_sliding_window": True,
    "max_window_layers": 2,
    # recurrences
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "mamba_ngroups"), 1),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 8),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank"), 4),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 16),
    "attention_hidden_size": 64,
    "lru_width": 64,
}
#: Fields of the parts of a composite model that read images or sound.
_SENSES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "output_dim", "vision_output_dim", "projector_input_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "num_global_layers", "depth", "encoder_layers", "conf_num_hidden_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "attention_heads", "num_heads", "conf_num_attention_heads"), 2),
    "out_hidden_size": 64,
    "vocab_size": 8,
}
#: Model classes of each family; one that also reads images or sound may have two, for text alone and for both.
_MULTIMODAL = MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES | MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
WITH_SENSES = {
    f"{family}/multimodal" if family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else family: name
    for family, name in _MULTIMODAL.items()
    if name != MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(family)
}
FAMILIES: dict[str, Any] = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES | WITH_SENSES
_OWN = object()
"""The family's own value of a field."""
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_SECTIONED = ("qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text", "paddleocr_vl_text", "cosmos3_edge_text")
#: Extra configuration of single families.
_FIXES: dict[str, dict[str, Any]] = {
    # Latent attention: heads are rotated over what is called head_dim, and keys are not shared.
    **{
        family: {"head_dim": 8, "num_key_value_heads": 4}
        for family in ("axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "longcat_flash", "minicpm3", "youtu")
    },
    "dbrx": {
        "d_model": 64,
        "max_seq_len": 256,
        "n_layers": 4,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
    # Wide heads whose scores are not scaled down: generate's own rounding is above what is told apart here.
    **{family: {"head_dim": 16, "global_head_dim": 16} for family in ("gemma4_text", "gemma4_unified_text")},
    "gemma3n_text": {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "prophetnet": {"num_hidden_layers": _OWN},
    "xlnet": {"max_position_embeddings": _OWN},
    "xlstm": {"v_head_dim": _OWN},
    "reformer": {"axial_pos_embds": False},
    # Rotary embeddings of several axes: sections of half a head, or of the half that is rotated.
    **{family: {"rope_parameters": _ROPE | {"mrope_section": [2, 3, 3]}} for family in _SECTIONED},
    **{
        family: {"rope_parameters": _ROPE | {"partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}}
        for family in ("glm4v_text", "glm4v_moe_text", "glm_ocr_text")
    },
    "hunyuan_vl_text": {"rope_parameters": _ROPE | {"mrope_section": [2, 2, 2, 2]}},
    # Fields that its attention ignores and generate's cache does not.
    "qwen3_vl_moe_text": {"sliding_window": _OWN, "use_sliding_window": _OWN},
}


def tiny_config(family: str) -> PreTrainedConfig:
    """Return a configuration in which every size is small and every window shorter than the test's texts."""
    if family in SERVED:
        return tiny_models.tiny_config(family)
    kind = CONFIG_MAPPING[family.removesuffix("/multimodal")]
    return kind(**_known(kind(), _FIELDS))


def auto_class(family: str) -> Any:
    """Return the auto class that makes a model of ``family``."""
    if family not in WITH_SENSES:
        return AutoModelForCausalLM
    name = family.removesuffix("/multimodal")
    return (
        AutoModelForImageTextToText if name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES else AutoModelForMultimodalLM
    )


def _known(default: PreTrainedConfig, fields: dict[str, Any]) -> dict[str, Any]:
    """Return the ``fields`` that a configuration has, with its family's own, recursively for its parts."""
    parts = {}
    for name in default.sub_configs:
        part = getattr(default, name, None)
        if isinstance(part, PreTrainedConfig):
            parts[name] = _known(part, _SENSES if name.startswith(("vision", "audio")) else _FIELDS)
            parts[name]["model_type"] = part.model_type
    some = {name: value for name, value in fields.items() if _has(default, name)}
    own = some | parts | _FIXES.get(default.model_type, {})
    return {name: value for name, value in own.items() if value is not _OWN}


def _has(default: PreTrainedConfig, name: str) -> bool:
    """Return whether a configuration has one value ``name``; some have one per layer and raise."""
    try:
        return hasattr(default, name)
    except Exception:  # noqa: BLE001
        return False
