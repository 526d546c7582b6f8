"""Tiny random models of many families, for the contract tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from tests.support.devices import DEVICE

VOCABULARY = 199

_BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_WINDOW = 12
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}

# Families that must work, by the run strategy that must be selected, with the fields that their tiny configurations
# need in addition to the common ones. Windows are shorter than the sequences, so a layer that ignores its window
# fails. A suffix after "/" names a variant of a family.

#: Packed strategy: attention goes through transformers' attention interface.
PACKED: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": _WINDOW},
    "gemma": {},
    # transformers 5.17 selects sdpa by default, which ignores the softcap.
    "gemma2": {"sliding_window": _WINDOW, "query_pre_attn_scalar": 16, "attn_implementation": "eager"},
    "gemma3_text": {"sliding_window": _WINDOW, "query_pre_attn_scalar": 16},
    "phi3": {"sliding_window": _WINDOW},
    "gpt2": {},
    "gpt_neox": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "starcoder2": {"sliding_window": _WINDOW},
    "stablelm": {},
    "cohere2": {"sliding_window": _WINDOW},
    "granite": {"attention_multiplier": 0.2},
    "olmo2": {},
    "smollm3": {},
    "glm4": {"partial_rotary_factor": 0.5},
    "mixtral": _EXPERTS,
    "qwen3_moe": _EXPERTS,
    "olmoe": _EXPERTS,
    "gpt_oss": _EXPERTS | {"sliding_window": _WINDOW, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "deepseek_v3": {
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 12,
        "head_dim": 8,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
        "first_k_dense_replace": 2,
        "moe_intermediate_size": 48,
    },
    # Windows and chunks that appear in the masks only, not in the arguments:
    "qwen2_moe": _EXPERTS
    | {"sliding_window": _WINDOW, "use_sliding_window": True, "max_window_layers": 2, "decoder_sparse_step": 2}
    | {"shared_expert_intermediate_size": 48},
    "phimoe": _EXPERTS | {"sliding_window": _WINDOW},
    "llama4_text": _EXPERTS | {"attention_chunk_size": _WINDOW, "intermediate_size_mlp": 96},
    "diffllama": {},
}

#: Padded strategy: the model has its own attention code.
PADDED: dict[str, dict[str, Any]] = {
    "bloom": {},
    "falcon": {},
    "falcon/alibi": {"alibi": True},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 4, "max_seq_len": 4096, "expansion_ratio": 2},
    "gptj": {"rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": _WINDOW, "num_heads": 4},
    "codegen": {"rotary_dim": 8},
    "xglm": {"ffn_dim": 96, "attention_heads": 4, "num_layers": 4},
    "gpt_neox_japanese": {"intermediate_multiple_size": 2},  # takes views of what the cache returns
}

_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_ssm": 128, "mamba_d_state": 8} | {
    "mamba_n_groups": 2,
    "mamba_chunk_size": 8,
}
_ALTERNATING = {"layer_types": ["linear_attention", "full_attention"] * 2}
_LINEAR = (
    _ALTERNATING
    | {"linear_num_value_heads": 4, "linear_num_key_heads": 2}
    | {
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    }
)
_MLA = {"q_lora_rank": 24, "kv_lora_rank": 16, "v_head_dim": 12, "head_dim": 8, "num_key_value_heads": 4} | {
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "first_k_dense_replace": 2,
    "n_group": 1,
    "topk_group": 1,
}

#: Recurrent strategy: states, alone or together with keys and values.
RECURRENT: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 8, "n_groups": 2, "chunk_size": 8},
    "falcon_mamba": {"state_size": 8},
    "falcon_h1": _MAMBA2,
    "bamba": _MAMBA2 | {"attn_layer_indices": [1, 3]},
    "jamba": {"mamba_d_state": 8, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2}
    | {"num_experts_per_tok": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": _EXPERTS | {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 2},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "mamba", "moe"], "mamba_num_heads": 8}
    | {"mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 2, "chunk_size": 8, "moe_intermediate_size": 48}
    | {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_shared_expert_intermediate_size": 48},
    "granitemoehybrid": _MAMBA2
    | _EXPERTS
    | {"layer_types": ["mamba", "attention"] * 2, "shared_intermediate_size": 48},
    "qwen3_next": _LINEAR | _EXPERTS | {"shared_expert_intermediate_size": 48},
    "qwen3_5_text": _LINEAR,
    "qwen3_5_moe_text": _LINEAR | _EXPERTS | {"shared_expert_intermediate_size": 48},
    "zamba": {"mamba_d_state": 8, "n_mamba_heads": 2, "layers_block_type": ["mamba", "hybrid"] * 2}
    | {"attention_head_dim": 32},
    # One attention module serves several layers, with an adapter for each.
    "zamba2": {"mamba_d_state": 8, "mamba_ngroups": 2, "n_mamba_heads": 8, "mamba_headdim": 16, "chunk_size": 8}
    | {"layers_block_type": ["mamba", "hybrid"] * 3, "num_hidden_layers": 6, "num_mem_blocks": 2, "adapter_rank": 8},
    "olmo_hybrid": _LINEAR,
    "kimi_linear": _MLA
    | _ALTERNATING
    | {"num_experts": 4, "num_experts_per_token": 2, "num_shared_experts": 1, "moe_intermediate_size": 48}
    | {"linear_head_dim": 16, "linear_num_heads": 4},
    "bailing_hybrid": _MLA | _ALTERNATING | _EXPERTS | {"num_shared_experts": 1},
    "lfm3": {"layer_types": ["conv", "sliding_attention", "conv", "full_attention"], "sliding_window": _WINDOW},
    "zaya": {},
}
# The oldest supported transformers does not have these families.
for _new in ("bailing_hybrid", "lfm3"):
    if _new not in CONFIG_MAPPING:
        del RECURRENT[_new]

_TEXT = _BASE | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
_SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
_VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2} | {
    "image_size": 28,
    "patch_size": 14,
}
_DEPTH = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}

#: Families that also read images, served for text: the fields of their text and vision configurations.
MULTIMODAL: dict[str, dict[str, dict[str, Any]]] = {
    "gemma3": {"text_config": _TEXT | {"sliding_window": _WINDOW}, "vision_config": _VISION},
    "idefics3": {"text_config": _TEXT | {"model_type": "llama"}, "vision_config": _VISION},
    "llava": {"text_config": _TEXT | {"model_type": "llama"}, "vision_config": _VISION | {"projection_dim": 32}},
    "mistral3": {"text_config": _TEXT | {"model_type": "mistral"}, "vision_config": _VISION},
    "qwen2_5_vl": {"text_config": _TEXT | _SECTIONS, "vision_config": _DEPTH},
    "qwen3_vl": {"text_config": _TEXT | _SECTIONS, "vision_config": _DEPTH | {"deepstack_visual_indexes": [0]}},
}

BY_STRATEGY = {"packed": PACKED, "padded": PADDED}
SERVED: dict[str, dict[str, Any]] = {
    family: fields for families in (*BY_STRATEGY.values(), RECURRENT) for family, fields in families.items()
}

#: Families that must be refused, each with a word of the reason.
REFUSED: dict[str, str] = {
    "recurrent_gemma": "recurrent",
    "rwkv": "recurrent",
    "xlstm": "recurrent",
    "minimax": "cache of its own",
}


def tiny(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """Return a model with seeded random weights in eval mode on the tests' device; every call gives the same."""
    model = random_model(tiny_config(family, **changes), dtype)
    nn.Module.to(model, DEVICE)
    return model


