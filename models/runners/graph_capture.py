"""Capture steps in CUDA graphs, recover from captures that the driver aborts, and share their memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch

#: Graphs whose captures the driver aborted, kept alive for the rest of the process; see `CudaGraphs._discard`.
_aborted: list[torch.cuda.CUDAGraph] = []


class Graph(Protocol):
    """One captured step."""

    def replay(self) -> None:
        """Launch the step on the device's current stream."""

    def reset(self) -> None:
        """Destroy the graph after its last replay has finished."""


class Graphs(Protocol):
    """Captures steps in graphs that share one memory pool for intermediate tensors."""

    @property
    def bytes_kept(self) -> int:
        """Size of the shared memory pool."""
        ...

    def warm_up(self, step: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run ``step`` as it will be captured; return its result, of which only shape and dtype are meaningful.

        Raises:
            RuntimeError: the step failed, or it synchronizes with the device, which a graph cannot do.
        """
        ...

    def capture(self, step: Callable[[], object]) -> Graph:
        """Capture the launches of ``step`` without running them.

        Raises:
            RuntimeError: the launches cannot be captured.
        """
        ...

    def release(self) -> None:
        """Free the shared memory pool, after all graphs were reset; later captures create a new pool.

        To be called whenever no graph is left, since torch lets no new graph join a pool that no graph is left in.
        """


class CudaGraphs:
    """Implements `Graphs` on a GPU.

    A capture that the driver aborts leaks its graph and needs the repair in `_discard`. Calls that synchronize are
    what aborts captures, so the warm-up runs under torch's synchronization debug mode to find them first.

    Args:
        device: of the pool and the model.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory: Any = None
        self.bytes_kept = 0

    def warm_up(self, step: Callable[[], torch.Tensor]) -> torch.Tensor:
        """See `Graphs.warm_up`."""
        current, capture_stream = torch.cuda.current_stream(self._device), _stream(self._device)
        capture_stream.wait_stream(current)
        # Libraries allocate a workspace at their first call on a stream: do that here, outside the shared pool.
        try:
            with torch.cuda.stream(capture_stream):
                step()  # compiles and loads kernels, which may synchronize
                with _recording_syncs() as syncs:
                    result = step()
        finally:
            # Launches of a failed step too read buffers that are freed soon.
            current.wait_stream(capture_stream)
        if syncs:
            raise RuntimeError(f"its forward waits for the device ({syncs[0]})")
        return result

    def capture(self, step: Callable[[], object]) -> _CudaGraph:
        """See `Graphs.capture`."""
        graph = torch.cuda.CUDAGraph()
        # After a failed capture torch leaves the capture stream current; this restores the caller's.
        with torch.cuda.device(self._device), torch.cuda.stream(torch.cuda.current_stream(self._device)):
            if self._memory is None:
                self._memory = torch.cuda.graph_pool_handle()
            # torch empties the cache when a capture begins; do so first, so that the two readings compare.
            torch.cuda.empty_cache()
            reserved = torch.cuda.memory_reserved(self._device)
            try:
                # thread_local: other threads, such as a trainer's, may keep using the device.
                with torch.cuda.graph(
                    graph, pool=self._memory, stream=_stream(self._device), capture_error_mode="thread_local"
                ):
                    step()
            except BaseException:
                self._discard(graph)
                raise
        self.bytes_kept += torch.cuda.memory_reserved(self._device) - reserved
        return _CudaGraph(graph, self._device)

    def _discard(self, graph: torch.cuda.CUDAGraph) -> None:
        """Discard a graph whose capture failed, on the current device.

        torch does not tell its allocator that an aborted capture has ended (torch 2.11 to 2.13,
        ``CUDAGraph::capture_end``). For the rest of the process the allocator would neither free cached memory nor
        reuse memory that other streams have used, so this ends the capture in the allocator by hand.
        """
        try:
            graph.pool()
        except RuntimeError:  # only a graph whose capture ended has a pool
            device = torch.cuda.current_device()
            torch._C._cuda_endAllocateToPool(device, self._memory)
            torch._C._cuda_releasePool(device, self._memory)
            # The allocator of pinned memory keeps querying the graph and cannot be told to stop.
            _aborted.append(graph)
        else:
            graph.reset()

    def release(self) -> None:
        """See `Graphs.release`."""
        if self._memory is not None:
            self._memory = None
            self.bytes_kept = 0
            # The allocator reuses blocks of a pool without graphs only after its cache was emptied.
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
    """Return the device's only capture stream; libraries keep a workspace for every stream that they ran on."""
    return torch.cuda.Stream(device)


@contextmanager
def _recording_syncs() -> Iterator[list[str]]:
    """Collect the source lines of calls that synchronize, as warnings: errors would also hit other threads."""
    syncs: list[str] = []
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield syncs
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    syncs += [f"{w.filename}:{w.lineno}" for w in caught if "called a synchronizing" in str(w.message)]
