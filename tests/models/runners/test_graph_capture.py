"""Graph capture without a GPU: captures that the driver aborts."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rollout.models.runners import cuda_graphs, graph_capture
from rollout.models.runners.graph_capture import CudaGraphs


@dataclass
class Driver:
    """Records the calls of `CudaGraphs` to torch, in order."""

    calls: list[str] = field(default_factory=list)
    handles: int = 0
    aborts: bool = False
    """Ending a capture fails."""


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    fake = Driver()

    class CUDAGraph:
        def __init__(self) -> None:
            self.ended = False

        def pool(self) -> tuple[int, int]:
            if not self.ended:
                raise RuntimeError("Called CUDAGraph::pool() without a preceding successful capture.")
            return 0, 1

        def reset(self) -> None:
            fake.calls.append("reset")

    @contextmanager
    def capture(graph: CUDAGraph, pool: tuple[int, int], **_: object) -> Iterator[None]:
        fake.calls.append(f"begin {pool[1]}")
        try:
            yield
        finally:
            if fake.aborts:
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
            graph.ended = True

    def handle() -> tuple[int, int]:
        fake.handles += 1
        return 0, fake.handles

    def called(name: str) -> Callable[..., None]:
        return lambda *arguments: fake.calls.append(f"{name} {arguments[-1][1]}")

    for name, stand_in in (
        ("CUDAGraph", CUDAGraph),
        ("graph", capture),
        ("graph_pool_handle", handle),
        ("device", lambda _: nullcontext()),
        ("stream", lambda _: nullcontext()),
        ("current_stream", lambda _: None),
        ("current_device", lambda: 0),
        ("memory_reserved", lambda _: 0),
        ("empty_cache", lambda: None),
        ("synchronize", lambda _: None),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch, "as_tensor", as_tensor)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", called("end"), raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", called("release"), raising=False)
    monkeypatch.setattr(graph_capture, "_stream", lambda _: None)
    monkeypatch.setattr(graph_capture, "_aborted", [])
    return fake


def as_tensor(memory: Any, device: torch.device) -> torch.Tensor:
    """Read memory of the CPU as torch reads a GPU's: NumPy's interface differs in name and version alone."""
    described = SimpleNamespace(__array_interface__=memory.__cuda_array_interface__ | {"version": 3})
    return torch.from_numpy(np.asarray(described))


def nothing() -> torch.Tensor:
    return torch.zeros(0)


def fails() -> torch.Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory.")


def test_aborted_capture_is_ended_in_the_allocator_of_torch(driver: Driver) -> None:
    graphs = CudaGraphs(torch.device("cuda", 0))
    driver.aborts = True
    with pytest.raises(RuntimeError, match="previous error") as caught:
        graphs.capture(fails)
    assert isinstance(cuda_graphs._root_cause(caught.value, None), torch.OutOfMemoryError)
    assert driver.calls == ["begin 1", "end 1", "release 1"]
    assert len(graph_capture._aborted) == 1


def test_failed_capture_that_can_be_ended_resets_its_graph(driver: Driver) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        CudaGraphs(torch.device("cuda", 0)).capture(fails)
    assert driver.calls == ["begin 1", "reset"]
    assert not graph_capture._aborted


def test_current_stream_waits_for_launches_of_a_failed_step(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step's buffers are freed next, and the current stream may reuse their memory."""

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            driver.calls.append(f"{self.name} waits for {other.name}")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream("current"))
    monkeypatch.setattr(graph_capture, "_stream", lambda _: Stream("capture"))

    def step() -> torch.Tensor:
        driver.calls.append("step")
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        CudaGraphs(torch.device("cuda", 0)).warm_up(step)
    assert driver.calls == ["capture waits for current", "step", "current waits for capture"]


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_is_the_memory_of_the_step_and_does_not_own_it(dtype: torch.dtype) -> None:
    graphs, memory = CudaGraphs(torch.device("cuda", 0)), torch.arange(12).to(dtype)
    made: list[weakref.ref[torch.Tensor]] = []

    def step() -> torch.Tensor:
        logits = memory.view(3, 4)[:, 1:]
        made.append(weakref.ref(logits))
        return logits

    graph = graphs.capture(step)
    assert made[0]() is None
    assert (graph.output.dtype, graph.output.data_ptr()) == (dtype, memory[1:].data_ptr())
    memory.add_(100)
    assert graph.output.tolist() == [[101, 102, 103], [105, 106, 107], [109, 110, 111]]


def test_captures_share_memory_until_release(driver: Driver) -> None:
    graphs = CudaGraphs(torch.device("cuda", 0))
    for _ in range(2):
        graphs.capture(nothing)
    graphs.release()
    graphs.capture(nothing)
    assert driver.calls == ["begin 1", "begin 1", "begin 2"]
