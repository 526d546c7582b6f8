"""Families with norms and rotary functions, and what their models give."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tests.support.tiny_models import VOCABULARY, tiny

DTYPES = (torch.float32, torch.bfloat16)
ROTARY = "apply_rotary_pos_emb"

#: Norms that are replaced, by class; whether the family's rotary function is; and the dtypes in which the kernel then
#: serves it. All families have four layers.
FAMILIES: dict[str, tuple[dict[str, int], bool, tuple[torch.dtype, ...]]] = {
    "llama": ({"LlamaRMSNorm": 9}, True, DTYPES),
    "qwen3": ({"Qwen3RMSNorm": 17}, True, DTYPES),  # heads have norms too
    "phi3": ({"Phi3RMSNorm": 9}, True, DTYPES),
    "olmo2": ({"Olmo2RMSNorm": 17}, True, DTYPES[:1]),  # rounded late; angles are float32
    "gemma": ({"GemmaRMSNorm": 9}, True, DTYPES),  # factors above 1, rounded late
    "gemma2": ({"Gemma2RMSNorm": 17}, True, DTYPES),
    "gemma3_text": ({"Gemma3RMSNorm": 25}, True, DTYPES),
    "mixtral": ({"MixtralRMSNorm": 9}, True, DTYPES),
    "diffllama": ({"DiffLlamaRMSNorm": 9}, True, DTYPES),  # and norms without a weight
    "gpt_neox": ({}, True, ()),  # LayerNorm, and only a part of each head is turned
    "gpt_oss": ({"GptOssRMSNorm": 9}, False, ()),  # angles of half a head
    "glm4": ({"Glm4RMSNorm": 17}, False, ()),  # turns neighbours
    "llama4_text": ({"Llama4TextRMSNorm": 9}, False, ()),  # turns complex numbers
    "cohere": ({}, False, ()),  # both of its own kind
    "gpt2": ({}, False, ()),
}


def model_of(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """With norms of random weights: those of a new model, all 1 or all 0, hide where they are applied."""
    model = tiny(family, dtype)
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if "Norm" in type(module).__name__ and getattr(module, "weight", None) is not None:
            module.weight.data.add_(torch.randn(module.weight.shape, generator=generator).mul(0.3).to(dtype))
    return model


@torch.no_grad()
def logits_of(model: nn.Module, rows: int = 2, tokens: int = 33) -> torch.Tensor:
    ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(2))
    # Each row its own, as the engine gives them.
    positions = torch.arange(tokens).expand(rows, -1)
    logits: torch.Tensor = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    return logits


def logits_and_norms(model: nn.Module, classes: set[str]) -> tuple[torch.Tensor, list[Any]]:
    """And what each norm was given and gave."""
    seen: list[Any] = []
    with ExitStack() as stack:
        for module in model.modules():
            if type(module).__name__ in classes:
                hook = module.register_forward_hook(lambda norm, given, out: seen.append((norm, given[0], out)))
                stack.callback(hook.remove)
        return logits_of(model), seen


def namespaces(model: nn.Module) -> list[dict[str, Any]]:
    return [vars(sys.modules[name]) for name in sorted({type(module).__module__ for module in model.modules()})]


def traces(model: nn.Module) -> list[dict[str, Any]]:
    """Everything that hangs on the modules and stands in the namespaces of their classes."""
    return [dict(vars(module)) for module in model.modules()] + [dict(names) for names in namespaces(model)]


def heads(tokens: int = 5, batch: int = 2, dim: int = 16, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """What a family's rotary function is given: q, k, cos, sin."""
    generator = torch.Generator().manual_seed(3)
    shapes = ((batch, 4, tokens, dim), (batch, 2, tokens, dim), (batch, tokens, dim), (batch, tokens, dim))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
