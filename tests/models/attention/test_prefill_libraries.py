"""Prefills by other packages' attention: what they are given, by fakes of their signatures, and what is refused."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from rollout import Engine, SamplingParams
from rollout.config.compose import load_config
from rollout.data.prompts import read_prompts
from rollout.errors import InputError
from rollout.job.loading import load_engine
from rollout.job.ranks import Topology
from rollout.models.attention import prefill_libraries, select, triton
from rollout.models.attention.base import PagedAttention
from rollout.models.attention.gather import GatherAttention
from rollout.models.attention.names import ATTENTION_BACKENDS
from rollout.models.attention.prefill import PrefillAttention, VarlenFunction
from rollout.models.attention.prefill_libraries import LIBRARIES, FlashAttn, Varlen
from rollout.models.attention.triton import TileSizes, TritonBackend
from rollout.models.errors import UnsupportedAttention
from rollout.models.forward_batch import ForwardBatch
from rollout.models.kv_cache.layout import AttentionLayer, KVLayout, MaskKind
from rollout.models.loading import load
from tests.support import fake_prefill_libraries as fakes
from tests.support.paged_sequences import Kind, PagedWorld, same_bits, whole
from tests.support.tiny_models import tiny
from tests.support.triton_interpreter import kernels_run_here

LIBRARY_CASES: dict[str, Callable[[], VarlenFunction]] = {
    "torch 2.11": lambda: Varlen(fakes.varlen_attn_of_torch_2_11),
    "torch 2.13": lambda: Varlen(fakes.varlen_attn_of_torch_2_13),
    "flash-attn": lambda: FlashAttn(fakes.flash_attn_varlen_func),
}
KINDS = (Kind(2, 3, 16, 16), Kind(2, 1, 24, 24, MaskKind("window", 11)), Kind(1, 4, 8, 8, MaskKind("window", 1)))
CAPPED = Kind(1, 2, 16, 16, softcap=1.5)
CPU = torch.device("cpu")


@pytest.fixture(params=list(LIBRARY_CASES))
def library(request: pytest.FixtureRequest) -> VarlenFunction:
    return LIBRARY_CASES[request.param]()


def world_for(library: VarlenFunction, lengths: list[int], dtype: torch.dtype, seed: int) -> PagedWorld:
    kinds = (*KINDS, CAPPED) if isinstance(library, FlashAttn) else KINDS
    return PagedWorld(lengths, dtype, seed, kinds, 2e-2, page_size=4, slab_pages=5)


def gather_with(world: PagedWorld, batch: ForwardBatch, library: VarlenFunction) -> PagedAttention:
    return GatherAttention(world.pool, batch, PrefillAttention(world.pool, batch, library))


# -- what it computes ------------------------------------------------------------------------------------


def test_first_and_later_prefill_chunks_equal_reference_attention(library: VarlenFunction) -> None:
    world = world_for(library, [37, 1, 20, 9], torch.bfloat16, 1)
    assert world.pool.live_slabs > 1
    # Rows that decode are gathered in whole pages here, and what nobody has written is masked.
    for slab in world.pool.slabs:
        assert slab is not None
        for tensor in slab.tensors:
            tensor.zero_()
    for parts in world.random_parts(np.random.default_rng(1), 25):
        world.compare(world.attend(gather_with(world, world.forward(parts), library).compute, parts), parts)


def test_prefills_beside_triton_decodes_equal_reference_attention(
    library: VarlenFunction, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = kernels_run_here(monkeypatch)
    if device.type != "cpu":
        pytest.skip("fakes are for CPUs; tests/gpu has the libraries themselves")
    small = {key: (TileSizes(16, 16, 4), TileSizes(16, 16, 4)) for key in triton._TILE_SIZES}
    monkeypatch.setattr(triton, "_TILE_SIZES", small)
    world = world_for(library, [30, 1, 14], torch.float16, 2)
    steps = TritonBackend(world.pool, library)
    assert steps.name == f"{library.name}+triton"
    for parts in world.random_parts(np.random.default_rng(2), 20):
        world.compare(world.attend(steps(world.pool, world.forward(parts)).compute, parts), parts)


def test_bits_do_not_depend_on_batch_composition(library: VarlenFunction) -> None:
    lengths = [30, 12, 3]
    world = world_for(library, lengths, torch.bfloat16, 3)
    alone = [
        world.attend(gather_with(world, world.forward(own := [(i, range(n))]), library).compute, own)
        for i, n in enumerate(lengths)
    ]
    parts = whole(world)
    together = world.attend(gather_with(world, world.forward(parts), library).compute, parts)
    same_bits(alone, together, parts, world.kinds)


@pytest.mark.parametrize("other", [3, 40])
def test_window_uses_the_same_kernel_for_any_batch(other: int) -> None:
    """FlashAttention 2 takes another where its ``max_seqlen_k`` is not above the keys before a query's; 3, one more."""
    asked: list[int] = []

    def watching(*arguments: Any, **named: Any) -> torch.Tensor:
        asked.append(named["max_seqlen_k"] - 1 > named["window_size"][0])
        return fakes.flash_attn_varlen_func(*arguments, **named)

    world = PagedWorld([5, other], torch.bfloat16, 4, (KINDS[1],), 2e-2)
    parts = whole(world)
    world.attend(gather_with(world, world.forward(parts), FlashAttn(watching)).compute, parts)
    assert asked == [True]


