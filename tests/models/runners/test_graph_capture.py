"""Graph capture without a GPU: what it asks of torch, and captures that fail."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.torch_version import TorchVersion

from rollout.models.runners import graph_capture
from rollout.models.runners.graph_capture import CudaGraphs, root_cause

DEVICE = torch.device("cuda", 0)


@dataclass
class Driver:
    """Records the calls of `CudaGraphs` to torch, in order."""

    calls: list[str] = field(default_factory=list)
    handles: int = 0
    refuses: bool = False
    """Beginning a capture fails."""
    aborts: bool = False
    """Ending a capture fails."""
    stream: str = "current"
    segments: dict[int, list[int]] = field(default_factory=dict)
    """Bytes of the segments of each pool."""


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    fake = Driver()

    class CUDAGraph:
        def __init__(self) -> None:
            self.ended = False

        def capture_begin(self, pool: tuple[int, int], capture_error_mode: str) -> None:
            assert (fake.stream, capture_error_mode) == ("capture", "thread_local")
            fake.calls.append(f"begin {pool[1]}")
            if fake.refuses:
                raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

        def capture_end(self) -> None:
            assert fake.stream == "capture"
            if fake.aborts:
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
            self.ended = True

        def pool(self) -> tuple[int, int]:
            if not self.ended:
                raise RuntimeError("Called CUDAGraph::pool() without a preceding successful capture.")
            return 0, 1

        def reset(self) -> None:
            fake.calls.append("reset")

    class Generator:
        def clone_state(self) -> str:
            return "a copy"

        def graphsafe_set_state(self, state: str) -> None:
            fake.calls.append(f"generator takes {state}")

    @contextmanager
    def on_stream(stream: str) -> Iterator[None]:
        before, fake.stream = fake.stream, stream
        try:
            yield
        finally:
            fake.stream = before

    def handle() -> tuple[int, int]:
        fake.handles += 1
        return 0, fake.handles

    def snapshot(pool: tuple[int, int], include_traces: bool) -> list[dict[str, int]]:
        assert not include_traces
        return [{"total_size": size} for size in fake.segments.get(pool[1], [])]

    def called(name: str) -> Callable[..., None]:
        return lambda *arguments: fake.calls.append(f"{name} {arguments[-1][1]}")

    for name, stand_in in (
        ("CUDAGraph", CUDAGraph),
        ("graph_pool_handle", handle),
        ("stream", on_stream),
        ("current_device", lambda: 0),
        ("default_generators", [Generator()]),
        ("memory_snapshot", snapshot),
        ("empty_cache", lambda: fake.calls.append("empty")),
        ("synchronize", lambda _: fake.calls.append("synchronize")),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch, "as_tensor", as_tensor)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", called("end"), raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", called("release"), raising=False)
    monkeypatch.setattr(graph_capture, "_stream", lambda _: "capture")
    monkeypatch.setattr(graph_capture, "_aborted", [])
    return fake


def as_tensor(memory: Any, device: torch.device) -> torch.Tensor:
    """Read memory of the CPU as torch reads a GPU's: NumPy's interface differs in name and version alone."""
    described = SimpleNamespace(__array_interface__=memory.__cuda_array_interface__ | {"version": 3})
    return torch.from_numpy(np.asarray(described))


def nothing() -> torch.Tensor:
    return torch.zeros(0)


def lacks_memory() -> torch.Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory.")


def fails() -> torch.Tensor:
    raise RuntimeError("operation not permitted when stream is capturing")


def test_a_capture_neither_waits_nor_frees(driver: Driver) -> None:
    CudaGraphs(DEVICE).capture(nothing)
    assert (driver.calls, driver.stream) == (["begin 1"], "current")


def test_aborted_capture_is_ended_in_the_allocator_of_torch(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.12.0"))
    driver.aborts = True
    with pytest.raises(RuntimeError, match="previous error") as caught:
        CudaGraphs(DEVICE).capture(fails)
    assert str(root_cause(caught.value, None)) == "operation not permitted when stream is capturing"
    assert (driver.calls, driver.stream) == (["begin 1", "end 1", "release 1"], "current")
    assert len(graph_capture._aborted) == 1


def test_torch_2_11_may_draw_again_after_an_aborted_capture(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.11.0+cu130"))
    driver.aborts = True
    with pytest.raises(RuntimeError, match="previous error"):
        CudaGraphs(DEVICE).capture(fails)
    assert driver.calls == ["begin 1", "end 1", "release 1", "generator takes a copy"]


def test_capture_that_does_not_begin_is_ended_in_the_allocator_of_torch(driver: Driver) -> None:
    driver.refuses = True
    with pytest.raises(RuntimeError, match="not permitted"):
        CudaGraphs(DEVICE).capture(nothing)
    assert (driver.calls[:3], driver.stream) == (["begin 1", "end 1", "release 1"], "current")


def test_failed_capture_that_can_be_ended_resets_its_graph(driver: Driver) -> None:
    with pytest.raises(RuntimeError, match="not permitted"):
        CudaGraphs(DEVICE).capture(fails)
    assert (driver.calls, driver.stream) == (["begin 1", "reset"], "current")
    assert not graph_capture._aborted


@pytest.mark.parametrize("aborts", [False, True])
def test_capture_out_of_memory_is_repeated_once_after_the_cache_was_emptied(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, aborts: bool
) -> None:
    """By then nothing holds the tensors of the failed step."""
    made: list[weakref.ref[torch.Tensor]] = []

    def empty_cache() -> None:
        assert [tensor() for tensor in made] == [None]
        driver.calls.append("empty")
        driver.aborts = False

    def step() -> torch.Tensor:
        output = torch.zeros(3)
        made.append(weakref.ref(output))
        return output if len(made) > 1 else lacks_memory()

    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    driver.aborts = aborts
    CudaGraphs(DEVICE).capture(step)
    discarded = ["end 1", "release 1"] if aborts else ["reset"]
    assert [call for call in driver.calls if "generator" not in call] == ["begin 1", *discarded, "empty", "begin 2"]


def test_capture_out_of_memory_twice_fails(driver: Driver) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        CudaGraphs(DEVICE).capture(lacks_memory)
    assert driver.calls == ["begin 1", "reset", "empty", "begin 2", "reset"]


@pytest.mark.usefixtures("driver")
def test_out_of_memory_that_the_caller_was_handling_is_no_cause() -> None:
    tried: list[int] = []

    def step() -> torch.Tensor:
        tried.append(1)
        return fails()

    try:
        lacks_memory()
    except torch.OutOfMemoryError:
        with pytest.raises(RuntimeError, match="not permitted"):
            CudaGraphs(DEVICE).capture(step)
    assert len(tried) == 1


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_is_not_collected_during_a_capture(enabled: bool) -> None:
    seen: list[bool] = []

    def step() -> torch.Tensor:
        seen.append(gc.isenabled())
        return nothing() if len(seen) == 1 else fails()

    graphs, before = CudaGraphs(DEVICE), gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        graphs.capture(step)
        assert gc.isenabled() == enabled
        with pytest.raises(RuntimeError, match="not permitted"):
            graphs.capture(step)
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()
    assert seen == [False, False]


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
        CudaGraphs(DEVICE).warm_up(step)
    assert driver.calls == ["capture waits for current", "step", "current waits for capture"]


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_is_the_memory_of_the_step_and_does_not_own_it(dtype: torch.dtype) -> None:
    graphs, memory = CudaGraphs(DEVICE), torch.arange(12).to(dtype)
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
    graphs = CudaGraphs(DEVICE)
    for _ in range(2):
        graphs.capture(nothing)
    graphs.release()
    graphs.capture(nothing)
    assert driver.calls == ["begin 1", "begin 1", "synchronize", "empty", "begin 2"]


def test_no_capture_joins_memory_that_no_graph_is_left_in(driver: Driver) -> None:
    graphs = CudaGraphs(DEVICE)
    first, second = (graphs.capture(nothing) for _ in range(2))
    first.reset()
    graphs.capture(nothing).reset()
    second.reset()
    graphs.capture(nothing)
    assert [call for call in driver.calls if "begin" in call] == ["begin 1"] * 3 + ["begin 2"]


def test_no_capture_joins_memory_that_one_was_aborted_in(driver: Driver) -> None:
    """The allocator of pinned memory takes it for underway and raises."""
    graphs = CudaGraphs(DEVICE)
    driver.segments = {1: [2 << 20, 20 << 20], 2: [2 << 20], 3: [1]}
    graphs.capture(nothing)
    assert graphs.bytes_kept == 22 << 20
    driver.aborts = True
    with pytest.raises(RuntimeError, match="previous error"):
        graphs.capture(fails)
    driver.aborts = False
    for _ in range(2):
        graphs.capture(nothing)
    assert [call for call in driver.calls if "begin" in call] == ["begin 1"] * 2 + ["begin 2"] * 2
    assert graphs.bytes_kept == 24 << 20
    graphs.release()
    assert graphs.bytes_kept == 0
