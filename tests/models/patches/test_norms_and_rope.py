"""Norms and rotary functions in place of a model's own: which, with the same numbers, and no trace afterwards."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated
from transformers.models.zamba2.modeling_zamba2 import Zamba2RMSNormGated

from rollout.models.csrc import build
from rollout.models.csrc.build import KernelUnavailable
from rollout.models.patches.norms_and_rope import FusedParts
from rollout.models.patches.pointwise_cpu import Pointwise, pointwise
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


@pytest.fixture(autouse=True)
def kernel() -> None:
    try:
        build.compiler()
    except KernelUnavailable as error:
        pytest.skip(str(error))
    assert pointwise() is not None


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Calls of the kernel by its entry point."""
    calls: Counter[str] = Counter()

    def counting(name: str, own: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            calls[name] += 1
            return own(*arguments, **named)

        return counted

    for name in ("rms_norm", "rotate"):
        monkeypatch.setattr(Pointwise, name, counting(name, getattr(Pointwise, name)))
    return calls


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


# -- which, and their numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_replaced_computes_the_same(family: str, dtype: torch.dtype, served: Counter[str]) -> None:
    wanted_norms, wanted_function, serves = FAMILIES[family]
    model = model_of(family, dtype)
    own, normed = logits_and_norms(model, set(wanted_norms))
    functions = [names.get(ROTARY) for names in namespaces(model)]
    parts = FusedParts(model)
    served.clear()  # of trials
    with parts.in_place():
        names_of_replaced = [type(module).__name__ for module in model.modules() if "forward" in vars(module)]
        norms = Counter(name for name in names_of_replaced if "Norm" in name)  # test_known_forwards.py has the others
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
    elif dtype == torch.bfloat16:  # where one number is rounded to a neighbour, many of the logits are too
        assert torch.cat([same.flatten() for same in alike]).float().mean() > 0.9995
    assert float((fused - own).abs().max() / own.abs().max()) < (3e-6 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_of_other_layouts_and_shapes(dtype: torch.dtype, served: Counter[str]) -> None:
    norm = nn.Sequential(LlamaRMSNorm(40)).to(dtype)
    norm[0].weight.data.copy_(torch.linspace(-1, 2, 40))
    x = torch.randn(3, 4, 7, 40, generator=torch.Generator().manual_seed(4)).to(dtype)
    parts = FusedParts(norm)
    served.clear()
    for given in (x, x[0, 0, 0], x.transpose(1, 2), x[..., :0, :]):
        with parts.in_place():
            fused = norm(given)
        assert fused.shape == given.shape
        assert torch.allclose(fused.float(), norm(given).float(), rtol=2**-7 if dtype == torch.bfloat16 else 1e-6)
    assert served["rms_norm"] == 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_functions_take_heads_of_any_layout(dtype: torch.dtype, served: Counter[str]) -> None:
    q, k, cos, sin = heads(dtype=dtype)
    with FusedParts(tiny("llama")).in_place():
        served.clear()
        fused = modeling_llama.apply_rotary_pos_emb
        for given in (
            (q, k, cos, sin),
            (q[:1], k[:1], cos[:1], sin[:1]),
            (q[..., :1, :], k[..., :1, :], cos[:, :1], sin[:, :1]),
            # as attention modules have them: token by token, of one product
            (*torch.cat([q, k], 1).transpose(1, 2).contiguous().transpose(1, 2).split([4, 2], 1), cos, sin),
            (q, k, cos[:1].expand(2, -1, -1), sin.transpose(0, 1).contiguous().transpose(0, 1)),
        ):
            ours = fused(*given)
            for one, other in zip(ours, modeling_mistral.apply_rotary_pos_emb(*given), strict=True):
                assert torch.equal(one, other)
        assert served["rotate"] == 5


def test_calls_that_the_kernel_does_not_serve_are_the_family_s_own(served: Counter[str]) -> None:
    q, k, cos, sin = heads()
    across = (q.transpose(1, 2), k.transpose(1, 2))
    spread = torch.stack([q, q], -1)[..., 0]
    own = modeling_llama.apply_rotary_pos_emb
    with FusedParts(tiny("llama")).in_place():
        served.clear()
        fused = modeling_llama.apply_rotary_pos_emb
        assert fused is not own
        for arguments, named in (
            ((*across, cos, sin), {"unsqueeze_dim": 2}),
            ((*across, cos, sin, 2), {}),
            ((q, k, cos[:1], sin[:1]), {}),  # one text's angles for both
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


def test_autocast_is_obeyed(served: Counter[str]) -> None:
    """Norms of float32 weights are given bfloat16 there; what they make of it is their own business."""
    for family in ("llama", "qwen3", "gemma3_text"):
        model = model_of(family)
        with torch.autocast("cpu", torch.bfloat16):
            own = logits_of(model)
            with FusedParts(model).in_place():
                served.clear()
                fused = logits_of(model)
        assert served["rms_norm"] > 0
        assert fused.dtype == own.dtype
        assert float((fused - own).abs().max() / own.abs().max()) < 2e-2


def test_inference_mode_is_served_too(served: Counter[str]) -> None:
    model = model_of("llama")
    own = logits_of(model)
    with torch.inference_mode(), FusedParts(model).in_place():
        served.clear()
        fused = logits_of(model)
    assert served == Counter(rms_norm=9, rotate=4)
    assert torch.allclose(fused, own, atol=1e-5)


# -- what is left alone ----------------------------------------------------------------------------------


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
    with FusedParts(model).in_place():
        assert "forward" in vars(model[0])
        assert "forward" not in vars(model[1])


def test_torch_s_own_norm_is_replaced_where_its_epsilon_is_known() -> None:
    norm, x = nn.RMSNorm(32, eps=1e-3), torch.linspace(-0.1, 0.2, 96).view(3, 32)
    with FusedParts(norm).in_place():
        assert "forward" in vars(norm)
        fused = norm(x)
    assert torch.allclose(fused, norm(x), rtol=1e-6)


@torch.no_grad()
def test_patched_norms_stay_patched() -> None:
    model, x = nn.Sequential(LlamaRMSNorm(8), LlamaRMSNorm(8)), torch.ones(8)

    def patch(hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + 1

    model[0].forward = patch
    with FusedParts(model).in_place():
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
    parts = FusedParts(model)
    assert seen == []
    with parts.in_place():
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
    with FusedParts(tiny("llama")).in_place():
        assert modeling_llama.apply_rotary_pos_emb is slower
    assert modeling_llama.apply_rotary_pos_emb is slower


@torch.no_grad()
def test_rows_of_another_dtype_or_width_are_the_norm_s_own_business(served: Counter[str]) -> None:
    for kept, given in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32, torch.half)):
        norm = LlamaRMSNorm(40).to(kept)
        norm.weight.copy_(torch.linspace(-1, 2, 40))
        x = torch.randn(30, 40, generator=torch.Generator().manual_seed(5)).to(given)
        own = norm(x)
        with FusedParts(norm).in_place():
            assert "forward" in vars(norm)
            served.clear()
            fused = norm(x)
            assert not served
        assert fused.dtype == own.dtype
        assert torch.equal(fused, own)
    norm = LlamaRMSNorm(40)
    with FusedParts(norm).in_place(), pytest.raises(RuntimeError):
        norm(torch.ones(2, 39))


def test_half_precision_that_the_kernel_has_not_is_left_alone(served: Counter[str]) -> None:
    model = tiny("llama", torch.float16)
    own = logits_of(model)
    with FusedParts(model).in_place():
        served.clear()
        assert torch.equal(logits_of(model), own)
    assert not served


def test_without_a_compiler_nothing_is_replaced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny("llama")
    monkeypatch.setenv("CC", "no-such-compiler")
    pointwise.cache_clear()
    before = traces(model)
    try:
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                with FusedParts(model).in_place():
                    assert traces(model) == before
    finally:
        pointwise.cache_clear()
    assert sum("pointwise.c" in message for message in caplog.messages) == 1


# -- no trace --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss"])
def test_nothing_stays_on_modules_or_in_namespaces(family: str) -> None:
    model = tiny(family).train()
    before, generator = traces(model), torch.get_rng_state()
    parts = FusedParts(model)
    assert traces(model) == before
    for _ in range(2):
        with parts.in_place():
            assert traces(model) != before
            logits_of(model)
        assert traces(model) == before
    with pytest.raises(KeyError), parts.in_place():
        raise KeyError
    assert traces(model) == before
    assert torch.equal(torch.get_rng_state(), generator)


def test_nothing_stays_when_a_block_cannot_be_entered() -> None:
    class Sealed(LlamaRMSNorm):
        def __setattr__(self, name: str, value: Any) -> None:
            if name == "forward":
                raise AttributeError("sealed")
            super().__setattr__(name, value)

    model = tiny("llama")
    model.model.norm.__class__ = type("SealedRMSNorm", (Sealed,), {})
    before = traces(model)
    with pytest.raises(AttributeError, match="sealed"), FusedParts(model).in_place():
        pass
    assert traces(model) == before


@torch.no_grad()
def test_changed_weights_are_seen_when_made_anew() -> None:
    model = model_of("llama")
    parts = FusedParts(model)
    with parts.in_place():
        before = logits_of(model)
    model.model.norm.weight.neg_()
    with parts.in_place():
        assert torch.equal(logits_of(model), before)  # copies
    with FusedParts(model).in_place():
        assert torch.allclose(logits_of(model), -before, atol=1e-6)


# -- other threads ---------------------------------------------------------------------------------------


@pytest.fixture
def other_thread() -> Iterator[Callable[..., Any]]:
    """Calls a function there, and returns what it returns."""
    with ThreadPoolExecutor(1) as executor:
        yield lambda function, *arguments: executor.submit(function, *arguments).result()


def test_other_threads_get_the_family_s_own_function(other_thread: Callable[..., Any], served: Counter[str]) -> None:
    """A trainer's thread needs what it computes with for its gradients."""

    def grow() -> list[torch.Tensor]:
        q, k, cos, sin = heads()
        q.requires_grad_()
        rotated = modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)
        sum(x.sum() for x in rotated).backward()
        assert q.grad is not None
        return [*(x.detach() for x in rotated), q.grad]

    wanted = other_thread(grow)
    with FusedParts(tiny("llama")).in_place():
        served.clear()
        got = other_thread(grow)
        assert not served
        modeling_llama.apply_rotary_pos_emb(*heads())
        assert served["rotate"] == 1
    assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))


