"""Gathered attention against a dense one in double precision, over pages that lie anywhere and hold garbage."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from rollout.models.arrays import IntArray, ceil_div
from rollout.models.attention import gather
from rollout.models.attention.base import PagedAttention
from rollout.models.attention.gather import GatherAttention
from rollout.models.attention.interface import ScoreParams
from rollout.models.forward_batch import ForwardBatch
from rollout.models.kv_cache.layout import AttentionLayer, KVLayout, MaskKind
from rollout.models.kv_cache.page_pool import PagePool

PAGE_SIZE, SLAB_PAGES, HEADS = 4, 8, 4
CPU = torch.device("cpu")
#: Large, and still small enough for its product with a query to be finite.
GARBAGE = 1e30
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 0.03}


@dataclass(frozen=True)
class Kind:
    """One layer of a model, and how it makes weights of its scores."""

    kv_heads: int
    key_dim: int
    value_dim: int
    mask_kind: MaskKind
    scale: float
    softcap: float | None = None
    sinks: bool = False


KINDS = (
    Kind(4, 8, 8, MaskKind(), 0.3),
    Kind(1, 8, 8, MaskKind(), 0.5, softcap=2.0),
    Kind(2, 8, 8, MaskKind("window", 6), 0.4),
    Kind(2, 6, 10, MaskKind("chunk", 7), 0.2),
    Kind(2, 12, 3, MaskKind(), 0.25, sinks=True),
    Kind(4, 4, 8, MaskKind("window", 9), 0.5, softcap=1.5, sinks=True),
    Kind(1, 8, 4, MaskKind("chunk", 4), 0.4, sinks=True),
    Kind(2, 8, 8, MaskKind("window", 1), 0.4),
)


class World:
    """Sequences with keys, values and queries for every layer, and a pool that will hold them.

    Args:
        lengths: tokens of each sequence.
        shared: the second sequence begins with so many tokens of the first, and holds the same pages for them.
    """

    def __init__(self, lengths: list[int], dtype: torch.dtype, seed: int, shared: int = 0) -> None:
        print("seed", seed)
        self.lengths, self.dtype = lengths, dtype
        rng = np.random.default_rng(seed)
        self.modules = [nn.Identity() for _ in KINDS]
        layers = tuple(
            AttentionLayer(module, kind.kv_heads, kind.key_dim, kind.value_dim, kind.mask_kind)
            for module, kind in zip(self.modules, KINDS, strict=True)
        )
        self.pool = PagePool(KVLayout(layers, dtype, PAGE_SIZE), SLAB_PAGES, CPU)
        counts = [ceil_div(length, PAGE_SIZE) for length in lengths]
        while self.pool.free_pages < sum(counts) + 5:
            self.pool.grow()
        for slab in self.pool.slabs:
            assert slab is not None
            for tensor in (*slab.keys, *slab.values):
                tensor.copy_(torch.from_numpy(GARBAGE * rng.choice([-1.0, 1.0], tuple(tensor.shape))))
        pages = rng.permutation(self.pool.free_pages)[: sum(counts)]
        self.tables: list[IntArray] = np.split(pages, np.cumsum(counts)[:-1])
        self.tables[min(1, len(lengths) - 1)][: shared // PAGE_SIZE] = self.tables[0][: shared // PAGE_SIZE]

        def drawn(length: int, heads: int, dim: int) -> torch.Tensor:
            return torch.from_numpy(rng.standard_normal((length, heads, dim))).to(dtype)

        # [sequence][layer]
        self.queries = [[drawn(n, HEADS, kind.key_dim) for kind in KINDS] for n in lengths]
        self.keys = [[drawn(n, kind.kv_heads, kind.key_dim) for kind in KINDS] for n in lengths]
        self.values = [[drawn(n, kind.kv_heads, kind.value_dim) for kind in KINDS] for n in lengths]
        for stored in (self.keys, self.values):
            for index in range(len(KINDS)):
                stored[min(1, len(lengths) - 1)][index][:shared] = stored[0][index][:shared]
        self.scores = [
            ScoreParams(kind.scale, kind.softcap, torch.from_numpy(rng.standard_normal(HEADS)).to(dtype))
            if kind.sinks
            else ScoreParams(kind.scale, kind.softcap)
            for kind in KINDS
        ]

    def dense(self, sequence: int, index: int, positions: range) -> torch.Tensor:
        """[positions, heads, value_dim] in float64, of the definition."""
        kind, scores = KINDS[index], self.scores[index]
        group = HEADS // kind.kv_heads
        outputs = []
        for position in positions:
            first = {"full": 0, "window": position - kind.mask_kind.size + 1, "chunk": position}[kind.mask_kind.kind]
            if kind.mask_kind.kind == "chunk":
                first -= position % kind.mask_kind.size
            seen = slice(max(0, first), position + 1)
            heads = []
            for head in range(HEADS):
                query = self.queries[sequence][index][position, head].double()
                key = self.keys[sequence][index][seen, head // group].double()
                value = self.values[sequence][index][seen, head // group].double()
                logits = key @ query * scores.scale
                if scores.softcap is not None:
                    logits = scores.softcap * torch.tanh(logits / scores.softcap)
                weights = logits.exp()
                sink = 0.0 if scores.sinks is None else float(scores.sinks[head].double().exp())
                heads.append((weights / (weights.sum() + sink)) @ value)
            outputs.append(torch.stack(heads))
        return torch.stack(outputs)

    def step(self, parts: list[tuple[int, range]]) -> PagedAttention:
        """Entries of the tables past a sequence's pages name a page that is not there."""
        tables = np.full((len(parts), max(map(len, self.tables))), 10**6)
        for row, (sequence, positions) in enumerate(parts):
            held = self.tables[sequence][: ceil_div(positions.stop, PAGE_SIZE)]
            tables[row, : len(held)] = held
        tokens = torch.zeros(sum(len(positions) for _, positions in parts), dtype=torch.int64)
        starts = np.array([positions.start for _, positions in parts])
        lengths = np.array([len(positions) for _, positions in parts])
        return GatherAttention(self.pool, ForwardBatch(tokens, tables, starts, lengths))

    def run(self, parts: list[tuple[int, range]]) -> list[list[torch.Tensor]]:
        """One forward: [layer][part] outputs of the sequences' positions."""
        step, outputs = self.step(parts), []
        for index, module in enumerate(self.modules):

            def packed(source: list[list[torch.Tensor]], index: int = index) -> torch.Tensor:
                tokens = torch.cat([source[sequence][index][positions] for sequence, positions in parts])
                return tokens.transpose(0, 1)[None]  # [1, heads, tokens, dim]

            query, key, value = packed(self.queries), packed(self.keys), packed(self.values)
            out = step.attend(module, query, key, value, None, self.scores[index])
            assert out.shape == (1, query.shape[2], HEADS, KINDS[index].value_dim)
            outputs.append(list(out[0].split([len(positions) for _, positions in parts])))
        return outputs

    def compare(self, outputs: list[list[torch.Tensor]], parts: list[tuple[int, range]]) -> None:
        for index, kind in enumerate(KINDS):
            for out, (sequence, positions) in zip(outputs[index], parts, strict=True):
                error = (out.double() - self.dense(sequence, index, positions)).abs().max()
                assert error < TOLERANCE[self.dtype], (kind, sequence, positions, float(error))


