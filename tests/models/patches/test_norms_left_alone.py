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
    """Has the name of a norm, and one weight, but computes something else."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) + 0.01


class LaterRMSNorm(LlamaRMSNorm):
    """Adds what it is given besides, if it is."""

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        normal: torch.Tensor = super().forward(hidden_states)
        return normal if residual is None else normal + residual


class BiasedRMSNorm(LlamaRMSNorm):
    """Has a bias, of zeros until training."""

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
    """A tensor that is more than its numbers."""


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
        nn.RMSNorm,  # its epsilon is None: by dtype
        lambda size: nn.RMSNorm(size, elementwise_affine=False),
        lambda size: nn.RMSNorm((3, size)),
    ],
)
def test_other_norms_are_left_alone(make: Callable[[int], nn.Module]) -> None:
    model = nn.Sequential(LlamaRMSNorm(32), make(32))
    with FusedModules(model).applied():
        assert "forward" in vars(model[0])
        assert "forward" not in vars(model[1])


def test_torch_s_own_norm_is_replaced_where_its_epsilon_is_known() -> None:
    norm, x = nn.RMSNorm(32, eps=1e-3), torch.linspace(-0.1, 0.2, 96).view(3, 32)
    with FusedModules(norm).applied():
        assert "forward" in vars(norm)
        fused = norm(x)
    assert torch.allclose(fused, norm(x), rtol=1e-6)


@torch.no_grad()
def test_patched_norms_stay_patched() -> None:
    model, x = nn.Sequential(LlamaRMSNorm(8), LlamaRMSNorm(8)), torch.ones(8)

    def patch(hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + 1

    model[0].forward = patch
    with FusedModules(model).applied():
        assert "forward" in vars(model[1])
        assert torch.equal(model[0](x), x + 1)
    assert model[0].forward is patch


@torch.no_grad()
def test_hooks_stay_in_force_and_see_no_trial() -> None:
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


def test_a_rotary_function_that_somebody_else_put_there_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    own = modeling_llama.apply_rotary_pos_emb

    def slower(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return own(q, k, cos, -sin, unsqueeze_dim)

    monkeypatch.setattr(modeling_llama, ROTARY, slower)
    with FusedModules(tiny("llama")).applied():
        assert modeling_llama.apply_rotary_pos_emb is slower
    assert modeling_llama.apply_rotary_pos_emb is slower


def test_half_precision_that_the_kernel_has_not_is_left_alone(served: Counter[str]) -> None:
    model = tiny("llama", torch.float16)
    own = logits_of(model)
    with FusedModules(model).applied():
        served.clear()
        assert torch.equal(logits_of(model), own)
    assert not served
