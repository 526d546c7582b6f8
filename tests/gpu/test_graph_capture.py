"""What captures ask of torch's allocator, and captures that fail."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from rollout.models.runners.graph_capture import CudaGraphs
from tests.support.devices import DEVICE

SIZE = 256 << 20


@pytest.fixture
def numbers() -> torch.Tensor:
    made = torch.arange(1 << 20, dtype=torch.float32, device=DEVICE)
    _ = made * 2  # loads the kernel
    return made


@pytest.fixture
def graphs() -> Iterator[CudaGraphs]:
    made = CudaGraphs(DEVICE)
    yield made
    made.release()


@contextmanager
def memory_limit(size: int) -> Iterator[None]:
    """Let torch get at most ``size`` more bytes from the driver."""
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(DEVICE) + size) / total, DEVICE)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)


def large() -> torch.Tensor:
    return torch.ones(SIZE, dtype=torch.uint8, device=DEVICE)


def test_a_capture_gives_no_cached_memory_back(graphs: CudaGraphs, numbers: torch.Tensor) -> None:
    def step() -> torch.Tensor:
        return numbers * 2

    graphs.warm_up(step)
    torch.cuda.empty_cache()
    cached = large()
    del cached
    reserved, freed = torch.cuda.memory_reserved(DEVICE), torch.cuda.memory_stats(DEVICE)["num_device_free"]
    graph = graphs.capture(step)
    assert torch.cuda.memory_stats(DEVICE)["num_device_free"] == freed
    assert graphs.bytes_kept == torch.cuda.memory_reserved(DEVICE) - reserved > 0
    graph.replay()
    assert torch.equal(graph.output, numbers * 2)
    graph.reset()


def test_a_capture_gets_memory_that_is_cached(graphs: CudaGraphs) -> None:
    graphs.warm_up(large)  # leaves as much in the cache
    with memory_limit(SIZE // 2):
        graph = graphs.capture(large)
    graph.replay()
    assert (graph.output == 1).all()
    graph.reset()


def test_a_capture_out_of_memory_leaves_all_as_it_was(graphs: CudaGraphs, numbers: torch.Tensor) -> None:
    stream = torch.cuda.current_stream(DEVICE)
    kept = graphs.capture(lambda: numbers * 2)
    torch.cuda.empty_cache()
    with memory_limit(SIZE // 2), pytest.raises(torch.OutOfMemoryError):
        graphs.capture(large)
    assert torch.cuda.current_stream(DEVICE) == stream
    other = graphs.capture(lambda: numbers * 3)
    for graph, factor in ((kept, 2), (other, 3)):
        graph.replay()
        assert torch.equal(graph.output, numbers * factor)
        graph.reset()


def test_an_aborted_capture_leaves_all_as_it_was(graphs: CudaGraphs, numbers: torch.Tensor) -> None:
    stream = torch.cuda.current_stream(DEVICE)
    kept = graphs.capture(lambda: numbers * 2)
    with pytest.raises(RuntimeError):
        graphs.capture(lambda: numbers * numbers.sum().item())
    assert torch.cuda.current_stream(DEVICE) == stream
    torch.rand(1, device=DEVICE)
    cached = large()
    reserved = torch.cuda.memory_reserved(DEVICE)
    del cached
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved(DEVICE) <= reserved - SIZE
    others = [graphs.capture(lambda factor=factor: numbers * factor) for factor in (3, 5)]
    for graph, factor in zip((kept, *others), (2, 3, 5), strict=True):
        graph.replay()
        assert torch.equal(graph.output, numbers * factor)
        graph.reset()


class Garbage:
    """Waits for the device when it is collected, which aborts a capture."""

    def __init__(self, finalized: Callable[[], None]) -> None:
        self.itself, self.finalized = self, finalized

    def __del__(self) -> None:
        self.finalized()


def test_garbage_does_not_abort_a_capture(graphs: CudaGraphs, numbers: torch.Tensor) -> None:
    thresholds = gc.get_threshold()

    def step() -> torch.Tensor:
        for _ in range(100):
            Garbage(torch.cuda.synchronize)
        return numbers * 2

    gc.set_threshold(10)
    try:
        graph = graphs.capture(step)
    finally:
        gc.set_threshold(*thresholds)
    graph.replay()
    assert torch.equal(graph.output, numbers * 2)
    graph.reset()
