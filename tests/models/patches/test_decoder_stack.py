"""All decoder layers in one call: where it applies, and that it computes what the modules do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from rollout import Engine, SamplingParams
from rollout.engine import patches as engine_patches
from rollout.engine.patches import Patches
from rollout.models.attention.compiled import CompiledBackend, kernel
from rollout.models.forward_batch import ForwardBatch
from rollout.models.kv_cache.page_pool import PagePool
from rollout.models.module.changes import ModuleWatch
from rollout.models.patches.decoder_library import DecoderLibrary, decoder_library
from rollout.models.patches.shared_inputs import shared_inputs
from rollout.models.runners.packed import PackedRunner, PackedStrategy
from tests.support.tiny_models import VOCABULARY, tiny

KNOWN = ("llama", "mistral", "qwen2", "qwen3")
UNKNOWN = ("gemma2", "granite", "mixtral", "olmo2", "phi3", "qwen3_moe", "gpt2")
DTYPES = (torch.float32, torch.bfloat16)
PLENTY = 1e9


@pytest.fixture(autouse=True)
def compiled() -> None:
    if kernel() is None or decoder_library() is None:
        pytest.skip("no C compiler here")


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of all forwards that the kernel has run."""
    seen: list[int] = []
    own = DecoderLibrary.run

    def run(library: DecoderLibrary, stack: Any) -> None:
        seen.append(stack.tokens)
        own(library, stack)

    monkeypatch.setattr(DecoderLibrary, "run", run)
    return seen