def test_a_prompt_s_last_token_alone_uses_the_kernel_of_several() -> None:
    asked: list[int] = []

    def watching(*arguments: Any, **named: Any) -> torch.Tensor:
        asked.append(named["max_seqlen_q"])
        return fakes.flash_attn_varlen_func(*arguments, **named)

    world = PagedWorld([5], torch.bfloat16, 4, (KINDS[0],), 2e-2)
    for tokens in (range(4), range(4, 5)):
        batch = replace(world.forward([(0, tokens)]), decode_lens=np.zeros(1, np.int64))
        function = PrefillAttention(world.pool, batch, FlashAttn(watching))
        world.attend(GatherAttention(world.pool, batch, function).compute, [(0, tokens)])
    assert asked == [4, 2]


def test_engine_with_library_agrees_with_gather(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With windows (mistral), a softcap beside one (gemma2), contexts computed whole (falcon_h1)."""
    monkeypatch.setattr(select, "check_available", lambda choice, device: None)
    fake = FlashAttn(fakes.flash_attn_varlen_func)
    monkeypatch.setattr(select, "installed", lambda name: fake)
    prompts = [list(range(3, 3 + n)) for n in (21, 2, 40)]
    for family in ("mistral", "gemma2", "falcon_h1"):
        model = tiny(family, torch.bfloat16)
        completions = []
        for attention in ("gather", "flash_attn"):
            with caplog.at_level(logging.DEBUG):
                engine = Engine(model, None, attention=attention, max_rows=2)
            batch = engine.generate(prompts, SamplingParams(temperature=0, max_new_tokens=4))
            completions.append([record.logprobs for record in batch])
            assert engine.attention == {"gather": "gather", "flash_attn": "flash_attn+gather"}[attention]
            assert f"with {engine.attention} attention" in caplog.text
        for gathered, found in zip(*completions, strict=True):
            assert gathered[0] == pytest.approx(found[0], abs=0.1), family


# -- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "dtype", "why"),
    [
        (
            AttentionLayer(None, 1, 16, 16, MaskKind()),
            torch.float32,
            "supports bfloat16 and float16, and the model's keys and values are float32",
        ),
        (
            AttentionLayer(None, 1, 24, 16, MaskKind()),
            torch.bfloat16,
            "equal key and value dims, and the model has key dim 24 and value dim 16",
        ),
        (AttentionLayer(None, 1, 264, 264, MaskKind()), torch.bfloat16, "the model's is 264"),
        (
            AttentionLayer(None, 1, 12, 12, MaskKind()),
            torch.bfloat16,
            "must be a multiple of 8 up to 256, and the model's is 12",
        ),
        (AttentionLayer(None, 1, 16, 16, MaskKind("chunk", 8)), torch.bfloat16, "does not support chunked attention"),
    ],
)
def test_unsupported_layouts_are_refused(
    layer: AttentionLayer, dtype: torch.dtype, why: str, library: VarlenFunction
) -> None:
    with pytest.raises(UnsupportedAttention, match=rf"^attention={library.name} .*{why}.*leave it at auto\.$"):
        prefill_libraries.check(library, KVLayout((layer,), dtype, 16), CPU)


def served(*mask_kinds: MaskKind) -> KVLayout:
    return KVLayout(tuple(AttentionLayer(None, 2, 16, 16, mask_kind) for mask_kind in mask_kinds), torch.bfloat16, 16)


def test_supported_layout_passes(library: VarlenFunction) -> None:
    prefill_libraries.check(library, served(MaskKind(), MaskKind("window", 4096)), CPU)


def test_library_that_fails_its_self_test_is_refused() -> None:
    def fails(*arguments: Any, **named: Any) -> torch.Tensor:
        raise RuntimeError("no kernel image is available.\nmore")

    def wider(*arguments: Any, **named: Any) -> torch.Tensor:
        left, right = named.pop("window_size")
        return fakes.flash_attn_varlen_func(*arguments, window_size=(left + (left >= 0), right), **named)

    with pytest.raises(
        UnsupportedAttention, match=r"its self-test failed \(RuntimeError: no kernel image is available\)"
    ):
        prefill_libraries.check(FlashAttn(fails), served(MaskKind()), CPU)
    prefill_libraries.check(FlashAttn(wider), served(MaskKind()), CPU)
    with pytest.raises(UnsupportedAttention, match="differs from reference attention by"):
        prefill_libraries.check(FlashAttn(wider), served(MaskKind(), MaskKind("window", 64)), CPU)


@pytest.mark.parametrize(
    ("family", "name", "why"), [("gpt_oss", "flash_attn", "sinks"), ("gemma2", "varlen", "softcap")]
)
def test_unsupported_softcap_and_sinks_are_refused(
    family: str, name: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the engine is made, before anything is generated."""
    monkeypatch.setattr(select, "check_available", lambda choice, device: None)
    functions = {"flash_attn": fakes.flash_attn_varlen_func, "varlen": fakes.varlen_attn_of_torch_2_13}
    made = LIBRARIES[name](functions[name])
    monkeypatch.setattr(select, "installed", lambda name: made)
    with pytest.raises(UnsupportedAttention, match=rf"attention={name} .* {why}"):
        Engine(tiny(family, torch.bfloat16), None, attention=name)


# -- what is there ---------------------------------------------------------------------------------------


@pytest.fixture
def no_library_imported() -> Iterator[None]:
    prefill_libraries.installed.cache_clear()
    yield
    prefill_libraries.installed.cache_clear()


@pytest.mark.usefixtures("no_library_imported")
def test_missing_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(UnsupportedAttention, match=r"flash_attn_varlen_func cannot be loaded \(ModuleNotFoundError: "):
        select.check_available("flash_attn", torch.device("cuda"))


@pytest.mark.usefixtures("no_library_imported")
def test_library_is_imported_under_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("flash_attn")
    module.flash_attn_varlen_func = fakes.flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    select.check_available("flash_attn", torch.device("cuda"))
    assert prefill_libraries.installed("flash_attn").name == "flash_attn"
    select.check_available("varlen", torch.device("cuda"))
    assert prefill_libraries.installed("varlen").name == "varlen"


@pytest.mark.parametrize("name", ["triton", "varlen", "flash_attn"])
def test_gpu_backend_on_a_cpu_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedAttention, match=f"attention={name} .* is for GPUs, and the model is on cpu"):
        Engine(tiny("llama", torch.bfloat16), None, attention=name)


