"""Linear layers, alone and of one input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from rollout.models.patches.linears import PackedLinears

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PLENTY = 1 << 40


def layers(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 160), nn.SiLU(), nn.Linear(160, 50, bias=False)).to(dtype)


@torch.no_grad()
def computed(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with PackedLinears(model, PLENTY).applied():
        out: torch.Tensor = model(x)
    return out


def one_input(
    dtype: torch.dtype = torch.float32, biases: Sequence[bool] = (True, False, True), sizes: Sequence[int] = (64, 32, 7)
) -> nn.ModuleList:
    """Layers that are given the same input."""
    torch.manual_seed(0)
    return nn.ModuleList(nn.Linear(48, size, bias=bias) for size, bias in zip(sizes, biases, strict=True)).to(dtype)


def as_group(model: nn.ModuleList) -> PackedLinears:
    return PackedLinears(model, PLENTY, [tuple(model)])


@torch.no_grad()
def each(model: nn.ModuleList, x: torch.Tensor) -> list[torch.Tensor]:
    return [layer(x) for layer in model]
