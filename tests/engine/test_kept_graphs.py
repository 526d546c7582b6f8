"""CUDA graphs that an engine keeps between its calls, with graphs that compute nothing."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from transformers import PreTrainedModel

from jobs.bench.lib.empty_graphs import EmptyGraphs, runner_of_empty_graphs
from jobs.bench.lib.spies import Spies, watched
from rollout import Engine, SamplingParams
from rollout.engine.live_module import LiveModule
from rollout.headroom.fake import FakeHeadroom
from tests.support.parity import page_bytes
from tests.support.tiny_models import tiny

PARAMS = SamplingParams(max_new_tokens=20, ignore_eos=True)
TOTAL = 10**10


@pytest.fixture
def spies() -> Iterator[Spies]:
    with watched() as found:
        yield found


@pytest.fixture
def headroom() -> FakeHeadroom:
    return FakeHeadroom(TOTAL)


@pytest.fixture
def engine(headroom: FakeHeadroom, monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setattr(LiveModule, "may_keep_graphs", True)
    return with_empty_graphs(Engine(tiny("llama", num_hidden_layers=1), None, headroom=headroom, reserve_fraction=0.0))


def with_empty_graphs(engine: Engine) -> Engine:
    strategy: Any = engine._module.strategy
    strategy.runner = partial(runner_of_empty_graphs, strategy)
    return engine


def captures(engine: Any, spies: Spies, rows: int = 4, tokens: int = 5) -> int:
    spies.clear()
    batch = engine.generate([[3] * tokens] * rows, PARAMS)
    assert batch.stats.kv_bytes_held == 0
    assert len(batch.finished) == rows
    return len(spies.captures)


def test_later_calls_capture_nothing_and_no_keys_are_held(engine: Engine, spies: Spies) -> None:
    assert [captures(engine, spies) for _ in range(3)] == [1, 0, 0]
    engine.release()
    assert captures(engine, spies) == 1


def test_later_calls_may_be_much_larger_than_the_first(engine: Engine, spies: Spies) -> None:
    captures(engine, spies, rows=1)
    captures(engine, spies, rows=40, tokens=300)
    kept = engine._kept
    assert kept is not None
    assert kept._held is not None
    assert kept._held.kept.kv.pool.slab_bytes > TOTAL // 20, "slabs are not those of a call of one row"


def test_graphs_make_way_when_memory_is_short(
    engine: Engine, spies: Spies, headroom: FakeHeadroom, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EmptyGraphs, "bytes_kept", TOTAL // 1000)
    captures(engine, spies)
    kept = engine._kept
    assert kept is not None
    with engine.session() as session:
        assert kept.runner_bytes == TOTAL // 1000
        headroom.taken_bytes = TOTAL - TOTAL // 2000
        session.generate([[3] * 5], PARAMS)
        assert kept.runner_bytes == 0
    headroom.taken_bytes = 0
    assert captures(engine, spies) == 1


def test_a_pool_that_would_grow_too_coarsely_is_made_anew(engine: Engine, spies: Spies, headroom: FakeHeadroom) -> None:
    """Else a call with little memory would find no room for a single slab."""
    captures(engine, spies)
    headroom.taken_bytes = TOTAL - 30 * page_bytes(engine.model)
    assert captures(engine, spies) == 1


def test_graphs_above_the_limit_are_given_back(spies: Spies, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LiveModule, "may_keep_graphs", True)
    model: PreTrainedModel = tiny("llama", num_hidden_layers=1)
    small = with_empty_graphs(Engine(model, None, headroom=FakeHeadroom(10**6), reserve_fraction=0.0))
    assert [captures(small, spies) for _ in range(2)] == [1, 1]


def test_nothing_is_kept_without_a_gpu(spies: Spies) -> None:
    engine = with_empty_graphs(Engine(tiny("llama", num_hidden_layers=1), None))
    assert engine._kept is None
    assert [captures(engine, spies) for _ in range(2)] == [1, 1]
