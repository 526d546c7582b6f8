"""Attention in a CUDA graph, replayed while its buffers are refilled and slabs come and go."""

from __future__ import annotations

import pytest
import torch

from rollout.models.step_buffers import Room
from rollout.models.triton_attention import TritonStep, TritonSteps
from tests.devices import DEVICE
from tests.paged_world import Kind, PagedWorld, Parts
from tests.test_triton_attention import TOLERANCE

_KIND = Kind(2, 6, 128, 128)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_captured_step_serves_other_rows_and_slabs(dtype: torch.dtype) -> None:
    world = PagedWorld([700, 90, 300], dtype, 1, (_KIND,), TOLERANCE[dtype], device=DEVICE, slab_pages=16)
    world.tables = [world.pool.allocate(len(table)) for table in world.tables]
    steps = TritonSteps(world.pool)
    prefill: Parts = [(0, range(690)), (1, range(80)), (2, range(290))]
    world.compare(world.attend(steps(world.pool, world.forward(prefill)).compute, prefill), prefill)

    rows = 4
    buffers = steps.buffers(Room(singles=rows, segments=0, tokens=rows, entries=128))
    shapes = ((12, 128), (2, 128), (2, 128))
    inputs = [torch.zeros(rows, *shape, dtype=dtype, device=DEVICE) for shape in shapes]

    def fill(parts: Parts) -> None:
        buffers.fill(world.forward(parts))
        for memory, source in zip(inputs, (world.queries, world.keys, world.values), strict=True):
            memory.fill_(torch.nan)
            memory[: len(parts)] = world.packed(source, 0, parts)

    def step() -> torch.Tensor:
        return TritonStep(world.pool, world.forward(first), buffers).compute(0, *inputs, world.scores[0])

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
        # A row that sits a step out has a hole in its text: only those that never do are compared to the end.
        compared = [i for i, (sequence, _) in enumerate(parts) if sequence != 0 or position < 3]
        for i in compared:
            world.compare([out[i : i + 1].clone()], [parts[i]])
        assert (out[len(parts) :] == 0).all()
