"""The compiled kernel against plain attention in double precision, and against itself bit for bit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from rollout.models.attention import compiled
from rollout.models.attention.compiled import CompiledForward
from rollout.models.attention.compiled_library import Kernel
from rollout.models.attention.interface import ScoreParams
from rollout.models.kv_cache.layout import KVLayout, MaskKind
from rollout.models.kv_cache.page_pool import PagePool
from tests.support.compiler import needs_compiler
from tests.support.paged_sequences import Kind, PagedWorld, Parts, same_bits, whole

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: Of a result of size 1: rounding of the output, and in float32 of the sums.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


KINDS = (
    Kind(3, 3, 64, 64),
    Kind(2, 1, 80, 80),
    Kind(1, 4, 96, 96),
    Kind(2, 7, 13, 13),
    Kind(1, 2, 128, 128, softcap=1.5),
    Kind(2, 1, 24, 40, sinks=True),
    Kind(1, 3, 72, 5),
    Kind(2, 3, 64, 64, MaskKind("window", 37)),
    Kind(2, 1, 16, 32, MaskKind("window", 100), softcap=0.7, sinks=True),
    Kind(1, 4, 64, 48, MaskKind("chunk", 70), sinks=True),
    Kind(3, 1, 8, 8, MaskKind("window", 1)),
    Kind(1, 30, 32, 32, MaskKind("window", 700)),
)


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        needs_compiler()
        yield compiled.load()


class World(PagedWorld):
    """What the compiled kernel is run on."""

    def __init__(
        self, lengths: list[int], dtype: torch.dtype, seed: int, *, kinds: tuple[Kind, ...] = KINDS, **places: int
    ) -> None:
        super().__init__(lengths, dtype, seed, kinds, TOLERANCE[dtype], **places)

    def step(self, kernel: Kernel, parts: Parts, threads: int = 1) -> CompiledForward:
        forward = self.forward(parts)
        return CompiledForward(kernel, self.pool, forward.page_tables, forward.prefix_lens, forward.query_lens, threads)

    def run(self, kernel: Kernel, parts: Parts, threads: int = 1) -> list[torch.Tensor]:
        """One forward: for each layer [T, heads, value_dim]."""
        return self.attend(self.step(kernel, parts, threads), parts)


# -- what it computes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill_equals_reference_attention(kernel: Kernel, dtype: torch.dtype) -> None:
    world = World([150, 1, 64, 9, 65], dtype, 0)
    world.compare(world.run(kernel, whole(world)), whole(world))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("page_size", "slab_pages"), [(16, 8), (5, 3), (64, 1)])
def test_mixed_decodes_and_prefills_equal_reference_attention(
    kernel: Kernel, dtype: torch.dtype, page_size: int, slab_pages: int
) -> None:
    world = World([90, 33, 1, 17, 130], dtype, 1, page_size=page_size, slab_pages=slab_pages)
    assert world.pool.live_slabs > 2
    for parts in world.random_parts(np.random.default_rng(1), 60):
        world.compare(world.run(kernel, parts), parts)


def test_sequences_of_several_chunks_equal_reference_attention(kernel: Kernel) -> None:
    """Beyond the chunks into which one sequence is divided, with rows that several threads share."""
    world = World(
        [1100, 530], torch.float32, 2, kinds=(KINDS[0], KINDS[5], KINDS[7], Kind(1, 2, 16, 16, MaskKind("window", 700)))
    )
    world.run(kernel, [(0, range(480)), (1, range(500))])
    world.run(kernel, [(0, range(480, 1000))], threads=2)
    for parts in (
        [(0, range(500, 530))],
        [(1, range(500, 529)), (0, range(1000, 1060))],
        [(0, range(1060, 1061)), (1, range(529, 530))],
        [(0, range(1061, 1062))],
    ):
        for threads in (1, 3):
            world.compare(world.run(kernel, parts, threads), parts)


def test_sequences_read_shared_pages(kernel: Kernel) -> None:
    world = World([40, 50], torch.float32, 3, shared=32)
    first = [(0, range(40))]
    world.compare(world.run(kernel, first), first)
    rest = [(1, range(32, 50))]
    world.compare(world.run(kernel, rest), rest)


def test_shared_pages_written_in_a_forward_are_read_in_the_same_forward(kernel: Kernel) -> None:
    world = World([600, 33], torch.float32, 4, shared=32, kinds=KINDS[:2])
    parts = [(1, range(32, 33)), (0, range(600))]
    first = world.run(kernel, parts)
    world.compare(first, parts)
    for _ in range(5):
        world.poison()
        for index, out in enumerate(world.run(kernel, parts, threads=2)):
            assert torch.equal(out, first[index])


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_of_inputs_do_not_change_results(kernel: Kernel, dtype: torch.dtype) -> None:
    world = World([21, 30], dtype, 5)
    parts = [(1, range(30)), (0, range(21))]
    plain = world.run(kernel, parts)
    step = world.step(kernel, parts)
    for index, kind in enumerate(KINDS):
        q, k, v = (world.packed(s, index, parts) for s in (world.queries, world.keys, world.values))
        # heads outermost; one projection cut in three; numbers of a head not side by side
        transposed = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
        cut = torch.cat([x.flatten(1) for x in (q, k, v)], 1).split([x[0].numel() for x in (q, k, v)], 1)
        dims = (kind.key_dim, kind.key_dim, kind.value_dim)
        fused = [x.unflatten(1, (-1, dim)) for x, dim in zip(cut, dims, strict=True)]
        scattered = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
        for tensors in (transposed, fused, scattered):
            world.poison()
            assert torch.equal(step(index, *tensors, world.scores[index]), plain[index])


def test_inputs_are_cast_to_the_dtype_of_the_pages(kernel: Kernel) -> None:
    """Under autocast queries and keys come in float32 and values in bfloat16."""
    world = World([20], torch.bfloat16, 6)
    parts = whole(world)
    plain, step = world.run(kernel, parts), world.step(kernel, parts)
    for index, scores in enumerate(world.scores):
        q, k, v = (world.packed(s, index, parts) for s in (world.queries, world.keys, world.values))
        assert torch.equal(step(index, q.float(), k.float(), v, scores), plain[index])


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_and_values_are_written_to_their_slots_only(kernel: Kernel, dtype: torch.dtype) -> None:
    world = World([100, 7], dtype, 7)
    world.run(kernel, [(0, range(98)), (1, range(7))], threads=2)
    world.run(kernel, [(0, range(98, 99))])
    world.check_only_written({0: 99, 1: 7})


def test_extreme_scores_neither_overflow_nor_give_nan(kernel: Kernel) -> None:
    """Weights far below the smallest float vanish, and scores far beyond exp's range do not overflow."""
    world = World([200], torch.float32, 8, kinds=(Kind(1, 2, 16, 16), Kind(1, 2, 16, 16, sinks=True)))
    for keys in world.keys:
        keys[0].mul_(
            torch.linspace(0, 300, 200)[torch.randperm(200, generator=torch.Generator().manual_seed(8))].view(-1, 1, 1)
        )
    outputs = world.run(kernel, whole(world))
    for index in range(2):
        kind, scores = world.kinds[index], world.scores[index]
        logits = (
            torch.einsum("qhd,kd->hqk", world.queries[index][0].double(), world.keys[index][0][:, 0].double())
            * scores.scale
        )
        logits = logits.masked_fill(torch.ones(200, 200, dtype=torch.bool).triu(1), -torch.inf)
        if kind.sinks:
            assert scores.sinks is not None
            logits = torch.cat([logits, scores.sinks.double()[:, None, None].expand(2, 200, 1)], -1)
        weights = logits.softmax(-1)[..., :200]
        expected = torch.einsum("hqk,kd->qhd", weights, world.values[index][0][:, 0].double())
        assert (outputs[index].double() - expected).abs().max() < 1e-3  # of scores around 1000, rounded at 6e-5
        assert float((outputs[index].double() - expected).abs().mean()) < 1e-5


