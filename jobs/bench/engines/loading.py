"""Load a model with transformers, for the engines that run its modules."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from jobs.bench.engines.harness import Task


def load(task: Task) -> PreTrainedModel:
    """Load the model with its default attention; draw random weights if the folder has none."""
    dtype: torch.dtype = getattr(torch, task.dtype)
    model: PreTrainedModel
    if task.random_weights:
        torch.manual_seed(0)
        with torch.device(task.device):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(task.model), dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(task.model, dtype=dtype, use_safetensors=True)
        cast(nn.Module, model).to(task.device)
    model.eval()
    return model