def test_cpu_backend_on_a_gpu_is_refused() -> None:
    with pytest.raises(UnsupportedAttention, match=r"attention=compiled .* is for CPUs, and the model is on cuda"):
        select.check_available("compiled", torch.device("cuda"))


def test_requested_compiled_is_refused_rather_than_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "kernel", lambda: None)
    with pytest.raises(UnsupportedAttention, match=r"attention=compiled .* could not be compiled"):
        Engine(tiny("llama"), None, attention="compiled")


def test_gather_can_be_requested() -> None:
    assert Engine(tiny("llama"), None, attention="gather").attention == "gather"


@pytest.mark.parametrize(
    ("family", "why"), [("bloom", "attends with code of its own .*bloom"), ("mamba", "does not attend at all")]
)
def test_backend_for_model_without_interface_is_refused(family: str, why: str) -> None:
    with pytest.raises(UnsupportedAttention, match=f"attention=gather .* {why}"):
        Engine(tiny(family), None, attention="gather")


def test_job_refuses_backend_before_loading_a_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*about: object) -> None:
        raise AssertionError("a tokenizer is read")

    monkeypatch.setattr(load, "load_tokenizer", refuse)
    config = load_config(["output.dir=out", "model.device=cpu", "model.attention=varlen"])
    with pytest.raises(InputError, match=r"^model\.attention=varlen was requested, but it is for"):
        load_engine(config, read_prompts(config.data), Topology())


def test_unknown_backend_name_is_refused() -> None:
    with pytest.raises(InputError, match="attention is 'flash', but must be one of auto, triton, "):
        Engine(tiny("llama"), None, attention="flash")
    assert set(LIBRARIES) < set(ATTENTION_BACKENDS)