# -- independence ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_chunks_batch_pages_or_threads(kernel: Kernel, dtype: torch.dtype) -> None:
    lengths, seed = [100, 70, 3, 150], 10
    alone = []
    for sequence in range(len(lengths)):
        world = World(lengths, dtype, seed)
        alone.append(world.run(kernel, [(sequence, range(lengths[sequence]))]))
    for attempt in range(3):
        world = World(lengths, dtype, seed, place=attempt, page_size=(16, 7, 3)[attempt], slab_pages=3 + attempt)
        for parts in world.random_parts(np.random.default_rng(attempt), (40, 90, 9)[attempt]):
            same_bits(alone, world.run(kernel, parts, threads=1 + attempt % 3), parts, KINDS)


def test_decoded_token_has_the_bits_of_a_prefilled_one(kernel: Kernel) -> None:
    for dtype in DTYPES:
        world = World([90], dtype, 11)
        alone = [world.run(kernel, whole(world))]
        world.poison()
        for position in range(90):
            parts = [(0, range(position, position + 1))]
            same_bits(alone, world.run(kernel, parts), parts, KINDS)


def test_bits_of_long_sequences_do_not_depend_on_how_threads_divide_them(kernel: Kernel) -> None:
    """Rows divided among threads by heads and chunks, tiles across the border of a chunk, a window over two."""
    world = World([1300, 600], torch.float32, 12)
    alone = [world.run(kernel, [(sequence, range(length))]) for sequence, length in enumerate(world.lengths)]
    for threads, parts in (
        (2, [(0, range(1298, 1299))]),
        (3, [(0, range(1299, 1300)), (1, range(599, 600))]),
        (8, [(0, range(510, 1300))]),
        (8, [(0, range(505, 515)), (1, range(1))]),
        (1, [(0, range(1023, 1026)), (1, range(500, 600))]),
    ):
        step = world.step(kernel, parts, threads)
        for _ in range(3):  # a plan serves every layer, and leaves nothing behind
            outputs = [
                step(index, *(world.packed(s, index, parts) for s in (world.queries, world.keys, world.values)), scores)
                for index, scores in enumerate(world.scores)
            ]
            same_bits(alone, outputs, parts, KINDS)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["queries", "keys", "values"])
