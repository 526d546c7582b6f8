"""Fused norms and rotary functions: where they apply, and that they match the model's own."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral import modeling_mistral

from rollout.models.patches.norms_and_rope import FusedModules
from tests.support.norms_and_rope import (
    DTYPES,
    FAMILIES,
    ROTARY,
    heads,
    logits_and_norms,
    logits_of,
    model_of,
    namespaces,
)
from tests.support.tiny_models import tiny

pytestmark = pytest.mark.usefixtures("kernel")

# -- replaced parts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_replaced_parts_match_the_models_own(family: str, dtype: torch.dtype, served: Counter[str]) -> None:
    wanted_norms, wanted_function, serves = FAMILIES[family]
    model = model_of(family, dtype)
    own, normed = logits_and_norms(model, set(wanted_norms))
    functions = [names.get(ROTARY) for names in namespaces(model)]
    parts = FusedModules(model)
    served.clear()  # drop the calls of the tests on construction
    with parts.applied():
        names_of_replaced = [type(module).__name__ for module in model.modules() if "forward" in vars(module)]
        norms = Counter(name for name in names_of_replaced if "Norm" in name)  # test_llama_blocks.py covers the others
        replaced = [names.get(ROTARY) for names in namespaces(model)] != functions
        fused = logits_of(model)
        calls = Counter(served)
        alike = [module(x) == out for module, x, out in normed]
    assert norms == wanted_norms
    assert replaced == wanted_function
    assert calls == Counter(rms_norm=norms.total(), rotate=4 * (dtype in serves))
    assert fused.dtype == own.dtype
    if not norms:  # rotary functions alone
        assert torch.equal(fused, own)
    elif dtype == torch.bfloat16:  # one number rounded to its neighbour moves many logits
        assert torch.cat([same.flatten() for same in alike]).float().mean() > 0.9995
    assert float((fused - own).abs().max() / own.abs().max()) < (3e-6 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_take_other_layouts_and_shapes(dtype: torch.dtype, served: Counter[str]) -> None:
    norm = nn.Sequential(LlamaRMSNorm(40)).to(dtype)
    norm[0].weight.data.copy_(torch.linspace(-1, 2, 40))
    x = torch.randn(3, 4, 7, 40, generator=torch.Generator().manual_seed(4)).to(dtype)
    parts = FusedModules(norm)
    served.clear()
    for given in (x, x[0, 0, 0], x.transpose(1, 2), x[..., :0, :]):
        with parts.applied():
            fused = norm(given)
        assert fused.shape == given.shape
        assert torch.allclose(fused.float(), norm(given).float(), rtol=2**-7 if dtype == torch.bfloat16 else 1e-6)
    assert served["rms_norm"] == 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_functions_take_heads_of_any_layout(dtype: torch.dtype, served: Counter[str]) -> None:
    q, k, cos, sin = heads(dtype=dtype)
    with FusedModules(tiny("llama")).applied():
        served.clear()
        fused = modeling_llama.apply_rotary_pos_emb
        for given in (
            (q, k, cos, sin),
            (q[:1], k[:1], cos[:1], sin[:1]),
            (q[..., :1, :], k[..., :1, :], cos[:, :1], sin[:, :1]),
            # as in attention modules: token by token, views of one product
            (*torch.cat([q, k], 1).transpose(1, 2).contiguous().transpose(1, 2).split([4, 2], 1), cos, sin),
            (q, k, cos[:1].expand(2, -1, -1), sin.transpose(0, 1).contiguous().transpose(0, 1)),
        ):
            ours = fused(*given)
            for one, other in zip(ours, modeling_mistral.apply_rotary_pos_emb(*given), strict=True):
                assert torch.equal(one, other)
        assert served["rotate"] == 5


def test_unsupported_calls_use_the_familys_own_function(served: Counter[str]) -> None:
    q, k, cos, sin = heads()
    across = (q.transpose(1, 2), k.transpose(1, 2))
    spread = torch.stack([q, q], -1)[..., 0]
    own = modeling_llama.apply_rotary_pos_emb
    with FusedModules(tiny("llama")).applied():
        served.clear()
        fused = modeling_llama.apply_rotary_pos_emb
        assert fused is not own
        for arguments, named in (
            ((*across, cos, sin), {"unsqueeze_dim": 2}),
            ((*across, cos, sin, 2), {}),
            ((q, k, cos[:1], sin[:1]), {}),  # one sequence's angles for both
            ((q, k[:, :, :1], cos[:, :1], sin[:, :1]), {}),
            ((q, k, cos, sin.double()), {}),
            ((q.bfloat16(), k.bfloat16(), cos, sin), {}),
            (tuple(x.half() for x in (q, k, cos, sin)), {}),
            ((q[0], k[0], cos[0], sin[0]), {"unsqueeze_dim": 0}),
            ((spread, k, cos, sin), {}),
        ):
            for one, other in zip(fused(*arguments, **named), own(*arguments, **named), strict=True):
                assert one.dtype == other.dtype
                assert torch.equal(one, other)
        with pytest.raises(RuntimeError):
            fused(q, k[..., :8], cos, sin)
        assert not served
        fused(q=q, k=k, cos=cos, sin=sin)
        assert served["rotate"] == 1


def test_fused_modules_follow_autocast(served: Counter[str]) -> None:
    """Under autocast norms with float32 weights receive bfloat16 and use their own forward."""
    for family in ("llama", "qwen3", "gemma3_text"):
        model = model_of(family)
        with torch.autocast("cpu", torch.bfloat16):
            own = logits_of(model)
            with FusedModules(model).applied():
                served.clear()
                fused = logits_of(model)
        assert served["rms_norm"] > 0
        assert fused.dtype == own.dtype
        assert float((fused - own).abs().max() / own.abs().max()) < 2e-2


def test_fused_modules_work_in_inference_mode(served: Counter[str]) -> None:
    model = model_of("llama")
    own = logits_of(model)
    with torch.inference_mode(), FusedModules(model).applied():
        served.clear()
        fused = logits_of(model)
    assert served == Counter(rms_norm=9, rotate=4)
    assert torch.allclose(fused, own, atol=1e-5)


# -- parts left alone ------------------------------------------------------------------------------------


@torch.no_grad()
def test_rows_of_another_dtype_or_width_use_the_norms_own_forward(served: Counter[str]) -> None:
    for kept, given in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32, torch.half)):
        norm = LlamaRMSNorm(40).to(kept)
        norm.weight.copy_(torch.linspace(-1, 2, 40))
        x = torch.randn(30, 40, generator=torch.Generator().manual_seed(5)).to(given)
        own = norm(x)
        with FusedModules(norm).applied():
            assert "forward" in vars(norm)
            served.clear()
            fused = norm(x)
            assert not served
        assert fused.dtype == own.dtype
        assert torch.equal(fused, own)
    norm = LlamaRMSNorm(40)
    with FusedModules(norm).applied(), pytest.raises(RuntimeError):
        norm(torch.ones(2, 39))