def test_a_second_model_s_parts_made_inside_another_thread_s_block(
    other_thread: Callable[..., Any], served: Counter[str]
) -> None:
    """They put back the family's own function, not what stood in its place when they were made."""
    own = modeling_llama.apply_rotary_pos_emb
    first, second = FusedParts(tiny("llama")), tiny("llama")
    with first.in_place():
        parts = other_thread(FusedParts, second)
    with parts.in_place():
        served.clear()
        logits_of(second)
        assert served == Counter(rms_norm=9, rotate=4)
    assert modeling_llama.apply_rotary_pos_emb is own


def test_blocks_of_two_threads_that_overlap(other_thread: Callable[..., Any]) -> None:
    own = modeling_llama.apply_rotary_pos_emb
    models = [tiny("llama"), tiny("llama")]
    wanted = logits_of(models[0])
    parts = [FusedParts(model) for model in models]
    here, there = parts[0].in_place(), parts[1].in_place()
    here.__enter__()
    other_thread(there.__enter__)
    here.__exit__(None, None, None)
    assert torch.allclose(other_thread(logits_of, models[1]), wanted, atol=1e-5)
    assert torch.equal(logits_of(models[0]), wanted)
    other_thread(there.__exit__, None, None, None)
    assert modeling_llama.apply_rotary_pos_emb is own
    assert not any("forward" in vars(module) for model in models for module in model.modules())
