"""Load a model with transformers, for the engines that run its modules."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from jobs.bench.engines.harness import Setup


def load(setup: Setup) -> PreTrainedModel:
    """Load the model with its default attention; draw random weights if the folder has none."""
    dtype: torch.dtype = getattr(torch, setup.dtype)
    model: PreTrainedModel
    if setup.random_weights:
        torch.manual_seed(0)
        with torch.device(setup.device):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(setup.model), dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(setup.model, dtype=dtype, use_safetensors=True)
        cast(nn.Module, model).to(setup.device)
    model.eval()
    return model