def test_non_finite_inputs_affect_only_tokens_that_see_them(kernel: Kernel, bad: float, where: str) -> None:
    sound, world = World([80, 80, 40], torch.float32, 13), World([80, 80, 40], torch.float32, 13)
    for stored in getattr(world, where):
        stored[1][50] = bad
    parts = [(0, range(80)), (1, range(80)), (2, range(40))]
    expected, outputs = sound.run(kernel, parts), world.run(kernel, parts)
    for index, kind in enumerate(KINDS):
        clean = torch.ones(200, dtype=torch.bool)
        if where == "queries":
            clean[80 + 50] = False
        else:
            position = torch.arange(50, 80)
            seen = torch.ones(30, dtype=torch.bool)
            if kind.mask_kind.kind == "window":
                seen = position - 50 < kind.mask_kind.size
            if kind.mask_kind.kind == "chunk":
                seen = position // kind.mask_kind.size == 50 // kind.mask_kind.size
            clean[80 + position[seen]] = False
        assert torch.equal(outputs[index][clean], expected[index][clean]), kind
        if bad != bad or where == "values":
            assert not outputs[index][~clean].isfinite().any(), kind
        # and a later step of the others, which reads their pages only
    late = [(0, range(79, 80)), (2, range(39, 40))]
    for index, out in enumerate(world.run(kernel, late)):
        assert torch.equal(out, expected[index][[79, 199]])


# -- the pool --------------------------------------------------------------------------------------------


