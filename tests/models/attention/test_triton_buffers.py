"""Triton's kernels on metadata that stay in place: padding, and slabs that come and go."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rollout.models.attention.triton import TritonAttention
from rollout.models.attention.triton_metadata import MetadataSizes, TritonMetadata
from rollout.models.forward_batch import ForwardBatch
from rollout.models.kv_cache.slab_table import SlabTable
from tests.support.paged_sequences import Parts
from tests.support.triton_world import DTYPES, KINDS, World

pytestmark = pytest.mark.usefixtures("device")


def addresses(metadata: TritonMetadata) -> list[int]:
    tensors = [metadata.entries, metadata.pages, metadata.slots, metadata.slab_addresses, metadata.first_tokens]
    for work in metadata.splits.values():
        tensors += [work.items, work.count, work.rows]
    return [tensor.data_ptr() for tensor in tensors]


def padded(world: World, metadata: TritonMetadata, parts: Parts) -> list[torch.Tensor]:
    """A step through metadata that have more room: for each layer, results of the tokens and of the padding."""
    forward, room = world.forward(parts), metadata.capacity.tokens
    metadata.fill(forward)
    step, outputs = TritonAttention(world.pool, forward, metadata), []
    for index, scores in enumerate(world.scores):
        packed = [world.packed(s, index, parts) for s in (world.queries, world.keys, world.values)]
        # As after layers over padding: anything at all.
        filled = [torch.cat([x, x.new_full((room - len(x), *x.shape[1:]), torch.nan)]) for x in packed]
        outputs.append(step.compute(index, *filled, scores))
    return outputs


@pytest.mark.parametrize("dtype", DTYPES[1:2])
def test_padding_touches_no_page_and_changes_no_bit(dtype: torch.dtype, device: torch.device) -> None:
    lengths = [20, 5, 33]
    expected, world = (World(lengths, dtype, 14, device) for _ in range(2))
    room = MetadataSizes(decodes=6, prefills=0, tokens=6, entries=40)
    metadata = world.steps.make_metadata(room)
    before = addresses(metadata)
    prefill = [(sequence, range(length - 2)) for sequence, length in enumerate(lengths)]
    for one in (expected, world):
        one.run(prefill)
    for parts in (
        [(sequence, range(length - 2, length - 1)) for sequence, length in enumerate(lengths)],
        [(1, range(4, 5))],  # the items of the step before must be forgotten
        [(2, range(32, 33)), (0, range(19, 20))],
    ):
        outputs = padded(world, metadata, parts)
        for out, plain in zip(outputs, expected.run(parts), strict=True):
            assert torch.equal(out[: len(parts)], plain)
            assert (out[len(parts) :] == 0).all()
    assert addresses(metadata) == before
    world.check_only_written({0: 20, 1: 5, 2: 33})


def test_forward_of_padding_only_returns_zeros(device: torch.device) -> None:
    world = World([5], torch.float32, 15, device)
    metadata = world.steps.make_metadata(MetadataSizes(decodes=2, prefills=0, tokens=2, entries=4))
    nothing = np.zeros(0, np.int64)
    forward = ForwardBatch(torch.zeros(0, dtype=torch.int64), np.zeros((0, 1), np.int64), nothing, nothing)
    metadata.fill(forward)
    step = TritonAttention(world.pool, forward, metadata)
    for index, kind in enumerate(KINDS):
        nan = [
            torch.full((2, heads, dim), torch.nan, device=device)
            for heads, dim in (
                (kind.kv_heads * kind.group, kind.key_dim),
                (kind.kv_heads, kind.key_dim),
                (kind.kv_heads, kind.value_dim),
            )
        ]
        assert (step.compute(index, *nan, world.scores[index]) == 0).all()
    world.check_only_written({})


def test_padded_decodes_and_prefills_equal_unpadded_ones(device: torch.device) -> None:
    expected, world = (World([20, 30], torch.float32, 16, device) for _ in range(2))
    metadata = world.steps.make_metadata(MetadataSizes(decodes=3, prefills=2, tokens=30, entries=9))
    for one in (expected, world):
        one.run([(0, range(19))])
    for parts in ([(0, range(19, 20)), (1, range(12))], [(1, range(12, 30))]):
        tokens = sum(len(positions) for _, positions in parts)
        for out, plain in zip(padded(world, metadata, parts), expected.run(parts), strict=True):
            assert torch.equal(out[:tokens], plain)
            assert (out[tokens:] == 0).all()


def test_buffers_plan_the_tiles_that_earlier_forwards_have_asked_for(device: torch.device) -> None:
    """A graph cannot plan them, and reads them where they lay at its capture."""
    expected, world = (World([40, 30], torch.float32, 16, device) for _ in range(2))
    room = MetadataSizes(decodes=2, prefills=2, tokens=48, entries=9)
    sealed = world.steps.make_metadata(room)
    sealed.sealed = True
    with pytest.raises(RuntimeError, match="which no earlier one has"):
        padded(world, sealed, [(0, range(19))])
    for one in (expected, world):
        one.run([(0, range(19))])
    metadata = world.steps.make_metadata(room)
    metadata.sealed = True
    kinds = list(world.steps._tile_kinds)
    places = [metadata.tiles(kind) for kind in kinds]
    for parts in ([(0, range(19, 40)), (1, range(12))], [(1, range(12, 30))]):
        tokens = sum(len(positions) for _, positions in parts)
        for out, plain in zip(padded(world, metadata, parts), expected.run(parts), strict=True):
            assert torch.equal(out[:tokens], plain)
            assert (out[tokens:] == 0).all()
    assert kinds
    assert all(metadata.tiles(kind) is place for kind, place in zip(kinds, places, strict=True))


@pytest.mark.parametrize(
    "room",
    [MetadataSizes(1, 0, 9, 9), MetadataSizes(2, 0, 1, 9), MetadataSizes(2, 0, 9, 3), MetadataSizes(3, 0, 9, 9)],
)
def test_forward_larger_than_capacity_is_refused(room: MetadataSizes, device: torch.device) -> None:
    world = World([20, 20], torch.float32, 17, device)
    rows = [(0, range(19, 20)), (1, range(19, 20))]
    metadata = world.steps.make_metadata(room)
    if room == MetadataSizes(3, 0, 9, 9):
        metadata.fill(world.forward(rows))
        rows = [(0, range(18, 20))]
    with pytest.raises(ValueError, match="does not fit"):
        metadata.fill(world.forward(rows))


def test_metadata_follows_dropped_and_added_slabs_in_place(device: torch.device) -> None:
    """What lay in a slab that went is NaN from then on, as is what nobody has written in a new one."""
    world = World([40, 12], torch.float32, 18, device, slab_pages=2)
    pool, metadata = world.pool, world.steps.make_metadata(MetadataSizes(decodes=2, prefills=0, tokens=2, entries=8))
    before = addresses(metadata), world.steps.slabs.addresses.data_ptr()
    world.tables = [pool.allocate(len(table)) for table in world.tables]
    world.run([(0, range(36)), (1, range(10))])
    gone = []
    for position in range(4):
        held = [slab for slab in pool.slabs if slab is not None]
        if position % 2:
            for _ in range(3):
                pool.grow()
            fresh = [slab for slab in pool.slabs if slab is not None and not any(slab is old for old in held)]
        else:
            while pool.shrink(world.tables):
                pass
            fresh = [slab for slab in held if not any(slab is kept for kept in pool.slabs)]
            gone += fresh  # kept, so that its memory is not taken for the next one
        assert fresh
        for slab in fresh:
            for tensor in slab.tensors:
                tensor.fill_(torch.nan)
        pool.check_integrity(world.tables)
        # New rows make their pages move: the next shrink empties another slab.
        world.tables.append(pool.allocate(pool.free_pages and 1))
        parts = [(0, range(36 + position, 37 + position))]
        if position < 2:
            parts.append((1, range(10 + position, 11 + position)))
        outputs = padded(world, metadata, parts)
        world.compare([out[: len(parts)].contiguous() for out in outputs], parts)
    assert (addresses(metadata), world.steps.slabs.addresses.data_ptr()) == before


def test_moved_slab_is_seen_without_a_refill(device: torch.device) -> None:
    """As when a captured step is replayed: the same launch, after a slab has moved."""
    world = World([20], torch.float32, 19, device, slab_pages=8)
    metadata = world.steps.make_metadata(MetadataSizes(decodes=1, prefills=0, tokens=1, entries=2))
    world.run([(0, range(19))])
    row = [(0, range(19, 20))]
    expected = padded(world, metadata, row)
    slab = world.pool.slab(0)
    copied = world.pool._allocate_slab()
    for new, old in zip(copied.tensors, slab.tensors, strict=True):
        new.copy_(old)
        old.fill_(torch.nan)
    world.pool.slabs[0] = copied
    world.pool.slab_changes += 1
    world.steps.slabs.refresh()
    step = TritonAttention(world.pool, world.forward(row), metadata)
    for index, out in enumerate(world.attend(step.compute, row)):
        assert torch.equal(out, expected[index])


def test_page_in_no_slab_raises_index_error(device: torch.device) -> None:
    world = World([20], torch.float32, 20, device, slab_pages=1)
    world.tables[0][1] = len(world.pool.slabs)
    with pytest.raises(IndexError, match="in no slab"):
        world.step([(0, range(20))])
    world.tables[0][1] = 0
    world.pool.slabs[0] = None
    world.pool.slab_changes += 1  # as where a pool drops one
    with pytest.raises(IndexError, match="in no slab"):
        world.step([(0, range(20))])


def test_more_slabs_than_the_table_holds_are_refused(device: torch.device) -> None:
    world = World([20], torch.float32, 21, device, slab_pages=1)
    with pytest.raises(ValueError, match="table of their addresses holds 2"):
        SlabTable(world.pool, 2).refresh()
