"""Triton's kernels against plain attention in double precision, and against themselves bit for bit.

On a GPU where there is one, else in Triton's interpreter, which takes some milliseconds for each program: shapes are
small, and keys are split more finely than on a GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rollout.models.attention import select, triton, triton_metadata
from rollout.models.attention.gather import GatherStep
from rollout.models.attention.interface import Scores
from rollout.models.attention.triton import Blocks, TritonStep, TritonSteps
from rollout.models.attention.triton_metadata import Room, StepBuffers
from rollout.models.errors import UnsupportedAttention
from rollout.models.forward_batch import Packed
from rollout.models.kv_cache.layout import KVLayout, Site, Span
from rollout.models.kv_cache.slab_table import SlabTable
from tests.support.paged_sequences import Kind, PagedWorld, Parts, same_bits
from tests.support.triton_interpreter import kernels_run_here

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: Of a result of size 1: rounding of the output, of weights, and in float32 of the sums.
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
KINDS = (
    Kind(2, 3, 16, 16),
    Kind(1, 5, 13, 24, softcap=1.5),
    Kind(2, 1, 40, 8, Span("window", 11), sinks=True),
    Kind(1, 2, 24, 24, Span("chunk", 14), softcap=0.7, sinks=True),
)


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    found = kernels_run_here(monkeypatch)
    if found.type == "cpu":
        monkeypatch.setattr(triton_metadata, "SPLIT_TOKENS", 32)
        small = {key: (Blocks(16, 16, 4), Blocks(16, 16, 4)) for key in triton._BLOCKS}
        monkeypatch.setattr(triton, "_BLOCKS", small)
        monkeypatch.setattr(triton, "_PROGRAMS", 5)
    return found


class World(PagedWorld):
    def __init__(
        self, lengths: list[int], dtype: torch.dtype, seed: int, device: torch.device, kinds: tuple[Kind, ...] = KINDS,
        **places: int,
    ) -> None:  # fmt: skip
        super().__init__(lengths, dtype, seed, kinds, TOLERANCE[dtype], device=device, **places)
        self.steps = TritonSteps(self.pool)

    def step(self, parts: Parts) -> TritonStep:
        return self.steps(self.pool, self.forward(parts))

    def run(self, parts: Parts) -> list[torch.Tensor]:
        return self.attend(self.step(parts).compute, parts)


# -- what it computes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "page_size", "slab_pages"), [(torch.float32, 16, 4), (torch.bfloat16, 5, 3), (torch.float16, 16, 4)]
)
def test_any_mix_of_rows_and_segments_is_plain_attention(
    dtype: torch.dtype, page_size: int, slab_pages: int, device: torch.device
) -> None:
    world = World([37, 1, 20], dtype, 1, device, page_size=page_size, slab_pages=slab_pages)
    assert world.pool.live_slabs > 1
    for parts in world.random_parts(np.random.default_rng(1), 25):
        world.compare(world.run(parts), parts)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_rows_of_many_splits_are_plain_attention(dtype: torch.dtype, device: torch.device) -> None:
    """At the borders of splits, and where a window or chunk begins within one."""
    length = 2 * triton_metadata.SPLIT_TOKENS + 2
    kinds = (KINDS[0], KINDS[3], Kind(1, 2, 16, 16, Span("window", 3 * triton_metadata.SPLIT_TOKENS // 2)))
    world = World([length, length, length], dtype, 2, device, kinds)
    sequences = ((0, length - 2), (1, length - 3), (2, length - 1))
    prefill = [(sequence, range(position)) for sequence, position in sequences]
    world.run(prefill)
    parts = [(sequence, range(position, position + 1)) for sequence, position in sequences]
    world.compare(world.run(parts), parts)


def test_the_tiles_and_splits_of_a_gpu(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """The other tests use smaller ones."""
    monkeypatch.undo()
    device = kernels_run_here(monkeypatch)
    world = World([300, 20], torch.bfloat16, 3, device, (Kind(1, 6, 128, 128), Kind(1, 2, 256, 192)))
    first = [(0, range(299)), (1, range(19))]
    world.compare(world.run(first), first)
    rows = [(0, range(299, 300)), (1, range(19, 20))]
    world.compare(world.run(rows), rows)


@pytest.mark.parametrize("dim", [1, 300, 512])
def test_odd_and_large_heads(dim: int, device: torch.device) -> None:
    world = World([9], torch.float32, 4, device, (Kind(1, 2, dim, dim),))
    for parts in ([(0, range(8))], [(0, range(8, 9))]):
        world.compare(world.run(parts), parts)


def test_many_heads_that_share_keys(device: torch.device) -> None:
    world = World([9], torch.float32, 4, device, (Kind(1, 33, 8, 8),))
    for parts in ([(0, range(8))], [(0, range(8, 9))]):
        world.compare(world.run(parts), parts)


def test_sequences_read_the_pages_that_they_share(device: torch.device) -> None:
    world = World([20, 25], torch.float32, 5, device, shared=16)
    first = [(0, range(20))]
    world.compare(world.run(first), first)
    rest = [(1, range(16, 24))]
    world.compare(world.run(rest), rest)
    row = [(1, range(24, 25))]
    world.compare(world.run(row), row)


def test_pages_written_in_a_forward_are_read_by_others_in_it(device: torch.device) -> None:
    world = World([33, 40], torch.float32, 6, device, shared=32)
    parts = [(1, range(32, 33)), (0, range(33))]
    world.compare(world.run(parts), parts)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_it_agrees_with_gathering(dtype: torch.dtype, device: torch.device) -> None:
    worlds = [World([30, 9, 40], dtype, 7, device) for _ in range(2)]
    for world in worlds:  # gathering multiplies what nobody has written by 0
        for slab in world.pool.slabs:
            assert slab is not None
            for tensor in slab.tensors:
                tensor.zero_()
    for parts in ([(0, range(29)), (1, range(8)), (2, range(21))], [(0, range(29, 30)), (2, range(21, 40))]):
        ours = worlds[0].run(parts)
        gathered = worlds[1].attend(GatherStep(worlds[1].pool, worlds[1].forward(parts)).compute, parts)
        for one, other in zip(ours, gathered, strict=True):
            assert (one.float() - other.float()).abs().max() < 2 * TOLERANCE[dtype]


def test_tensors_of_any_strides_and_dtypes(device: torch.device) -> None:
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


def test_extreme_scores(device: torch.device) -> None:
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
            logits = torch.einsum("qhd,kd->hqk", query[positions], key[:, 0]) * scores.scaling
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
def test_non_finite_numbers_stay_with_their_sequence(bad: float, where: str, device: torch.device) -> None:
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
def test_every_key_and_value_is_written_where_it_belongs_and_nowhere_else(
    dtype: torch.dtype, device: torch.device
) -> None:
    world = World([21, 7], dtype, 11, device)
    world.run([(0, range(19)), (1, range(7))])
    world.run([(0, range(19, 20))])
    world.check_only_written({0: 20, 1: 7})


# -- independence ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_the_bits_of_a_row_do_not_depend_on_company_or_places(dtype: torch.dtype, device: torch.device) -> None:
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
def test_the_bits_of_a_prompt_do_not_depend_on_cuts_company_or_places(dtype: torch.dtype, device: torch.device) -> None:
    lengths = [39, 23]
    alone = []
    for sequence, length in enumerate(lengths):
        alone.append(World(lengths, dtype, 13, device).run([(sequence, range(length))]))
    forwards: list[Parts] = [[(1, range(9)), (0, range(17))], [(0, range(17, 19)), (1, range(9, 23))]]
    world = World(lengths, dtype, 13, device, place=1, page_size=7, slab_pages=3)
    for parts in [*forwards, [(0, range(19, 39))]]:
        same_bits(alone, world.run(parts), parts, KINDS)


# -- buffers of a fixed size ----------------------------------------------------------------------------


def addresses(buffers: StepBuffers) -> list[int]:
    tensors = [buffers.entries, buffers.pages, buffers.slots, buffers.slab_addresses, buffers.first_tokens]
    for work in buffers.splits.values():
        tensors += [work.items, work.count, work.rows]
    return [tensor.data_ptr() for tensor in tensors]


def padded(world: World, buffers: StepBuffers, parts: Parts) -> list[torch.Tensor]:
    """A step through buffers that have more room: for each site, results of the tokens and of the padding."""
    forward, room = world.forward(parts), buffers.room.tokens
    buffers.fill(forward)
    step, outputs = TritonStep(world.pool, forward, buffers), []
    for index, scores in enumerate(world.scores):
        packed = [world.packed(s, index, parts) for s in (world.queries, world.keys, world.values)]
        # As after layers over padding: anything at all.
        filled = [torch.cat([x, x.new_full((room - len(x), *x.shape[1:]), torch.nan)]) for x in packed]
        outputs.append(step.compute(index, *filled, scores))
    return outputs


@pytest.mark.parametrize("dtype", DTYPES[1:2])
def test_padding_reads_and_writes_nothing_and_changes_no_bit(dtype: torch.dtype, device: torch.device) -> None:
    lengths = [20, 5, 33]
    expected, world = (World(lengths, dtype, 14, device) for _ in range(2))
    room = Room(singles=6, segments=0, tokens=6, entries=40)
    buffers = world.steps.buffers(room)
    before = addresses(buffers)
    prefill = [(sequence, range(length - 2)) for sequence, length in enumerate(lengths)]
    for one in (expected, world):
        one.run(prefill)
    for parts in (
        [(sequence, range(length - 2, length - 1)) for sequence, length in enumerate(lengths)],
        [(1, range(4, 5))],  # the items of the step before must be forgotten
        [(2, range(32, 33)), (0, range(19, 20))],
    ):
        outputs = padded(world, buffers, parts)
        for out, plain in zip(outputs, expected.run(parts), strict=True):
            assert torch.equal(out[: len(parts)], plain)
            assert (out[len(parts) :] == 0).all()
    assert addresses(buffers) == before
    world.check_only_written({0: 20, 1: 5, 2: 33})


def test_a_step_of_padding_alone(device: torch.device) -> None:
    world = World([5], torch.float32, 15, device)
    buffers = world.steps.buffers(Room(singles=2, segments=0, tokens=2, entries=4))
    nothing = np.zeros(0, np.int64)
    forward = Packed(torch.zeros(0, dtype=torch.int64), np.zeros((0, 1), np.int64), nothing, nothing)
    buffers.fill(forward)
    step = TritonStep(world.pool, forward, buffers)
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


def test_a_mixed_step_with_padding(device: torch.device) -> None:
    expected, world = (World([20, 30], torch.float32, 16, device) for _ in range(2))
    buffers = world.steps.buffers(Room(singles=3, segments=2, tokens=30, entries=9))
    for one in (expected, world):
        one.run([(0, range(19))])
    for parts in ([(0, range(19, 20)), (1, range(12))], [(1, range(12, 30))]):
        tokens = sum(len(positions) for _, positions in parts)
        for out, plain in zip(padded(world, buffers, parts), expected.run(parts), strict=True):
            assert torch.equal(out[:tokens], plain)
            assert (out[tokens:] == 0).all()


@pytest.mark.parametrize(
    "room",
    [Room(1, 0, 9, 9), Room(2, 0, 1, 9), Room(2, 0, 9, 3), Room(3, 0, 9, 9)],
)
def test_what_does_not_fit_is_refused(room: Room, device: torch.device) -> None:
    world = World([20, 20], torch.float32, 17, device)
    rows = [(0, range(19, 20)), (1, range(19, 20))]
    buffers = world.steps.buffers(room)
    if room == Room(3, 0, 9, 9):
        buffers.fill(world.forward(rows))
        rows = [(0, range(18, 20))]
    with pytest.raises(ValueError, match="does not fit"):
        buffers.fill(world.forward(rows))


# -- slabs that come and go -----------------------------------------------------------------------------


def test_slabs_that_are_dropped_and_grown_again_are_followed_in_place(device: torch.device) -> None:
    """What lay in a slab that went is NaN from then on, as is what nobody has written in a new one."""
    world = World([40, 12], torch.float32, 18, device, slab_pages=2)
    pool, buffers = world.pool, world.steps.buffers(Room(singles=2, segments=0, tokens=2, entries=8))
    before = addresses(buffers), world.steps.slabs.addresses.data_ptr()
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
        outputs = padded(world, buffers, parts)
        world.compare([out[: len(parts)].contiguous() for out in outputs], parts)
    assert (addresses(buffers), world.steps.slabs.addresses.data_ptr()) == before


def test_a_table_that_is_updated_in_place_is_seen_by_the_next_call(device: torch.device) -> None:
    """As when a captured step is replayed: the same launch, after a slab has moved."""
    world = World([20], torch.float32, 19, device, slab_pages=8)
    buffers = world.steps.buffers(Room(singles=1, segments=0, tokens=1, entries=2))
    world.run([(0, range(19))])
    row = [(0, range(19, 20))]
    expected = padded(world, buffers, row)
    slab = world.pool.slab(0)
    copied = world.pool._allocate_slab()
    for new, old in zip(copied.tensors, slab.tensors, strict=True):
        new.copy_(old)
        old.fill_(torch.nan)
    world.pool.slabs[0] = copied
    world.steps.slabs.follow()
    step = TritonStep(world.pool, world.forward(row), buffers)
    for index, out in enumerate(world.attend(step.compute, row)):
        assert torch.equal(out, expected[index])


def test_pages_in_no_slab_are_refused(device: torch.device) -> None:
    world = World([20], torch.float32, 20, device, slab_pages=1)
    world.tables[0][1] = len(world.pool.slabs)
    with pytest.raises(IndexError, match="in no slab"):
        world.step([(0, range(20))])
    world.tables[0][1] = 0
    world.pool.slabs[0] = None
    with pytest.raises(IndexError, match="in no slab"):
        world.step([(0, range(20))])


def test_more_slabs_than_the_table_holds(device: torch.device) -> None:
    world = World([20], torch.float32, 21, device, slab_pages=1)
    with pytest.raises(ValueError, match="table of their addresses holds 2"):
        SlabTable(world.pool, 2).follow()


# -- which is chosen ------------------------------------------------------------------------------------


def forget_what_serves() -> None:
    for found in (select._triton_serves, select._triton_failure):
        found.cache_clear()


@pytest.fixture
def gpu_pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A pool as of a GPU, for what looks at its layout and device alone."""
    forget_what_serves()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    monkeypatch.setattr(triton, "TritonSteps", lambda pool, library: SimpleNamespace(name="triton"))
    layout = KVLayout((Site(None, 1, 16, 16, Span()),), torch.bfloat16, 16)
    yield SimpleNamespace(layout=layout, device=torch.device("cuda", 0), parts=(None,))
    forget_what_serves()