def test_dropped_and_replaced_slabs_are_noticed(kernel: Kernel) -> None:
    world = World([60], torch.float32, 14, slab_pages=2)
    expected = world.run(kernel, whole(world))
    used = set((world.tables[0] // 2).tolist())
    unused = next(number for number in range(world.pool.live_slabs) if number not in used)
    world.pool.slabs[unused] = None
    for index, out in enumerate(world.run(kernel, whole(world))):
        assert torch.equal(out, expected[index])
    # what the pool holds moves to other addresses
    number = int(world.tables[0][1]) // 2
    held = world.pool.slab(number)
    world.pool.slabs[number] = None
    with pytest.raises(IndexError, match="Sequence 0"):
        world.run(kernel, whole(world))
    world.pool.slabs[number] = world.pool._allocate_slab()
    for index, out in enumerate(world.run(kernel, whole(world))):
        assert torch.equal(out, expected[index])
    assert not torch.equal(world.pool.slab(number).keys[0], torch.zeros_like(held.keys[0]))


def test_page_in_no_slab_raises_index_error(kernel: Kernel) -> None:
    world = World([20, 20], torch.float32, 15)
    for page in (-1, 10**9):
        world.tables[1][1] = page
        with pytest.raises(IndexError, match="Sequence 1"):
            world.run(kernel, whole(world))


def test_mismatched_shapes_and_unsupported_layouts_are_refused(kernel: Kernel) -> None:
    world = World([20], torch.float32, 16)
    step = world.step(kernel, whole(world))
    q, k, v = (world.packed(s, 0, whole(world)) for s in (world.queries, world.keys, world.values))
    scores = world.scores[0]
    for tensors in ((q[1:], k, v), (q, k[:, 1:], v), (q, k, v[..., 1:]), (q[:, 1:], k, v), (q[..., 1:], k, v)):
        with pytest.raises(ValueError, match="Layer 0"):
            step(0, *tensors, scores)
    with pytest.raises(ValueError, match="sinks"):
        step(0, q, k, v, ScoreParams(1.0, None, torch.zeros(3)))
    arrays = (np.zeros((1, 2), np.int64), np.array([0]), np.array([1]))
    for at, wrong in ((0, np.zeros(2, np.int64)), (1, np.array([0, 0])), (2, np.array([-1]))):
        with pytest.raises(ValueError, match=r"tables|negative"):
            CompiledForward(kernel, world.pool, *(*arrays[:at], wrong, *arrays[at + 1 :]))
    double = PagePool(KVLayout(world.pool.layout.layers, torch.float64, 16), 4, CPU)
    assert not kernel.supports(double.layout, CPU)
    assert not kernel.supports(world.pool.layout, torch.device("cuda"))
    with pytest.raises(ValueError, match="float64"):
        CompiledForward(kernel, double, *arrays)


def test_forward_without_tokens_returns_empty_output(kernel: Kernel) -> None:
    world = World([20], torch.float32, 17)
    empty = [(0, range(0))]
    assert world.run(kernel, empty)[0].shape == (0, 9, 64)
    for index, out in enumerate(world.run(kernel, [*empty, (0, range(20)), *empty])):
        assert torch.equal(out, world.run(kernel, [(0, range(20))])[index])


# -- the source ------------------------------------------------------------------------------------------


def test_kernel_has_one_team_and_no_second_openmp(kernel: Kernel) -> None:
    """Calls share the threads of the first one, and torch's OpenMP runtime stays the only one."""
    if not torch.backends.openmp.is_available() or not Path("/proc/self/task").exists():
        pytest.skip("torch has no OpenMP here, or the system no /proc")
    assert kernel.parallel is not None
    world, threads = World([600, 300], torch.float32, 18), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        torch.ones(1 << 20).exp()
        world.run(kernel, whole(world), threads=2)
        before = len(os.listdir("/proc/self/task"))
        for _ in range(3):
            world.run(kernel, whole(world), threads=2)
            torch.ones(1 << 20).exp()
        assert len(os.listdir("/proc/self/task")) <= before  # fewer: others of earlier tests have ended
    finally:
        torch.set_num_threads(threads)
    files = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    runtimes = [file for file in files if any(name in file for name in ("libgomp", "libomp", "libiomp"))]
    assert len(runtimes) == 1, runtimes
