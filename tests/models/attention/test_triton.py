"""Triton's kernels against plain attention in double precision, and against themselves bit for bit.

On a GPU where there is one, else in Triton's interpreter, which takes some milliseconds for each program: shapes are
small, and keys are split more finely than on a GPU.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from rollout.models.attention import triton, triton_metadata
from rollout.models.attention.gather import GatherAttention
from rollout.models.attention.kernel_test import HeadShape
from rollout.models.attention.triton import TritonAttention
from rollout.models.kv_cache.layout import MaskKind
from tests.support.paged_sequences import Kind, Parts, same_bits
from tests.support.triton_interpreter import kernels_run_here
from tests.support.triton_world import DTYPES, KINDS, TOLERANCE, World

pytestmark = pytest.mark.usefixtures("device")

# -- what it computes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "page_size", "slab_pages"), [(torch.float32, 16, 4), (torch.bfloat16, 5, 3), (torch.float16, 16, 4)]
)
def test_mixed_decodes_and_prefills_equal_reference_attention(
    dtype: torch.dtype, page_size: int, slab_pages: int, device: torch.device
) -> None:
    world = World([37, 1, 20], dtype, 1, device, page_size=page_size, slab_pages=slab_pages)
    assert world.pool.live_slabs > 1
    for parts in world.random_parts(np.random.default_rng(1), 25):
        world.compare(world.run(parts), parts)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_decodes_of_several_splits_equal_reference_attention(dtype: torch.dtype, device: torch.device) -> None:
    """At the borders of splits, and where a window or chunk begins within one."""
    length = 2 * triton_metadata.SPLIT_TOKENS + 2
    kinds = (KINDS[0], KINDS[3], Kind(1, 2, 16, 16, MaskKind("window", 3 * triton_metadata.SPLIT_TOKENS // 2)))
    world = World([length, length, length], dtype, 2, device, kinds)
    sequences = ((0, length - 2), (1, length - 3), (2, length - 1))
    prefill = [(sequence, range(position)) for sequence, position in sequences]
    world.run(prefill)
    parts = [(sequence, range(position, position + 1)) for sequence, position in sequences]
    world.compare(world.run(parts), parts)


def test_gpu_tile_sizes_equal_reference_attention(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """The other tests use smaller ones."""
    monkeypatch.undo()
    device = kernels_run_here(monkeypatch)
    world = World([300, 20], torch.bfloat16, 3, device, (Kind(1, 6, 128, 128), Kind(1, 2, 256, 192)))
    first = [(0, range(299)), (1, range(19))]
    world.compare(world.run(first), first)
    rows = [(0, range(299, 300)), (1, range(19, 20))]
    world.compare(world.run(rows), rows)


@pytest.mark.parametrize("dim", [1, 300, 512])
def test_odd_and_large_head_dims_equal_reference_attention(dim: int, device: torch.device) -> None:
    world = World([9], torch.float32, 4, device, (Kind(1, 2, dim, dim),))
    for parts in ([(0, range(8))], [(0, range(8, 9))]):
        world.compare(world.run(parts), parts)


def test_large_groups_of_heads_equal_reference_attention(device: torch.device) -> None:
    world = World([9], torch.float32, 4, device, (Kind(1, 33, 8, 8),))
    for parts in ([(0, range(8))], [(0, range(8, 9))]):
        world.compare(world.run(parts), parts)


def test_sequences_read_shared_pages(device: torch.device) -> None:
    world = World([20, 25], torch.float32, 5, device, shared=16)
    first = [(0, range(20))]
    world.compare(world.run(first), first)
    rest = [(1, range(16, 24))]
    world.compare(world.run(rest), rest)
    row = [(1, range(24, 25))]
    world.compare(world.run(row), row)


def test_shared_pages_written_in_a_forward_are_read_in_the_same_forward(device: torch.device) -> None:
    world = World([33, 40], torch.float32, 6, device, shared=32)
    parts = [(1, range(32, 33)), (0, range(33))]
    world.compare(world.run(parts), parts)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_triton_agrees_with_gather(dtype: torch.dtype, device: torch.device) -> None:
    worlds = [World([30, 9, 40], dtype, 7, device) for _ in range(2)]
    for world in worlds:  # gathering multiplies what nobody has written by 0
        for slab in world.pool.slabs:
            assert slab is not None
            for tensor in slab.tensors:
                tensor.zero_()
    for parts in ([(0, range(29)), (1, range(8)), (2, range(21))], [(0, range(29, 30)), (2, range(21, 40))]):
        ours = worlds[0].run(parts)
        gathered = worlds[1].attend(GatherAttention(worlds[1].pool, worlds[1].forward(parts)).compute, parts)
        for one, other in zip(ours, gathered, strict=True):
            assert (one.float() - other.float()).abs().max() < 2 * TOLERANCE[dtype]


def test_strides_and_dtypes_of_inputs_do_not_change_results(device: torch.device) -> None:
    world = World([11, 7], torch.bfloat16, 8, device)
    parts = [(1, range(6)), (0, range(11))]
    plain = world.run(parts)
    rows = [(1, range(6, 7))]
    plain_rows = world.run(rows)
    for index, scores in enumerate(world.scores):
        for mixed, expected in ((parts, plain), (rows, plain_rows)):
            step = world.step(mixed)
            q, k, v = (world.packed(s, index, mixed) for s in (world.queries, world.keys, world.values))
            for changed in (
                [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)],
                [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)],
            ):
                assert torch.equal(step.compute(index, *changed, scores), expected[index])
    # Under autocast queries and keys come in float32 and values in bfloat16.
    q, k, v = (world.packed(s, 0, rows).transpose(0, 1)[None] for s in (world.queries, world.keys, world.values))
    found = world.step(rows).attend(None, q.float(), k.float(), v, None, world.scores[0])  # type: ignore[arg-type]
    assert torch.equal(found[0], plain_rows[0])


def test_extreme_scores_neither_overflow_nor_give_nan(device: torch.device) -> None:
    """Weights far below the smallest float vanish, and scores far beyond exp's range do not overflow."""
    kinds = (Kind(1, 2, 16, 16), Kind(1, 2, 16, 16, sinks=True), Kind(1, 2, 16, 16, softcap=30.0))
    world = World([40], torch.float32, 9, device, kinds)
    factors = torch.linspace(0, 300, 40)[torch.randperm(40, generator=torch.Generator().manual_seed(9))]
    for keys in world.keys:
        keys[0].mul_(factors.view(-1, 1, 1).to(device))
    for positions in (range(39), range(39, 40)):
        for index, out in enumerate(world.run([(0, positions)])):
            query, key, value = (s[index][0].cpu().double() for s in (world.queries, world.keys, world.values))
            scores, kind = world.scores[index], kinds[index]
            logits = torch.einsum("qhd,kd->hqk", query[positions], key[:, 0]) * scores.scale
            if kind.softcap:
                logits = kind.softcap * torch.tanh(logits / kind.softcap)
            logits = logits.masked_fill(torch.arange(40) > torch.tensor(positions)[:, None], -torch.inf)
            if scores.sinks is not None:
                sinks = scores.sinks.cpu().double()[:, None, None].expand(2, len(positions), 1)
                logits = torch.cat([logits, sinks], -1)
            expected = torch.einsum("hqk,kd->qhd", logits.softmax(-1)[..., :40], value[:, 0])
            error = (out.cpu().double() - expected).abs()
            assert error.max() < 2e-3  # of scores around 1000, rounded at 6e-5
            assert error.mean() < 2e-5


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["queries", "keys", "values"])
def test_non_finite_inputs_affect_only_their_sequence(bad: float, where: str, device: torch.device) -> None:
    sound, world = (World([14, 20, 20], torch.float32, 10, device, KINDS[:3]) for _ in range(2))
    for stored in getattr(world, where):
        stored[1][3] = bad
    for parts in ([(0, range(13)), (1, range(19)), (2, range(18))], [(0, range(13, 14)), (1, range(19, 20))]):
        expected, outputs = sound.run(parts), world.run(parts)
        of = torch.tensor([sequence for sequence, positions in parts for _ in positions])
        for index in range(3):
            assert torch.equal(outputs[index][of != 1], expected[index][of != 1])


