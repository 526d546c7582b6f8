"""Triton's norms and rotary embeddings match transformers' own, in the interpreter if there is no GPU."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from rollout.models.patches import norms_and_rope, pointwise_triton
from rollout.models.patches.norms_and_rope import FusedModules
from rollout.models.patches.pointwise_triton import TritonPointwise
from tests.support.tiny_models import VOCABULARY, tiny
from tests.support.triton_interpreter import kernels_run_here

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
KERNEL = TritonPointwise()


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    return kernels_run_here(monkeypatch)


def numbers(*shape: int, dtype: torch.dtype, device: torch.device, seed: int) -> torch.Tensor:
    print("seed", seed)
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul(2).to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "late"), [(64, False), (75, False), (48, True), (1, False)])
def test_norm_matches_transformers(dtype: torch.dtype, width: int, late: bool, device: torch.device) -> None:
    own = (GemmaRMSNorm(width, 1e-6) if late else LlamaRMSNorm(width, 1e-6)).to(device, dtype)
    own.weight.data = numbers(width, dtype=dtype, device=device, seed=1)
    x = numbers(2, 5, width, dtype=dtype, device=device, seed=2)
    factors = KERNEL.norm_factors(own.weight, dtype, float(late))
    # A trainer may do this between two records.
    own.weight.data.mul_(-1.5)
    found, wanted = KERNEL.rms_norm(x, factors, 1e-6, late), own(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found, wanted, rtol=ROUNDING[dtype], atol=0.0)
    if dtype != torch.float32:
        assert (found == wanted).float().mean() > 0.98
    alone = KERNEL.rms_norm(x[1:, 3:4], factors, 1e-6, late)
    assert torch.equal(alone, found[1:, 3:4])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "key_heads", "dim"), [(6, 2, 16), (3, 3, 10), (2, 5, 8)])
def test_rotary_embeddings_match_transformers_bit_for_bit(
    dtype: torch.dtype, heads: int, key_heads: int, dim: int, device: torch.device
) -> None:
    tokens = 4
    # As in attention layers: views of [tokens, heads * dim].
    query, key = (
        numbers(1, tokens, count, dim, dtype=dtype, device=device, seed=count).transpose(1, 2)
        for count in (heads, key_heads)
    )
    cosines, sines = (numbers(1, tokens, dim, dtype=dtype, device=device, seed=seed) for seed in (8, 9))
    wanted = apply_rotary_pos_emb(query, key, cosines, sines)
    for found, own in zip(norms_and_rope._rotated(KERNEL, query, key, cosines, sines), wanted, strict=True):
        assert torch.equal(found, own)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("late", [False, True])
def test_sum_and_norm_are_those_of_two_launches_bit_for_bit(
    dtype: torch.dtype, late: bool, device: torch.device
) -> None:
    x, y = (numbers(2, 3, 75, dtype=dtype, device=device, seed=seed) for seed in (1, 2))
    factors = KERNEL.norm_factors(numbers(75, dtype=dtype, device=device, seed=3), dtype, float(late))
    residual, normed = KERNEL.add_norm(x, y, factors, 1e-6, late)
    assert torch.equal(residual, x + y)
    assert torch.equal(normed, KERNEL.rms_norm(x + y, factors, 1e-6, late))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_activation_rounds_where_torch_rounds(dtype: torch.dtype, device: torch.device) -> None:
    gate, up = (numbers(3, 700, dtype=dtype, device=device, seed=seed) for seed in (4, 5))
    found, wanted = KERNEL.gated_silu(gate, up), torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(found, wanted, rtol=ROUNDING[dtype], atol=1e-7)
    if dtype != torch.float32:
        assert (found == wanted).float().mean() > 0.99


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_model_with_fused_parts_matches_its_own_logits(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setattr(norms_and_rope, "_kernel", lambda device: KERNEL)
    model = tiny(family, dtype, num_hidden_layers=2)
    ids = torch.arange(14, device=device).view(1, 14) * 5 % VOCABULARY
    calls = dict.fromkeys(("rms_norm", "add_norm", "gated_silu", "rotate"), 0)

    def counted(name: str) -> Any:
        own = getattr(TritonPointwise, name)

        def call(*arguments: Any) -> Any:
            calls[name] += 1
            return own(*arguments)

        return call

    parts = FusedModules(model)
    for name in calls:
        monkeypatch.setattr(TritonPointwise, name, counted(name))
    with torch.no_grad():
        wanted = model(input_ids=ids, use_cache=False).logits.float()
        assert not any(calls.values())
        with parts.applied():
            found = model(input_ids=ids, use_cache=False).logits.float()
    norms = sum("RMSNorm" in type(module).__name__ for module in model.modules())
    # Gemma's layers norm what they add, and its activation is another.
    layers = 0 if family == "gemma2" else 2
    assert calls == {"rms_norm": norms - 2 * layers, "add_norm": 2 * layers, "gated_silu": layers, "rotate": 2}
    distance = (found - wanted).norm() / wanted.norm()
    assert distance < {torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]


def test_kernels_that_disagree_with_torch_are_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, device: torch.device
) -> None:
    pointwise_triton.triton_pointwise.cache_clear()
    assert pointwise_triton.triton_pointwise(device) is not None
    pointwise_triton.triton_pointwise.cache_clear()
    rotate = TritonPointwise.rotate

    def wrong(self: TritonPointwise, *arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(x + 1 for x in rotate(self, *arguments))

    monkeypatch.setattr(TritonPointwise, "rotate", wrong)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    with caplog.at_level(logging.WARNING):
        assert [pointwise_triton.triton_pointwise(device) for _ in range(2)] == [None, None]
    pointwise_triton.triton_pointwise.cache_clear()
    assert len(caplog.records) == 1
    assert "run unfused and slower on some GPU" in caplog.text
    assert "it differs from torch in torch.float32 by" in caplog.text
