"""The model as transformers loads it, for the engines that run transformers' modules."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from engines.harness import Task


def load(task: Task) -> PreTrainedModel:
    """Alike for all: with the model's own default attention."""
    dtype: torch.dtype = getattr(torch, task.dtype)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(task.model, dtype=dtype, use_safetensors=True)
    cast(nn.Module, model).to(task.device)
    model.eval()
    return model