#: Two layers, one of each kind, in families whose own fields have more, or as many as have all kinds.
_TWO_LAYERS: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mpt": {"n_layers": 2},
    "deepseek_v3": {"first_k_dense_replace": 1},
    "bamba": {"attn_layer_indices": [1]},
    # The fourth has full attention; one attention module serves two of the six.
    "llama4_text": {"num_hidden_layers": 4},
    "zamba2": {"num_hidden_layers": 6},
}


def shallow(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """Return `tiny` with as few layers as have all kinds, for long tests that look at rows and not at layers."""
    fields = {"num_hidden_layers": 2} | _TWO_LAYERS.get(family, {})
    if "layer_types" in SERVED[family]:
        fields["layer_types"] = SERVED[family]["layer_types"][:2]
    return tiny(family, dtype, **fields | changes)


def tiny_config(family: str, **changes: Any) -> PreTrainedConfig:
    """Return a configuration of ``family``: the common fields, the family's and ``changes``."""
    fields = _BASE | SERVED.get(family, {}) | changes
    model_type = family.partition("/")[0]
    if model_type == "falcon":  # falcon derives it
        del fields["head_dim"]
    return AutoConfig.for_model(model_type, **fields)


def tiny_multimodal(family: str) -> PreTrainedModel:
    """Return a model of `MULTIMODAL` with seeded random weights in eval mode, on the CPU."""
    fields = MULTIMODAL[family]
    return random_model(AutoConfig.for_model(family, **fields), auto_class=AutoModelForImageTextToText)


def random_model(
    config: PreTrainedConfig, dtype: torch.dtype = torch.float32, *, auto_class: Any = AutoModelForCausalLM
) -> PreTrainedModel:
    """Return a model with seeded random weights in eval mode; every call gives the same."""
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    try:
        model: PreTrainedModel = auto_class.from_config(config)
    finally:
        torch.random.set_rng_state(state)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Larger than the default initialisation, so that attention affects the next token.
            if parameter.ndim > 1 and "embed" not in name:
                parameter.mul_(4.0)
    nn.Module.to(model, dtype).eval()
    return model
