"""Capture of steps in CUDA graphs: what a driver may do to a capture, and the memory that captures share."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch

#: Graphs whose captures the driver has broken off, see `CudaGraphs`.
_broken_off: list[torch.cuda.CUDAGraph] = []


class Graph(Protocol):
    """One captured step."""

    def replay(self) -> None:
        """Launches it in the order of the device's current stream."""

    def reset(self) -> None:
        """Lets go of it, after the last replay has come to its end."""


class Graphs(Protocol):
    """Captures steps. All share one memory for what is alive only within a step."""

    @property
    def bytes_kept(self) -> int:
        """What that memory takes."""
        ...

    def warm_up(self, step: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Runs ``step`` as it will be captured; returns its result, to be looked at for its shape and dtype alone.

        Raises:
            RuntimeError: it fails, or it waits for the device, which nothing in a graph can do.
        """
        ...

    def capture(self, step: Callable[[], object]) -> Graph:
        """The launches of ``step``, which are not carried out now.

        Raises:
            RuntimeError: they cannot be captured.
        """
        ...

    def release(self) -> None:
        """Gives all memory back; all graphs have been reset. The next ones share another."""


class CudaGraphs:
    """See `Graphs`.

    A capture that the driver breaks off costs what is done about it in `_end`, and its graph for good. So a step is
    tried out first, with torch's own watch for calls that wait for the device, which is what breaks captures off.

    Args:
        device: of the pool and the model.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory: Any = None
        self.bytes_kept = 0

    def warm_up(self, step: Callable[[], torch.Tensor]) -> torch.Tensor:
        """See `Graphs.warm_up`."""
        current, aside = torch.cuda.current_stream(self._device), _stream(self._device)
        aside.wait_stream(current)
        # Libraries take memory of their own for each stream, once: now, and not from the graphs' shared one.
        try:
            with torch.cuda.stream(aside):
                step()  # kernels are compiled and loaded, which may wait
                with _seeing_waits() as waits:
                    result = step()
        finally:
            # Also what a step that failed has launched reads buffers that will be let go of.
            current.wait_stream(aside)
        if waits:
            raise RuntimeError(f"its forward waits for the device ({waits[0]})")
        return result

    def capture(self, step: Callable[[], object]) -> _CudaGraph:
        """See `Graphs.capture`."""
        graph = torch.cuda.CUDAGraph()
        # torch leaves the stream of a capture that fails as the current one.
        with torch.cuda.device(self._device), torch.cuda.stream(torch.cuda.current_stream(self._device)):
            if self._memory is None:
                self._memory = torch.cuda.graph_pool_handle()
            # As entering a capture does, so that what is there before and after can be compared.
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved(self._device)
            try:
                # Other threads, a trainer's, may go on using the device.
                with torch.cuda.graph(
                    graph, pool=self._memory, stream=_stream(self._device), capture_error_mode="thread_local"
                ):
                    step()
            except BaseException:
                self._end(graph)
                raise
        self.bytes_kept += torch.cuda.memory_reserved(self._device) - before
        return _CudaGraph(graph, self._device)

    def _end(self, graph: torch.cuda.CUDAGraph) -> None:
        """Lets go of a graph whose capture failed, on the current device.

        Of a capture that the driver has broken off, torch's allocator is not told that it is over (torch 2.11 to 2.13,
        ``CUDAGraph::capture_end``): for the rest of the process it would neither give back what it caches nor reuse
        what other streams have used.
        """
        try:
            graph.pool()
        except RuntimeError:  # it has one only when its capture was ended
            device = torch.cuda.current_device()
            torch._C._cuda_endAllocateToPool(device, self._memory)
            torch._C._cuda_releasePool(device, self._memory)
            # What the allocator of pinned memory cannot be told, and asks at every turn, is the graph itself.
            _broken_off.append(graph)
        else:
            graph.reset()

    def release(self) -> None:
        """See `Graphs.release`."""
        if self._memory is not None:
            self._memory, self.bytes_kept = None, 0
            # Blocks of a pool that no graph uses serve nobody until they are given back.
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()


@dataclass(frozen=True, slots=True)
class _CudaGraph:
    graph: torch.cuda.CUDAGraph
    device: torch.device

    def replay(self) -> None:
        """See `Graph.replay`."""
        self.graph.replay()

    def reset(self) -> None:
        """See `Graph.reset`."""
        torch.cuda.synchronize(self.device)
        self.graph.reset()


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The only one for captures: libraries keep memory for each stream that they have been called on."""
    return torch.cuda.Stream(device)


@contextmanager
def _seeing_waits() -> Iterator[list[str]]:
    """Collects the places of calls that wait for the device. Warnings and not errors, which would hit other threads."""
    places: list[str] = []
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    places += [f"{w.filename}:{w.lineno}" for w in caught if "called a synchronizing" in str(w.message)]
