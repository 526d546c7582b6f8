"""Blocks with fewer launches on a GPU: the bits of separate launches, and how many there are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from rollout.models.attention import interface, triton, triton_kernels
from rollout.models.attention.triton import TileSizes, TritonAttention, TritonBackend
from rollout.models.forward_batch import ForwardBatch
from rollout.models.kv_cache.page_pool import PagePool
from rollout.models.patches import batch_invariant, norms_and_rope, products_triton
from rollout.models.patches.batch_invariant import GroupedProducts, invariant_products
from rollout.models.patches.fused_norms import FusedNorm
from rollout.models.patches.norms_and_rope import FusedModules
from rollout.models.patches.pointwise_triton import TritonPointwise
from rollout.models.patches.products_triton import ProductTile
from rollout.models.runners.packed import PackedStrategy
from tests.support.linear_groups import groups_in_probe
from tests.support.paged_sequences import Kind
from tests.support.tiny_models import VOCABULARY, tiny
from tests.support.triton_interpreter import kernels_run_here
from tests.support.triton_world import World

FAMILIES = ["llama", "qwen2", "qwen3", "mistral"]
SMALL = TileSizes(16, 16, 4)


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    monkeypatch.setattr(norms_and_rope, "_kernel", lambda device: TritonPointwise())
    found = kernels_run_here(monkeypatch)
    if found.type == "cpu":
        monkeypatch.setattr(triton, "_TILE_SIZES", dict.fromkeys(triton._TILE_SIZES, (SMALL, SMALL)))
    return found


class Paged:
    """A model on the pages of Triton's attention."""

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        self.model, self.strategy = model.to(device), PackedStrategy(model)
        self.pool = PagePool(self.strategy.kv_layout(), 8, device)
        self.pool.grow()
        for slab in self.pool.slabs:
            assert slab is not None
            for memory in (*slab.keys, *slab.values):
                memory.fill_(7.0)
        self.backend = TritonBackend(self.pool)
        self.parts = FusedModules(model)

    def logits(self, starts: list[int], counts: list[int]) -> torch.Tensor:
        """[T, V] of new tokens of sequences on two pages each."""
        tables = np.arange(2 * len(starts)).reshape(-1, 2)
        first, lengths = np.array(starts), np.array(counts)
        positions = np.concatenate([np.arange(a, a + n) for a, n in zip(starts, counts, strict=True)])
        ids = torch.from_numpy(positions * 7 % VOCABULARY).to(self.pool.device)
        batch = ForwardBatch(ids, tables, first, lengths)
        with (
            self.strategy.borrow(),
            self.parts.applied(),
            interface.use_attention(self.backend(self.pool, batch)),
        ):
            found: torch.Tensor = self.model(
                input_ids=ids[None],
                position_ids=torch.from_numpy(positions).to(self.pool.device)[None],
                use_cache=False,
            ).logits[0]
        return found

    def steps(self) -> list[torch.Tensor]:
        """Logits of a prefill, of a step with rows that decode beside one, and all that is in the pages."""
        steps = [self.logits([0, 0], [17, 3]), self.logits([17, 3, 0], [1, 6, 2]), self.logits([18, 9, 2], [1, 1, 1])]
        slab = self.pool.slabs[0]
        assert slab is not None
        return [*steps, *slab.keys, *slab.values]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_results_and_pages_are_those_of_separate_launches_bit_for_bit(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    model = tiny(family, dtype, num_hidden_layers=2)
    with counted(TritonAttention, "compute_rotating", monkeypatch) as rotating:
        fused = Paged(model, device).steps()
    assert len(rotating) == 6
    monkeypatch.setattr(TritonAttention, "rotates", False)
    monkeypatch.setattr(FusedNorm, "keep", lambda *_: None)
    with counted(TritonAttention, "compute_rotating", monkeypatch) as rotating:
        separate = Paged(model, device).steps()
    assert not rotating
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(fused, separate, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(6, 2, 16, 24), (3, 3, 10, 10), (5, 1, 40, 8)])
def test_padding_gets_zeros_and_writes_nothing(
    dtype: torch.dtype, heads: tuple[int, int, int, int], device: torch.device
) -> None:
    """Also where keys and values differ in size, and neither is a power of two."""
    query_heads, kv_heads, key_dim, value_dim = heads

    worlds = [
        World([5], dtype, 4, device, (Kind(kv_heads, query_heads // kv_heads, key_dim, value_dim),)) for _ in "ab"
    ]
    rotary = TritonPointwise()
    outs = []
    for world, at_once in zip(worlds, (True, False), strict=True):
        batch = world.forward([(0, range(4))])
        metadata = world.steps.make_metadata(triton.MetadataSizes(decodes=1, prefills=2, tokens=7, entries=9))
        metadata.fill(batch)
        attention = TritonAttention(world.pool, batch, metadata)
        q, k, v = (
            torch.nn.functional.pad(source[0][0][:4], (0, 0, 0, 0, 0, 3), value=3.0)
            for source in (world.queries, world.keys, world.values)
        )
        angles = [
            torch.arange(7 * key_dim, device=device).mul(step).cos().view(7, key_dim).to(dtype) for step in (2, 3)
        ]
        if at_once:
            out = attention.compute_rotating(0, q, k, v, (angles[0], angles[1]), world.scores[0])
        else:
            out = attention.compute(0, *rotary.rotate(q, k, *angles), v, world.scores[0])
        assert not out[4:].any()
        outs.append(out)
    assert torch.equal(*outs)
    for ours, theirs in zip(*(world.pool.slabs for world in worlds), strict=True):
        if ours is not None and theirs is not None:
            for mine, other in zip((*ours.keys, *ours.values), (*theirs.keys, *theirs.values), strict=True):
                assert torch.equal(mine.nan_to_num(9.0), other.nan_to_num(9.0))


def _counted_by_torch(module: torch.nn.Module, inputs: Any, output: torch.Tensor | None = None) -> None:
    (inputs[0] if output is None else output).add_(1.0)


def _uncounted(module: torch.nn.Module, inputs: Any, output: torch.Tensor | None = None) -> None:
    """Write as kernels of others and ``.data`` do: torch takes the tensor for the same."""
    (inputs[0] if output is None else output).data.add_(1.0)


@pytest.mark.parametrize("place", ["after", "before", "before the last norm"])
@pytest.mark.parametrize("steer", [_counted_by_torch, _uncounted])
def test_hook_that_changes_hidden_states_in_place_is_seen(steer: Any, place: str, device: torch.device) -> None:
    model = tiny("llama", torch.float32, num_hidden_layers=3)
    with torch.no_grad():
        plain = model(input_ids=torch.arange(5, device=device)[None] * 7, use_cache=False).logits[0]
    if place == "after":
        model.model.layers[1].register_forward_hook(steer)
    else:
        (model.model.layers[2] if place == "before" else model.model.norm).register_forward_pre_hook(steer)
    with torch.no_grad():
        wanted = model(input_ids=torch.arange(5, device=device)[None] * 7, use_cache=False).logits[0]
    found = Paged(model, device).logits([0], [5])
    assert not torch.allclose(wanted, plain, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["q_norm", "k_norm"])
def test_hooks_of_head_norms_get_the_shapes_of_their_family(name: str, device: torch.device) -> None:
    model = tiny("qwen3", torch.float32, num_hidden_layers=2)

    def ablate(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        output[:, :, 0] = 0.0  # the first head's

    getattr(model.model.layers[1].self_attn, name).register_forward_hook(ablate)
    with torch.no_grad():
        wanted = model(input_ids=torch.arange(5, device=device)[None] * 7, use_cache=False).logits[0]
    found = Paged(model, device).logits([0], [5])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_nothing_is_held_after_a_forward_that_fails(device: torch.device) -> None:
    paged = Paged(tiny("llama", torch.float32, num_hidden_layers=2), device)

    def fail(module: torch.nn.Module, inputs: Any) -> None:
        raise KeyError

    paged.model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyError):
        paged.logits([0], [5])
    assert all(norm._kept is None for norm in paged.parts._norms.values())


@pytest.mark.parametrize(("family", "launches"), [("llama", 13), ("qwen2", 13), ("qwen3", 15)])
def test_a_layer_that_decodes_takes_few_launches(
    family: str, launches: int, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """Products 7; rotation with pages, attention, its reduction; sums with norms 2, SiLU; Qwen3 norms heads too."""
    assert launches_of_a_layer(family, monkeypatch, device) == launches


def test_a_batch_invariant_layer_takes_fewer(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Query, key and value are one launch, and so are gate and up."""
    monkeypatch.setattr(batch_invariant, "_runs_on", lambda device: True)
    if device.type == "cpu":
        monkeypatch.setattr(products_triton, "tile_of", lambda columns, dtype: ProductTile(16, 32, 16))
    assert launches_of_a_layer("llama", monkeypatch, device, grouped=True) == 10


def launches_of_a_layer(
    family: str, monkeypatch: pytest.MonkeyPatch, device: torch.device, grouped: bool = False
) -> int:
    """What a second layer adds to a step of two rows."""
    counts = []
    for layers in (1, 2):
        paged = Paged(tiny(family, torch.bfloat16, num_hidden_layers=layers), device)
        with ExitStack() as stack:
            if grouped:
                groups = groups_in_probe(paged.model, on_gpu=True)
                stack.enter_context(invariant_products())
                stack.enter_context(GroupedProducts(groups).applied())
            paged.logits([0, 0], [3, 5])
            count = stack.enter_context(launches_counted(monkeypatch))
            paged.logits([3, 5], [1, 1])
        counts.append(count.total)
    return counts[1] - counts[0]


@contextmanager
def counted(owner: type, name: str, patch: pytest.MonkeyPatch) -> Iterator[list[None]]:
    """Yield a list that gets an entry per call."""
    calls: list[None] = []
    own = getattr(owner, name)

    def call(*arguments: Any, **named: Any) -> Any:
        calls.append(None)
        return own(*arguments, **named)

    with patch.context() as inner:
        inner.setattr(owner, name, call)
        yield calls


class Launches(TorchDispatchMode):
    """Counts torch's operations that compute, and launches of Triton's kernels; not what happens inside of those."""

    def __init__(self) -> None:
        super().__init__()
        self.total, self.inside = 0, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        views = any(result.alias_info is not None for result in func._schema.returns)
        if not (self.inside or views or func._schema.name.startswith(("aten::empty", "aten::_unsafe_view"))):
            self.total += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def launches_counted(patch: pytest.MonkeyPatch) -> Iterator[Launches]:
    kernels = type(triton_kernels.attend)
    own = kernels.__getitem__

    def of_grid(kernel: Any, grid: Any) -> Any:
        def launch(*arguments: Any, **named: Any) -> None:
            count.total, count.inside = count.total + 1, True
            own(kernel, grid)(*arguments, **named)
            count.inside = False

        return launch

    with patch.context() as inner, Launches() as count:
        inner.setattr(kernels, "__getitem__", of_grid)
        yield count