def ragged(seed: int, count: int = 5) -> list[int]:
    return np.random.default_rng(seed).integers(1, 40, count).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", [0, 1])
def test_prefill_of_several_sequences_equals_dense_attention(seed: int, dtype: torch.dtype) -> None:
    world = World(ragged(seed), dtype, seed)
    parts = [(sequence, range(length)) for sequence, length in enumerate(world.lengths)]
    world.compare(world.run(parts), parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", [2, 3])
def test_chunked_prefill_equals_dense_attention(seed: int, dtype: torch.dtype) -> None:
    """Parts of any size, several sequences in one forward, each at its own place."""
    world = World(ragged(seed), dtype, seed)
    rng = np.random.default_rng(seed)
    done = [0] * len(world.lengths)
    while any(have < length for have, length in zip(done, world.lengths, strict=True)):
        parts = []
        for sequence in rng.permutation(len(done)).tolist():
            end = min(world.lengths[sequence], done[sequence] + int(rng.integers(0, 14)))
            if end > done[sequence]:
                parts.append((sequence, range(done[sequence], end)))
                done[sequence] = end
        if parts:
            world.compare(world.run(parts), parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group_bytes", [1, 2000, gather._GROUP_BYTES])
def test_decode_equals_dense_attention_for_any_group_size(
    group_bytes: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of very different lengths, over several slabs, whatever the groups that are gathered together."""
    monkeypatch.setattr(gather, "_GROUP_BYTES", group_bytes)
    world = World([37, 1, 12, 13, 16, 30, 2, 36], dtype, seed=4)
    starts = [length - 3 for length in world.lengths]
    parts = [(sequence, range(start)) for sequence, start in enumerate(starts) if start > 0]
    world.run(parts)
    assert world.pool.live_slabs > 3
    for done in range(3):
        rows = [
            (sequence, range(start + done, start + done + 1))
            for sequence, start in enumerate(starts)
            if start + done >= 0
        ]
        world.compare(world.run(rows), rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decodes_and_prefills_can_share_a_forward(dtype: torch.dtype) -> None:
    world = World([37, 21, 12, 13, 16, 30], dtype, seed=9)
    world.run([(0, range(36)), (1, range(9)), (4, range(15))])
    mixed = [(0, range(36, 37)), (2, range(12)), (4, range(15, 16)), (1, range(9, 21)), (3, range(1)), (5, range(17))]
    world.compare(world.run(mixed), mixed)


def test_sequences_read_shared_pages() -> None:
    world = World([19, 23], torch.float32, seed=5, shared=12)
    whole = [(0, range(18))]
    world.compare(world.run(whole), whole)
    rest = [(1, range(12, 22))]
    world.compare(world.run(rest), rest)
    rows = [(1, range(22, 23)), (0, range(18, 19))]
    world.compare(world.run(rows), rows)


def test_chunked_prefill_equals_prefill_in_one_chunk() -> None:
    whole, chunked = World([33], torch.float32, seed=6), World([33], torch.float32, seed=6)
    outputs = whole.run([(0, range(33))])
    pieces = [chunked.run([(0, positions)]) for positions in (range(9), range(9, 10), range(10, 28), range(28, 33))]
    for index in range(len(KINDS)):
        together = torch.cat([piece[index][0] for piece in pieces])
        assert torch.allclose(together, outputs[index][0], atol=1e-6)


def test_keys_and_values_are_written_to_their_slots_only() -> None:
    world = World([10, 7], torch.float32, seed=7)
    world.run([(0, range(9)), (1, range(7))])
    world.run([(0, range(9, 10))])
    slots = {
        (int(t[p // PAGE_SIZE]), p % PAGE_SIZE) for t, n in zip(world.tables, (10, 7), strict=True) for p in range(n)
    }
    for index in range(len(KINDS)):
        for sequence, length in enumerate((10, 7)):
            for position in range(length):
                slab, page = divmod(int(world.tables[sequence][position // PAGE_SIZE]), SLAB_PAGES)
                memory, at = world.pool.slab(slab), position % PAGE_SIZE
                assert torch.equal(memory.keys[index][page, at], world.keys[sequence][index][position])
                assert torch.equal(memory.values[index][page, at], world.values[sequence][index][position])
        for slab in range(world.pool.live_slabs):
            for tensor in (world.pool.slab(slab).keys[index], world.pool.slab(slab).values[index]):
                untouched = {
                    (slab * SLAB_PAGES + page, at)
                    for page, at in (tensor.abs() > GARBAGE / 2).all(-1).all(-1).nonzero().tolist()
                }
                everywhere = {(slab * SLAB_PAGES + page, at) for page in range(SLAB_PAGES) for at in range(PAGE_SIZE)}
                assert untouched == everywhere - slots


def test_call_out_of_recorded_order_is_refused() -> None:
    world = World([5], torch.float32, seed=8)

    def attend(step: PagedAttention, index: int, module: nn.Module) -> None:
        query, key, value = (
            source[0][index].transpose(0, 1)[None] for source in (world.queries, world.keys, world.values)
        )
        step.attend(module, query, key, value, None, world.scores[index])

    whole = [(0, range(5))]
    for wrong in (world.modules[1], nn.Identity()):
        with pytest.raises(RuntimeError, match="out of the order"):
            attend(world.step(whole), 0, wrong)
    step = world.step(whole)
    for index, module in enumerate(world.modules):
        attend(step, index, module)
    with pytest.raises(RuntimeError, match="out of the order"):
        attend(step, 0, world.modules[0])
