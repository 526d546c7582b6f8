"""The size of the KV pool: it grows to headroom and the user's cap, and shrinks when other processes need memory."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import nn

from rollout.engine.kv_memory import KVMemory
from rollout.headroom.fake import FakeHeadroom
from rollout.models.arrays import IntArray
from rollout.models.device import is_out_of_memory
from rollout.models.kv_cache.layout import AttentionLayer, KVLayout, MaskKind

CPU = torch.device("cpu")
PAGE_SIZE = 4
#: One layer with one head of size one in float32: 8 bytes per token, 32 per page.
LAYOUT = KVLayout((AttentionLayer(nn.Identity(), 1, 1, 1, MaskKind()),), torch.float32, PAGE_SIZE)
PAGE = LAYOUT.bytes_per_page
MANY = 1 << 40


class World:
    """A fake device, and KV memory on it."""

    def __init__(
        self,
        total: int,
        *,
        taken: int = 0,
        max_kv_bytes: int | None = None,
        reserve_fraction: float = 0.0,
        expected_tokens: int = MANY,
    ) -> None:
        self.memory: KVMemory | None = None
        self.headroom = FakeHeadroom(total, taken, self.held)
        self.memory = KVMemory(LAYOUT, self.headroom, CPU, max_kv_bytes, reserve_fraction, expected_tokens)

    def held(self) -> int:
        return 0 if self.memory is None else self.memory.pool.bytes_held


def made(total: int, **options: object) -> KVMemory:
    memory = World(total, **options).memory  # type: ignore[arg-type]
    assert memory is not None
    return memory


# -- the size of a slab ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "pages"),
    [
        ({}, 100),
        ({"taken": 800 * PAGE}, 50),
        ({"reserve_fraction": 0.5}, 50),
        ({"max_kv_bytes": 320 * PAGE}, 20),
        ({"max_kv_bytes": 9999 * PAGE}, 100),
        ({"expected_tokens": 40 * PAGE_SIZE}, 40),
        ({"expected_tokens": 1}, 1),
        ({"taken": 1600 * PAGE}, 1),
        ({"taken": 2000 * PAGE}, 1),
        ({"max_kv_bytes": 5}, 1),
    ],
)
def test_slab_size_is_a_share_of_headroom_and_demand(options: dict[str, int], pages: int) -> None:
    memory = made(1600 * PAGE, **options)
    assert memory.pool.slab_pages == pages
    assert memory.pool.bytes_held == 0, "nothing is held before it is needed"


def test_a_slab_is_never_huge() -> None:
    assert made(1 << 50).pool.slab_bytes == 1 << 30


# -- growing ---------------------------------------------------------------------------------------------


def fill(memory: KVMemory) -> None:
    """Grow until growth is refused, then read the headroom."""
    while memory.reserve(memory.pool.free_pages + 1):
        memory.pool.allocate(memory.pool.free_pages)
        assert memory.pool.live_slabs < 1000, "it grows without end"
    memory.read_headroom()


def test_growth_stops_at_headroom() -> None:
    memory = made(160 * PAGE, taken=16 * PAGE, reserve_fraction=0.25)
    # 160 - 16 - 40 pages, in slabs of 6
    fill(memory)
    assert memory.pool.slab_pages == 6
    assert memory.pool.live_slabs == 17
    assert memory.headroom_bytes == 2 * PAGE
    assert (memory.obtainable_bytes, memory.attainable_pages - memory.used_pages, memory.excess_bytes) == (0, 0, 0)


def test_growth_stops_at_the_cap() -> None:
    memory = made(1600 * PAGE, max_kv_bytes=100 * PAGE)
    fill(memory)
    assert memory.pool.slab_pages == 6
    assert memory.pool.bytes_held == 96 * PAGE <= 100 * PAGE
    assert memory.headroom_bytes == (1600 - 96) * PAGE


def test_headroom_is_counted_down_between_readings() -> None:
    """Headroom is read once per step; a step must not take the same bytes twice."""
    headroom = FakeHeadroom(160 * PAGE)  # never sees what the pool holds
    memory = KVMemory(LAYOUT, headroom, CPU, None, 0.0, MANY)
    assert memory.reserve(160)
    assert memory.headroom_bytes == 0
    assert not memory.reserve(161)


def test_reserving_grows_no_more_than_needed() -> None:
    memory = made(160 * PAGE)
    assert memory.reserve(0)
    assert memory.pool.live_slabs == 0
    assert memory.reserve(11)
    assert (memory.pool.slab_pages, memory.pool.live_slabs) == (10, 2)
    assert memory.reserve(20)
    assert memory.pool.live_slabs == 2
    memory.pool.allocate(15)
    assert memory.reserve(5)
    assert memory.pool.live_slabs == 2
    assert memory.reserve(6)
    assert memory.pool.live_slabs == 3


def test_growth_that_headroom_cannot_complete_is_not_begun() -> None:
    memory = made(160 * PAGE)
    assert not memory.reserve(161)
    assert memory.pool.live_slabs == 0
    assert memory.reserve(160)


def test_pages_left_for_others_must_be_obtainable_but_are_not_grown_for() -> None:
    memory = made(160 * PAGE)
    assert not memory.reserve(100, keep_free=61)
    assert memory.pool.live_slabs == 0
    assert memory.reserve(100, keep_free=60)
    assert memory.pool.live_slabs == 10


def test_obtainable_is_what_is_free_and_what_can_be_grown() -> None:
    memory = made(160 * PAGE)
    assert memory.attainable_pages - memory.used_pages == 160
    memory.reserve(10)
    memory.pool.allocate(7)
    assert memory.attainable_pages - memory.used_pages == 153
    assert (memory.obtainable_bytes, memory.bytes_used) == (153 * PAGE, 7 * PAGE)


# -- refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."),
    ],
)
def test_a_refusal_of_the_allocator_stops_growth_until_the_next_reading(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    memory = made(160 * PAGE)
    assert memory.reserve(10)
    grow, calls = memory.pool.grow, list[int]()

    def refuse(agree: object) -> None:
        calls.append(1)
        raise error

    monkeypatch.setattr(memory.pool, "grow", refuse)
    with caplog.at_level(logging.WARNING):
        assert not memory.reserve(30)
    assert "allocate 320 more bytes of KV cache" in caplog.text
    assert memory.attainable_pages - memory.used_pages == 10
    assert not memory.reserve(30)
    assert len(calls) == 1, "it is not asked again and again"
    assert memory.reserve(10), "what it holds is still of use"
    memory.read_headroom()
    monkeypatch.setattr(memory.pool, "grow", grow)
    assert memory.reserve(30)


def test_other_errors_are_not_taken_for_a_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = made(160 * PAGE)

    def fail(agree: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(memory.pool, "grow", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        memory.reserve(1)


def test_errors_that_torch_raises_are_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    for said in (
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "Triton Error [CUDA]: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ):
        assert is_out_of_memory(RuntimeError(said))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(ValueError("can't allocate memory"))


def test_the_peak_stays_when_memory_goes() -> None:
    memory = made(160 * PAGE)
    memory.reserve(30)
    assert memory.shrink([], [])
    assert memory.shrink([], [])
    assert (memory.bytes_held, memory.peak_bytes) == (10 * PAGE, 30 * PAGE)
    memory.reserve(20)
    assert memory.peak_bytes == 30 * PAGE


# -- giving back -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "excess"), [(0, 0), (1, 1), (10 * PAGE, 10 * PAGE), (80 * PAGE, 80 * PAGE), (9999 * PAGE, 80 * PAGE)]
)
def test_excess_is_the_lack_of_headroom_up_to_the_held_bytes(extra: int, excess: int) -> None:
    """Hold eight slabs of ten pages; other processes take all the rest and ``extra`` more."""
    world = World(160 * PAGE)
    memory = world.memory
    assert memory is not None
    memory.reserve(80)
    world.headroom.taken_bytes = 80 * PAGE + extra
    memory.read_headroom()
    assert memory.headroom_bytes == -extra
    assert memory.excess_bytes == excess
    assert memory.attainable_pages - memory.used_pages == 80
    assert memory.obtainable_bytes == 80 * PAGE


@pytest.mark.parametrize(
    ("options", "fits"),
    [
        ({}, 160),
        ({"reserve_fraction": 0.5}, 80),
        ({"max_kv_bytes": 64 * PAGE}, 64),
        ({"max_kv_bytes": 63 * PAGE}, 63),
        ({"taken": 144 * PAGE}, 160),
        ({"max_kv_bytes": 5}, 0),
    ],
)
def test_largest_possible_pool_ignores_other_processes(options: dict[str, int], fits: int) -> None:
    memory = made(160 * PAGE, **options)
    assert memory.could_hold(fits)
    assert not memory.could_hold(fits + 1)
    limit = options.get("max_kv_bytes")
    assert memory.bound == ("memory" if limit is None else f"max_kv_bytes={limit:,}")


@pytest.mark.parametrize(
    "check", [KVMemory.read_headroom, lambda memory: memory.could_hold(1), lambda memory: memory.reserve(0)]
)
def test_checks_allocate_nothing(check: Callable[[KVMemory], object]) -> None:
    memory = made(160 * PAGE)
    check(memory)
    assert memory.pool.bytes_held == 0
    assert memory.headroom_bytes == 160 * PAGE


def two_rows_in_two_slabs(memory: KVMemory) -> list[IntArray]:
    pool = memory.pool
    assert memory.reserve(2 * pool.slab_pages)
    half = pool.slab_pages // 2
    low, between, high = pool.allocate(half), pool.allocate(pool.slab_pages - half), pool.allocate(1)
    pool.release(between)
    return [low, high]


def test_pages_that_cannot_be_moved_for_lack_of_memory_are_given_up_instead(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    memory = made(160 * PAGE)
    rows = two_rows_in_two_slabs(memory)

    def refuse(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError

    def preempt() -> bool:
        if not rows:
            return False
        memory.pool.release(rows.pop())
        return True

    monkeypatch.setattr(memory.pool, "copy", refuse)
    memory.free(memory.bytes_held, lambda: rows, list, preempt)
    assert (memory.bytes_held, rows) == (0, [])
    assert "Could not move pages" in caplog.text
    memory.pool.check_integrity([])


def test_pages_that_cannot_be_moved_for_another_reason_end_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = made(160 * PAGE)
    rows = two_rows_in_two_slabs(memory)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("device-side assert triggered")

    monkeypatch.setattr(memory.pool, "copy", fail)
    with pytest.raises(RuntimeError, match="device-side assert"):
        memory.free(memory.bytes_held, lambda: rows, list, lambda: False)
