"""CUDA graphs of attention and of whole models, replayed while buffers are refilled and slabs come and go."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable

import pytest
import torch

from rollout import Engine, SamplingParams
from rollout.models.attention.triton import TritonAttention, TritonBackend
from rollout.models.attention.triton_metadata import MetadataSizes
from rollout.models.kv_cache.page_pool import PagePool
from rollout.models.runners import cuda_graphs, graph_capture, graph_rungs
from rollout.models.runners.cuda_graphs import CudaGraphRunner
from rollout.models.runners.graph_capture import CudaGraphs
from rollout.models.runners.packed import PackedRunner, PackedStrategy
from tests.support.cuda_graph_world import World
from tests.support.devices import DEVICE
from tests.support.paged_sequences import Kind, PagedWorld, Parts
from tests.support.parity import random_prompts
from tests.support.tiny_models import tiny
from tests.support.triton_world import TOLERANCE

_KIND = Kind(2, 6, 128, 128)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_captured_step_serves_other_rows_and_slabs(dtype: torch.dtype) -> None:
    world = PagedWorld([700, 90, 300], dtype, 1, (_KIND,), TOLERANCE[dtype], device=DEVICE, slab_pages=16)
    world.tables = [world.pool.allocate(len(table)) for table in world.tables]
    steps = TritonBackend(world.pool)
    prefill: Parts = [(0, range(690)), (1, range(80)), (2, range(290))]
    world.compare(world.attend(steps(world.pool, world.forward(prefill)).compute, prefill), prefill)

    rows = 4
    buffers = steps.make_metadata(MetadataSizes(decodes=rows, prefills=0, tokens=rows, entries=128))
    shapes = ((12, 128), (2, 128), (2, 128))
    inputs = [torch.zeros(rows, *shape, dtype=dtype, device=DEVICE) for shape in shapes]

    def fill(parts: Parts) -> None:
        buffers.fill(world.forward(parts))
        for memory, source in zip(inputs, (world.queries, world.keys, world.values), strict=True):
            memory.fill_(torch.nan)
            memory[: len(parts)] = world.packed(source, 0, parts)

    def step() -> torch.Tensor:
        return TritonAttention(world.pool, world.forward(first), buffers).compute(0, *inputs, world.scores[0])

    first: Parts = [(0, range(690, 691)), (1, range(80, 81)), (2, range(290, 291))]
    fill(first)
    side = torch.cuda.Stream(DEVICE)
    side.wait_stream(torch.cuda.current_stream(DEVICE))
    with torch.cuda.stream(side):
        step()  # compiles
    torch.cuda.current_stream(DEVICE).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for position in range(1, 9):
        parts = [(s, range(start + position, start + position + 1)) for s, start in ((0, 690), (1, 80), (2, 290))]
        if position % 3 == 0:
            parts = parts[1:]
        if position % 2:
            while world.pool.shrink(world.tables):
                pass
        else:
            world.pool.grow()
        fill(parts)
        graph.replay()
        # A row that misses a step has a gap in its sequence, so only rows in every step are compared to the end.
        compared = [i for i, (sequence, _) in enumerate(parts) if sequence != 0 or position < 3]
        for i in compared:
            world.compare([out[i : i + 1].clone()], [parts[i]])
        assert (out[len(parts) :] == 0).all()


@pytest.fixture(autouse=True)
def steps_are_captured_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_rungs, "EAGER_STEPS", 0)
    monkeypatch.setattr(graph_rungs, "PADDED_STEPS", 0)


def captured_world(dtype: torch.dtype = torch.float32) -> World:
    model = tiny("llama", dtype)
    cuda_graphs._refused.pop(model, None)
    return World(model, texts=24, graphs=CudaGraphs(DEVICE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_captured_model_gives_the_bits_of_the_eager_one(dtype: torch.dtype) -> None:
    """Compare while the pool grows and shrinks."""
    world = captured_world(dtype)
    world.same([(text, 3 + 2 * text) for text in range(24)])
    for rows in (1, 2, 3, 7, 20, 24, 17, 8, 1):
        world.decode(*range(rows))
        world.pools[1].grow()
        world.decode(*range(rows)[::-1])
        while world.pools[1].shrink(world.tables[1]):
            pass
    assert sorted(world.sizes) == [1, 2, 4, 8, 32]
    assert world.runner.bytes_kept > 0
    world.runner.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captured_steps_with_prefills_give_what_eager_ones_do(dtype: torch.dtype) -> None:
    world = captured_world(dtype)
    world.same([(text, 3 + 2 * text) for text in range(12)])
    world.same([(0, 1), (12, 70), (1, 1), (13, 9)])
    world.decode(*range(14))
    world.same([(2, 40), (14, 2), (3, 1)])
    world.same([(15, 100), (0, 1)])
    assert sum(rung.mixed for rung in world.rungs) >= 3
    world.runner.close()


def test_graphs_share_the_memory_of_their_outputs() -> None:
    graphs, numbers = CudaGraphs(DEVICE), torch.arange(1 << 24, dtype=torch.float32, device=DEVICE)
    steps = [lambda factor=factor: numbers * factor for factor in (2.0, 3.0, 5.0)]
    graphs.warm_up(steps[0])
    captured = [graphs.capture(step) for step in steps]
    assert graphs.bytes_kept < 2 * numbers.nbytes
    for graph, step in zip(captured, steps, strict=True):
        graph.replay()
        assert torch.equal(graph.output, step())
    for graph in captured:
        graph.reset()
    graphs.release()


def test_memory_of_graphs_is_given_back() -> None:
    """Libraries allocate memory for the capture stream once, in the first round."""
    held = []
    for _ in range(3):
        world = captured_world()
        world.same([(text, 3) for text in range(24)])
        for rows in (1, 8, 24):
            world.decode(*range(rows))
        world.runner.close()
        assert world.runner.bytes_kept == 0
        del world
        gc.collect()
        torch.cuda.empty_cache()
        held.append((torch.cuda.memory_allocated(DEVICE), torch.cuda.memory_reserved(DEVICE)))
    assert held[1] == held[2]


@pytest.mark.parametrize(
    ("wait", "seen"),
    [
        (lambda x: x.sum().item(), True),
        (lambda x: x.nonzero(), True),
        (lambda _: torch.cuda.synchronize(), False),  # torch does not watch for it, so the capture fails
    ],
)
def test_a_model_that_waits_for_the_device_goes_on_eagerly(
    wait: Callable[[torch.Tensor], object], seen: bool, caplog: pytest.LogCaptureFixture
) -> None:
    world = captured_world()
    world.model.model.layers[1].register_forward_pre_hook(lambda _module, given: (wait(given[0]), None)[1])
    world.same([(0, 4), (1, 9)])
    stream, mode = torch.cuda.current_stream(DEVICE), torch.cuda.get_sync_debug_mode()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            world.decode(0, 1)
    assert caplog.text.count("are not captured in CUDA graphs") == 1
    assert ("waits for the device" in caplog.text) == seen
    assert (torch.cuda.current_stream(DEVICE), torch.cuda.get_sync_debug_mode()) == (stream, mode)
    assert world.runner.bytes_kept == 0
    # Other batch sizes are still captured.
    other = captured_world()
    other.same([(0, 4)])
    other.decode(0)
    assert other.sizes == [1]
    other.runner.close()


def test_an_engine_replays_graphs_and_draws_what_it_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = tiny("llama"), random_prompts(7, 40)
    params = SamplingParams(n=2, max_new_tokens=40, ignore_eos=True)
    replays: list[int] = []
    replay = graph_capture._CudaGraph.replay

    def counted(self: graph_capture._CudaGraph) -> None:
        replays.append(1)
        replay(self)

    monkeypatch.setattr(graph_capture._CudaGraph, "replay", counted)
    found = [record.completion_ids for record in Engine(model, None).generate(prompts, params)]
    assert len(replays) >= 30

    def eager(self: PackedStrategy, pool: PagePool) -> PackedRunner:
        return PackedRunner(self.model, pool, TritonBackend(pool))

    monkeypatch.setattr(PackedStrategy, "runner", eager)
    replays.clear()
    expected = [record.completion_ids for record in Engine(model, None).generate(prompts, params)]
    assert not replays
    assert found == expected


def test_a_gpu_s_runner_captures() -> None:
    strategy = PackedStrategy(tiny("llama"))
    assert isinstance(strategy.runner(PagePool(strategy.kv_layout(), 4, DEVICE)), CudaGraphRunner)