# -- what it writes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_keys_and_values_are_written_to_their_slots_only(dtype: torch.dtype, device: torch.device) -> None:
    world = World([21, 7], dtype, 11, device)
    world.run([(0, range(19)), (1, range(7))])
    world.run([(0, range(19, 20))])
    world.check_only_written({0: 20, 1: 7})


# -- independence ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_decode_bits_do_not_depend_on_batch_or_pages(dtype: torch.dtype, device: torch.device) -> None:
    split = triton_metadata.SPLIT_TOKENS
    lengths = [split + 9, 3, 2 * split + 1, 17]
    rows = [(sequence, range(length - 1, length)) for sequence, length in enumerate(lengths)]

    def prefilled(place: int, **sizes: int) -> World:
        world = World(lengths, dtype, 12, device, place=place, **sizes)
        # What the pages hold must not depend on it either, so it is put there by hand.
        for sequence, length in enumerate(lengths):
            for position in range(length - 1):
                page, at = divmod(position, world.page_size)
                slab, inside = divmod(int(world.tables[sequence][page]), world.pool.slab_pages)
                for index in range(len(KINDS)):
                    world.pool.slab(slab).keys[index][inside, at] = world.keys[index][sequence][position]
                    world.pool.slab(slab).values[index][inside, at] = world.values[index][sequence][position]
        return world

    world = prefilled(0)
    alone = [world.run([row]) for row in rows]
    for place, parts in ((0, rows), (1, rows[::-1]), (2, [rows[2], rows[0]])):
        sizes = ({}, {"page_size": 7, "slab_pages": 3}, {"page_size": 3})[place]
        outputs = prefilled(place, **sizes).run(parts)
        for index in range(len(KINDS)):
            for at, (sequence, _) in enumerate(parts):
                assert torch.equal(outputs[index][at], alone[sequence][index][0]), (place, index, sequence)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_prefill_bits_do_not_depend_on_chunks_batch_or_pages(dtype: torch.dtype, device: torch.device) -> None:
    lengths = [39, 23]
    alone = []
    for sequence, length in enumerate(lengths):
        alone.append(World(lengths, dtype, 13, device).run([(sequence, range(length))]))
    forwards: list[Parts] = [[(1, range(9)), (0, range(17))], [(0, range(17, 19)), (1, range(9, 23))]]
    world = World(lengths, dtype, 13, device, place=1, page_size=7, slab_pages=3)
    for parts in [*forwards, [(0, range(19, 39))]]:
        same_bits(alone, world.run(parts), parts, KINDS)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_generated_tokens_that_are_computed_again_have_the_same_bits(dtype: torch.dtype, device: torch.device) -> None:
    """In one forward and in two, beside a prompt of one token, and in layers of every mask."""
    prompt, length = 26, triton_metadata.SPLIT_TOKENS + 9
    first = World([length, 1], dtype, 14, device)
    steps = [first.run([(0, range(prompt))]), *(first.run([(0, range(n, n + 1))]) for n in range(prompt, length))]
    generated = [torch.cat([step[index] for step in steps]) for index in range(len(KINDS))]

    def again(*forwards: tuple[Parts, list[int]]) -> list[torch.Tensor]:
        """[layer][tokens of the first sequence]"""
        world = World([length, 1], dtype, 14, device, place=1, page_size=7)
        outputs = []
        for parts, decode_lens in forwards:
            batch = replace(world.forward(parts), decode_lens=np.array(decode_lens))
            own = len(parts[0][1])
            outputs.append([out[:own] for out in world.attend(world.steps(world.pool, batch).compute, parts)])
        return [torch.cat(layer) for layer in zip(*outputs, strict=True)]

    whole, one = (0, range(length)), (1, range(1))
    for found in (
        again(([whole, one], [length - prompt, 0])),
        again(([(0, range(25))], [0]), ([(0, range(25, 30)), one], [4, 0]), ([(0, range(30, length))], [length - 30])),
    ):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, generated, strict=True))
    together = again(([whole], [0]))
    assert not all(torch.equal(ours, theirs) for ours, theirs in zip(together, generated, strict=True))


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_a_prompt_s_last_token_has_the_same_bits_in_a_chunk_of_its_own(
    dtype: torch.dtype, device: torch.device
) -> None:
    length = triton_metadata.SPLIT_TOKENS + 9
    whole = World([length], dtype, 15, device).run([(0, range(length))])
    world = World([length], dtype, 15, device, place=1)
    world.run([(0, range(length - 1))])
    parts: Parts = [(0, range(length - 1, length))]
    batch = replace(world.forward(parts), decode_lens=np.array([0]))
    alone = world.attend(world.steps(world.pool, batch).compute, parts)
    assert all(torch.equal(ours[0], theirs[-1]) for ours, theirs in zip(alone, whole, strict=True))


# -- which is chosen ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_self_test_passes(dtype: torch.dtype, device: torch.device) -> None:
    triton.check({HeadShape(16, 16), HeadShape(12, 20, kv_heads=1, group=2)}, dtype, device, 16)


@pytest.mark.parametrize(
    ("dims", "dtype", "why"),
    [
        ((16, 16), torch.float64, "do not support torch.float64"),
        ((16, 513), torch.float32, "is 513, and .* up to 512"),
    ],
)
def test_unsupported_dtype_and_head_dim_are_refused(
    dims: tuple[int, int], dtype: torch.dtype, why: str, device: torch.device
) -> None:
    with pytest.raises(ValueError, match=why):
        triton.check({HeadShape(*dims)}, dtype, device, 4)


@pytest.mark.parametrize("name", ["compute", "compute_rotating"])
def test_self_test_refuses_wrong_results(name: str, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    own = getattr(TritonAttention, name)

    def wrong(self: TritonAttention, *arguments: Any) -> Any:
        return own(self, *arguments) + 1e-3

    monkeypatch.setattr(TritonAttention, name, wrong)
    with pytest.raises(ValueError, match="differ from reference attention"):
        triton.check({HeadShape(16, 16)}, torch.float32, device, 4)
