"""Captures without a GPU: what becomes of one that a driver breaks off."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import pytest
import torch

from rollout.models.runners import cuda_graphs, graph_capture
from rollout.models.runners.graph_capture import CudaGraphs


@dataclass
class Driver:
    """What `CudaGraphs` calls of torch, and in which order."""

    calls: list[str] = field(default_factory=list)
    handles: int = 0
    breaks_off: bool = False
    """Captures cannot be ended."""


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    said = Driver()

    class CUDAGraph:
        def __init__(self) -> None:
            self.ended = False

        def pool(self) -> tuple[int, int]:
            if not self.ended:
                raise RuntimeError("Called CUDAGraph::pool() without a preceding successful capture.")
            return 0, 1

        def reset(self) -> None:
            said.calls.append("reset")

    @contextmanager
    def capture(graph: CUDAGraph, pool: tuple[int, int], **_: object) -> Iterator[None]:
        said.calls.append(f"begin {pool[1]}")
        try:
            yield
        finally:
            if said.breaks_off:
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
            graph.ended = True

    def handle() -> tuple[int, int]:
        said.handles += 1
        return 0, said.handles

    def called(name: str) -> Callable[..., None]:
        return lambda *about: said.calls.append(f"{name} {about[-1][1]}")

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
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", called("end"), raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", called("release"), raising=False)
    monkeypatch.setattr(graph_capture, "_stream", lambda _: None)
    monkeypatch.setattr(graph_capture, "_broken_off", [])
    return said


def fails() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.")


def test_a_capture_that_the_driver_breaks_off_is_over_for_torch_s_allocator(driver: Driver) -> None:
    graphs = CudaGraphs(torch.device("cuda", 0))
    driver.breaks_off = True
    with pytest.raises(RuntimeError, match="previous error") as caught:
        graphs.capture(fails)
    assert isinstance(cuda_graphs._cause(caught.value), torch.OutOfMemoryError)
    assert driver.calls == ["begin 1", "end 1", "release 1"]
    assert len(graph_capture._broken_off) == 1


def test_a_capture_that_fails_and_can_be_ended_leaves_no_graph(driver: Driver) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        CudaGraphs(torch.device("cuda", 0)).capture(fails)
    assert driver.calls == ["begin 1", "reset"]
    assert not graph_capture._broken_off


def test_what_a_step_that_failed_has_launched_is_waited_for(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its buffers are let go of then, and their memory is taken for others in the order of the current stream."""

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            driver.calls.append(f"{self.name} waits for {other.name}")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream("current"))
    monkeypatch.setattr(graph_capture, "_stream", lambda _: Stream("aside"))

    def step() -> torch.Tensor:
        driver.calls.append("step")
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        CudaGraphs(torch.device("cuda", 0)).warm_up(step)
    assert driver.calls == ["aside waits for current", "step", "current waits for aside"]


def test_memory_is_shared_until_it_is_released(driver: Driver) -> None:
    graphs = CudaGraphs(torch.device("cuda", 0))
    for _ in range(2):
        graphs.capture(lambda: None)
    graphs.release()
    graphs.capture(lambda: None)
    assert driver.calls == ["begin 1", "begin 1", "begin 2"]