class Forwards:
    """Forwards of a model over pages, with the engine's patches or without.

    Args:
        model: the module.
        layerwise: whether the modules of the layers are called one by one.
    """

    def __init__(self, model: nn.Module, *, layerwise: bool = False) -> None:
        self.model = model
        self.strategy = PackedStrategy(model)
        with shared_inputs(model) as groups:
            self.layout = self.strategy.kv_layout()
        self.patches = Patches(model, groups, has_states=False)
        self.patches.fit(PLENTY)
        self.layerwise = layerwise

    @contextmanager
    def applied(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch, self.strategy.borrow():
            if self.layerwise:
                patch.setattr(engine_patches, "decoder_stack", lambda *_: None)
            with self.patches.applied():
                yield

    def logits(self, prompts: list[list[int]], cuts: list[list[int]]) -> list[torch.Tensor]:
        """Return each prompt's logits [n, V]; the i-th forward computes cuts[i][s] tokens of sequence s."""
        size = self.layout.page_size
        pages = [-(-len(prompt) // size) for prompt in prompts]
        pool = PagePool(self.layout, sum(pages), torch.device("cpu"))
        pool.grow()
        tables = np.full((len(prompts), max(pages)), -1, np.int64)
        ids = iter(np.random.default_rng(1).permutation(sum(pages)))
        for table, count in zip(tables, pages, strict=True):
            table[:count] = [next(ids) for _ in range(count)]
        found = kernel()
        assert found is not None
        runner = PackedRunner(self.model, pool, CompiledBackend(found))
        done, out = np.zeros(len(prompts), np.int64), [[] for _ in prompts]  # type: ignore[var-annotated]
        with self.applied():
            for cut in cuts:
                some = np.flatnonzero(cut)
                lens = np.array(cut)[some]
                tokens = [prompts[s][done[s] : done[s] + cut[s]] for s in some]
                batch = ForwardBatch(
                    tokens=torch.tensor([*chain.from_iterable(tokens)]),
                    page_tables=tables[some],
                    prefix_lens=done[some],
                    query_lens=lens,
                    logits_lens=lens,
                )
                parts = torch.split(runner.forward(batch), lens.tolist())
                for s, part in zip(some, parts, strict=True):
                    out[s].append(part)
                    done[s] += cut[s]
        return [torch.cat(parts) for parts in out]


def prompts_of(*lengths: int) -> list[list[int]]:
    return [[(7 * i * i + 3 * i + n) % (VOCABULARY - 3) + 3 for i in range(n)] for n in lengths]


def whole(*lengths: int) -> list[list[int]]:
    return [list(lengths)]


def decoding(lengths: list[int], steps: int) -> list[list[int]]:
    """Cuts that prefill all but the last tokens, and compute those one by one."""
    return [[n - steps for n in lengths], *[[1] * len(lengths)] * steps]


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", KNOWN)
def test_known_families_match_their_own_forward(family: str, dtype: torch.dtype, runs: list[int]) -> None:
    model = tiny(family).to(dtype)
    ours = Forwards(model)
    for lengths, cuts in (
        ((1,), whole(1)),
        ((2, 17), whole(2, 17)),
        ((64, 1, 300), whole(64, 1, 300)),
        ((40, 9, 25), [[39, 3, 0], [1, 6, 20], [0, 0, 5]]),
        ((20,) * 17, decoding([20] * 17, 3)),
    ):
        prompts = prompts_of(*lengths)
        runs.clear()
        got = ours.logits(prompts, cuts)
        assert runs == [sum(cut) for cut in cuts]
        for prompt, found in zip(prompts, got, strict=True):
            ids = torch.tensor([prompt])
            own = model(input_ids=ids).logits[0]
            if dtype == torch.float32:
                assert (found - own).abs().max() <= 1e-5
            else:
                exact = model.float()(input_ids=ids).logits[0]
                model.to(dtype)
                assert (found.float() - exact).abs().mean() <= 2 * (own.float() - exact).abs().mean() + 1e-4


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", KNOWN)
def test_layers_at_once_match_layers_one_by_one(family: str, dtype: torch.dtype, runs: list[int]) -> None:
    model = tiny(family).to(dtype)
    prompts = prompts_of(300, 1, 33)
    cuts = [[100, 0, 33], [199, 1, 0], [1, 0, 0]]
    at_once = Forwards(model).logits(prompts, cuts)
    assert len(runs) == 3
    one_by_one = Forwards(model, layerwise=True).logits(prompts, cuts)
    assert len(runs) == 3
    for ours, theirs in zip(at_once, one_by_one, strict=True):
        largest = theirs.float().abs().max()
        assert (ours.float() - theirs.float()).abs().max() <= (1e-5 if dtype == torch.float32 else 0.03) * largest


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["mistral", "qwen3"])
def test_bits_do_not_depend_on_the_batch(family: str, dtype: torch.dtype) -> None:
    forwards = Forwards(tiny(family).to(dtype))
    prompts = prompts_of(130, 260, 2)
    together = forwards.logits(prompts, whole(130, 260, 2))
    for cuts in ([[129, 256, 1], [1, 4, 1]], [[0, 1, 0], [1, 200, 2], [129, 59, 0]], [[13, 26, 0]] * 10 + [[0, 0, 2]]):
        for ours, theirs in zip(forwards.logits(prompts, cuts), together, strict=True):
            assert torch.equal(ours, theirs)
    for prompt, theirs in zip(prompts, together, strict=True):
        assert torch.equal(forwards.logits([prompt], whole(len(prompt)))[0], theirs)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 3)
        for ours, theirs in zip(forwards.logits(prompts, whole(130, 260, 2)), together, strict=True):
            assert torch.equal(ours, theirs)
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def test_a_long_prompt_and_many_rows(runs: list[int]) -> None:
    model = tiny("llama")
    forwards = Forwards(model)
    long, *rows = prompts_of(4000, *[9] * 300)
    got = forwards.logits([long, *rows], [[3990, *[8] * 300], [10, *[1] * 300]])
    assert runs == [3990 + 2400, 310]
    for prompt, found in ((long, got[0]), (rows[0], got[1]), (rows[-1], got[-1])):
        own = model(input_ids=torch.tensor([prompt])).logits[0]
        assert (found - own).abs().max() <= 2e-5


@pytest.mark.parametrize("family", UNKNOWN)
def test_other_families_take_the_modules_way(family: str, runs: list[int]) -> None:
    Engine(tiny(family), None).generate([[5, 6, 7]], SamplingParams(max_new_tokens=2, ignore_eos=True))
    assert not runs


def generated(model: nn.Module) -> list[float]:
    params = SamplingParams(max_new_tokens=3, ignore_eos=True, temperature=0.0)
    return Engine(model, None).generate([[5, 6, 7]], params)[0].logprobs


def test_adapters_hooks_and_patches_take_the_modules_way(runs: list[int]) -> None:
    adapted = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["v_proj"]))
    generated(adapted)
    model: Any = tiny("llama")
    layer = model.model.layers[1]
    for module in (
        layer,
        layer.self_attn,
        layer.mlp.act_fn,
        layer.mlp.up_proj,
        layer.input_layernorm,
        model.model.norm,
    ):
        handle = module.register_forward_hook(lambda *_: None)
        generated(model)
        handle.remove()
    for module in (layer, layer.mlp, layer.self_attn.q_proj, model.model):
        module.forward = module.forward
        generated(model)
        del module.forward
    assert not runs
    generated(model)
    assert runs


