"""Norms and rotary functions that are not replaced."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated
from transformers.models.zamba2.modeling_zamba2 import Zamba2RMSNormGated

from rollout.models.patches.norms_and_rope import FusedModules
from tests.support.norms_and_rope import ROTARY, logits_of
from tests.support.tiny_models import tiny

pytestmark = pytest.mark.usefixtures("kernel")


class Plus(LlamaRMSNorm):
    """Looks like a norm with one weight but adds a constant."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) + 0.01


class LaterRMSNorm(LlamaRMSNorm):
    """Adds an optional residual."""

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        normal: torch.Tensor = super().forward(hidden_states)
        return normal if residual is None else normal + residual


class BiasedRMSNorm(LlamaRMSNorm):
    """Has a bias, which is zero before training."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) + self.bias


class BufferedRMSNorm(LlamaRMSNorm):
    """Counts in a buffer."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.register_buffer("calls", torch.zeros(()))


class Quantized(torch.Tensor):
    """A tensor subclass, as quantization libraries use."""


PlusRMSNorm = type("PlusRMSNorm", (Plus,), {})


def quantized(size: int) -> nn.Module:
    norm = LlamaRMSNorm(size)
    norm.weight = nn.Parameter(torch.ones(size).as_subclass(Quantized), requires_grad=False)
    return norm


@pytest.mark.parametrize(
    "make",
    [
        lambda size: Zamba2RMSNormGated(size, group_size=size),
        Qwen3NextRMSNormGated,
        nn.LayerNorm,
        lambda size: nn.LayerNorm(size, bias=False),
        CohereLayerNorm,
        PlusRMSNorm,
        LaterRMSNorm,
        BiasedRMSNorm,
        BufferedRMSNorm,
        quantized,
        lambda size: LlamaRMSNorm(size).half(),
        lambda size: LlamaRMSNorm(size).to("meta"),
        nn.RMSNorm,  # its epsilon is None and depends on the dtype
        lambda size: nn.RMSNorm(size, elementwise_affine=False),
        lambda size: nn.RMSNorm((3, size)),
    ],
)
def test_other_norms_are_not_replaced(make: Callable[[int], nn.Module]) -> None:
    model = nn.Sequential(LlamaRMSNorm(32), make(32))
    with FusedModules(model).applied():
        assert "forward" in vars(model[0])
        assert "forward" not in vars(model[1])


def test_norm_of_torch_with_a_stated_epsilon_is_replaced() -> None:
    norm, x = nn.RMSNorm(32, eps=1e-3), torch.linspace(-0.1, 0.2, 96).view(3, 32)
    with FusedModules(norm).applied():
        assert "forward" in vars(norm)
        fused = norm(x)
    assert torch.allclose(fused, norm(x), rtol=1e-6)


@torch.no_grad()
def test_patched_norms_are_not_replaced() -> None:
    model, x = nn.Sequential(LlamaRMSNorm(8), LlamaRMSNorm(8)), torch.ones(8)

    def patch(hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + 1

    model[0].forward = patch
    with FusedModules(model).applied():
        assert "forward" in vars(model[1])
        assert torch.equal(model[0](x), x + 1)
    assert model[0].forward is patch


@torch.no_grad()
def test_hooks_run_on_fused_norms_but_not_on_construction() -> None:
    model, x = nn.Sequential(LlamaRMSNorm(8)), torch.linspace(1, 2, 8)
    seen: list[torch.Size] = []

    def hook(module: nn.Module, given: tuple[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
        seen.append(out.shape)
        return out + 1

    model[0].register_forward_hook(hook)
    own = model(x)
    seen.clear()
    parts = FusedModules(model)
    assert seen == []
    with parts.applied():
        assert "forward" in vars(model[0])
        assert torch.allclose(model(x), own)
    assert seen == [x.shape]


def test_patched_rotary_function_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    own = modeling_llama.apply_rotary_pos_emb

    def slower(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return own(q, k, cos, -sin, unsqueeze_dim)

    monkeypatch.setattr(modeling_llama, ROTARY, slower)
    with FusedModules(tiny("llama")).applied():
        assert modeling_llama.apply_rotary_pos_emb is slower
    assert modeling_llama.apply_rotary_pos_emb is slower


def test_models_in_an_unsupported_dtype_are_not_replaced(served: Counter[str]) -> None:
    model = tiny("llama", torch.float16)
    own = logits_of(model)
    with FusedModules(model).applied():
        served.clear()
        assert torch.equal(logits_of(model), own)
    assert not served