def test_a_gpu_gets_triton_where_it_passes_its_check(gpu_pool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = []
    monkeypatch.setattr(triton, "check", lambda *about: checked.append(about))
    assert [select.fastest(gpu_pool).name for _ in range(2)] == ["triton", "triton"]
    assert checked == [(frozenset({(16, 16)}), torch.bfloat16, gpu_pool.device)]


def test_a_gpu_gathers_where_it_does_not_and_says_so_once(
    gpu_pool: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*about: object) -> None:
        raise RuntimeError("Failed to find C compiler.\nmore")

    monkeypatch.setattr(triton, "check", fails)
    with caplog.at_level(logging.WARNING):
        assert [select.fastest(gpu_pool) for _ in range(2)] == [GatherStep, GatherStep]
    assert len(caplog.records) == 1
    assert "some GPU, pages are gathered instead" in caplog.text
    assert "RuntimeError: Failed to find C compiler." in caplog.text


def test_triton_asked_for_by_name_is_not_replaced(gpu_pool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*about: object) -> None:
        raise RuntimeError("Failed to find C compiler.\nmore")

    monkeypatch.setattr(triton, "check", fails)
    with pytest.raises(UnsupportedAttention, match=r"attention=triton .*\(RuntimeError: Failed to find C compiler\): "):
        select.chosen("triton", gpu_pool)
    monkeypatch.setattr(triton, "check", lambda *about: None)
    forget_what_serves()
    assert select.chosen("triton", gpu_pool).name == "triton"


def test_no_room_for_the_check_is_no_reason_to_gather(gpu_pool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*about: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(triton, "check", fails)
    with pytest.raises(torch.OutOfMemoryError):
        select.fastest(gpu_pool)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_check_passes(dtype: torch.dtype, device: torch.device) -> None:
    triton.check({(16, 16), (12, 20)}, dtype, device)


@pytest.mark.parametrize(
    ("dims", "dtype", "why"),
    [((16, 16), torch.float64, "no kernels for torch.float64"), ((16, 513), torch.float32, "more than 512")],
)
def test_what_there_are_no_kernels_for(
    dims: tuple[int, int], dtype: torch.dtype, why: str, device: torch.device
) -> None:
    with pytest.raises(ValueError, match=why):
        triton.check({dims}, dtype, device)


def test_a_kernel_that_computes_something_else_does_not_pass(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    compute = TritonStep.compute

    def wrong(self: TritonStep, index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores) -> Any:
        return compute(self, index, q, k, v, scores) + 1e-3

    monkeypatch.setattr(TritonStep, "compute", wrong)
    with pytest.raises(ValueError, match="compute something else"):
        triton.check({(16, 16)}, torch.float32, device)