def test_forwards_whose_hidden_states_are_wanted_take_the_modules_way(runs: list[int]) -> None:
    model: Any = tiny("llama")
    forwards = Forwards(model)
    prompt = prompts_of(9)
    plain = forwards.logits(prompt, whole(9))[0]
    assert len(runs) == 1
    model.config.output_hidden_states = True
    assert torch.allclose(forwards.logits(prompt, whole(9))[0], plain, atol=1e-5)
    assert len(runs) == 1


def test_float16_and_autocast_take_the_modules_way(runs: list[int]) -> None:
    generated(tiny("llama").half())
    with torch.autocast("cpu", torch.bfloat16):
        generated(tiny("llama"))
    assert not runs


def test_layers_without_room_for_copies_take_the_modules_way(runs: list[int]) -> None:
    forwards = Forwards(tiny("llama"))
    forwards.patches.drop_copies()
    forwards.patches.fit(2 * 4 * 64 * 64 * 4)
    forwards.logits(prompts_of(5), whole(5))
    assert not runs


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_changed_weights_are_those_of_the_next_forward(family: str, runs: list[int]) -> None:
    model: Any = tiny(family)
    forwards, watch = Forwards(model), ModuleWatch(model)
    prompt = prompts_of(9)[0]
    before = forwards.logits([prompt], whole(9))[0]
    attention, mlp = model.model.layers[1].self_attn, model.model.layers[2].mlp
    for change in (
        lambda: attention.k_proj.weight.mul_(1.5),
        lambda: mlp.down_proj.weight.data.neg_(),
        lambda: model.model.layers[0].input_layernorm.weight.mul_(2.0),
        lambda: model.model.norm.weight.add_(1.0),
        lambda: attention.v_proj.bias.add_(1.0) if family == "qwen2" else attention.q_norm.weight.mul_(3.0),
        lambda: setattr(mlp.up_proj, "weight", nn.Parameter(mlp.up_proj.weight * 2)),
    ):
        change()
        seen = watch.look()
        forwards.patches.refresh(seen)
        forwards.patches.fit(PLENTY)
        after = forwards.logits([prompt], whole(9))[0]
        own = model(input_ids=torch.tensor([prompt])).logits[0]
        assert not torch.equal(after, before)
        assert (after - own).abs().max() <= 2e-5
        before = after
    assert len(runs) >= 6


def test_lack_of_working_memory_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    forwards = Forwards(tiny("llama"))
    monkeypatch.setattr(DecoderLibrary, "bytes_needed", lambda *_: 1 << 60)
    with pytest.raises(MemoryError, match="bytes of memory are not there"):
        forwards.logits(prompts_of(5), whole(5))


def test_working_memory_is_given_back(runs: list[int]) -> None:
    model = tiny("llama")
    engine = Engine(model, None)
    engine.generate([[5, 6, 7]], SamplingParams(max_new_tokens=2, ignore_eos=True))
    assert runs
    patches = engine._module._patches
    assert patches is not None
    assert patches._stack
    assert not len(patches._stack._memory)
    assert not any("forward" in vars(module) for module in model.modules())
