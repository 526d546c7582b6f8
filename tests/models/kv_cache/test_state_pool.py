"""Recurrent states: what a row keeps stays its own, wherever it lies."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rollout.models.arrays import IntArray
from rollout.models.kv_cache.layout import StateTensor
from rollout.models.kv_cache.state_pool import StatePool, StateRows
from rollout.models.runners.state_cache import PooledStates, RecordedStates

CPU = torch.device("cpu")
STATES = (
    StateTensor(1, "conv", 0, (3, 4), torch.bfloat16),
    StateTensor(1, "recurrent", 0, (5,), torch.float32),
    StateTensor(3, "conv", 0, (1, 3), torch.bfloat16),
    StateTensor(3, "recurrent", 1, (2, 2), torch.float64),
)
ROW_BYTES = 24 + 20 + 6 + 32


def pool_of(slabs: int = 2, slab_pages: int = 3) -> StatePool:
    pool = StatePool(STATES, slab_pages, CPU)
    for _ in range(slabs):
        pool.grow()
        for tensor in pool.slab(pool.live_slabs - 1).tensors:
            tensor.fill_(torch.nan)  # what another row may have left
    return pool


def values(rows: int, state: StateTensor, stamp: int = 0) -> torch.Tensor:
    return (stamp + torch.arange(rows * state.bytes // state.dtype.itemsize)).view(rows, *state.shape).to(state.dtype)


def pages(*ids: int) -> IntArray:
    return np.array(ids, np.int64)


# -- the pool --------------------------------------------------------------------------------------------


def test_slab_is_one_allocation_for_its_rows() -> None:
    pool = pool_of(1)
    assert (pool.page_bytes, pool.slab_bytes, pool.bytes_held) == (ROW_BYTES, 3 * ROW_BYTES, 3 * ROW_BYTES)
    tensors = pool.slab(0).tensors
    assert [(tuple(t.shape), t.dtype) for t in tensors] == [((3, *s.shape), s.dtype) for s in STATES]
    assert {t.untyped_storage().nbytes() for t in tensors} == {3 * ROW_BYTES}
    assert all(t.data_ptr() % t.dtype.itemsize == 0 for t in tensors)


def test_tensors_do_not_overlap() -> None:
    pool = pool_of(1)
    for index, tensor in enumerate(pool.slab(0).tensors):
        tensor.fill_(index)
    assert all((tensor == index).all() for index, tensor in enumerate(pool.slab(0).tensors))


@pytest.mark.parametrize("ids", [(0, 1, 2), (2, 0), (5, 1, 3), (4,)])
def test_rows_in_any_slabs_are_read_as_written(ids: tuple[int, ...]) -> None:
    pool = pool_of()
    rows = StateRows.of(pool, pages(*ids))
    for index, state in enumerate(STATES):
        rows.write(index, values(len(ids), state))
    for index, state in enumerate(STATES):
        assert torch.equal(rows.read(index), values(len(ids), state))
        one = StateRows.of(pool, pages(ids[-1])).read(index)
        assert torch.equal(one[0], values(len(ids), state)[-1])
        for other in set(range(6)) - set(ids):
            assert pool.slab(other // 3).tensors[index][other % 3].isnan().all()


def test_read_returns_a_copy() -> None:
    pool = pool_of()
    rows = StateRows.of(pool, pages(1))
    rows.write(1, torch.ones(1, 5))
    rows.read(1).zero_()
    assert torch.equal(rows.read(1), torch.ones(1, 5))


def test_copy_copies_every_state() -> None:
    pool = pool_of()
    for index, state in enumerate(STATES):
        StateRows.of(pool, pages(1)).write(index, values(1, state, stamp=index))
    pool.copy(pages(1), pages(4))
    for index, state in enumerate(STATES):
        assert torch.equal(StateRows.of(pool, pages(4)).read(index), values(1, state, stamp=index))


# -- the cache -------------------------------------------------------------------------------------------


def test_new_sequences_ignore_what_their_pages_hold() -> None:
    cache = PooledStates(StateRows.of(pool_of(), pages(0, 5)), fresh=True)
    assert cache.get_conv_state(1) is None
    assert cache.get_recurrent_state(1) is None
    assert not cache.has_previous_state(1)


@pytest.mark.parametrize("tokens", [1, 3, 4, 9])
def test_last_convolution_inputs_are_kept_and_zero_padded(tokens: int) -> None:
    rows = StateRows.of(pool_of(), pages(0, 5))
    new = 1.0 + torch.arange(2.0 * 3 * tokens).view(2, 3, tokens)
    padded = torch.nn.functional.pad(new, (max(0, 4 - tokens), 0))
    inputs = PooledStates(rows, fresh=True).update_conv_state(new, 1, conv_kernel_size=4)
    assert torch.equal(inputs, padded)
    assert torch.equal(rows.read(0).float(), padded[..., -4:])
    more = torch.full((2, 3, 1), 99.0)
    inputs = PooledStates(rows, fresh=False).update_conv_state(more, 1, conv_kernel_size=4)
    assert torch.equal(inputs.float(), torch.cat([padded[..., -4:], more], -1))
    assert torch.equal(rows.read(0).float(), inputs[..., -4:].float())


def test_in_place_changes_of_a_layer_are_written_back() -> None:
    rows = StateRows.of(pool_of(), pages(0, 5))
    for index, state in enumerate(STATES):
        rows.write(index, values(2, state))
    cache = PooledStates(rows, fresh=False)
    first = cache.get_recurrent_state(1)
    assert first is not None
    first += 100
    assert cache.get_recurrent_state(1) is first, "within a layer it is the same tensor"
    last = cache.get_recurrent_state(layer_idx=3, state_idx=1)
    assert last is not None
    assert torch.equal(rows.read(1), values(2, STATES[1], 100)), "the next layer has begun"
    last += 1000
    cache.finish()
    assert torch.equal(rows.read(3), values(2, STATES[3], 1000))


def test_updated_state_is_not_overwritten_by_the_loaded_one() -> None:
    rows = StateRows.of(pool_of(), pages(2))
    rows.write(1, torch.zeros(1, 5))
    cache = PooledStates(rows, fresh=False)
    cache.get_recurrent_state(1)
    cache.update_recurrent_state(torch.ones(1, 5), 1)
    cache.finish()
    assert torch.equal(rows.read(1), torch.ones(1, 5))


def test_recorded_states_have_shapes_and_dtypes_of_one_row() -> None:
    cache = RecordedStates()
    cache.update_conv_state(torch.zeros(1, 3, 2, dtype=torch.bfloat16), 1, conv_kernel_size=4)
    cache.update_recurrent_state(torch.zeros(1, 5), layer_idx=1)
    cache.update(torch.zeros(1), torch.zeros(1), 2)
    assert cache.states == list(STATES[:2])
    assert cache.updates == 1
