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

    @property
    def output(self) -> torch.Tensor:
        """What the last replay computed, until the next replay of any graph that shares its memory, or `reset`."""
        ...

    def replay(self) -> None:
        """Launch the step on the device's current stream."""

    def reset(self) -> None:
        """Destroy the graph after its last replay has finished."""


class Graphs(Protocol):
    """Captures steps in graphs that share one memory pool for intermediate tensors and outputs."""

    @property
    def bytes_kept(self) -> int:
        """Size of the shared memory pool."""
        ...

    def warm_up(self, step: Callable[[], object]) -> None:
        """Run ``step`` as it will be captured.

        Raises:
            RuntimeError: the step failed, or it synchronizes with the device, which a graph cannot do.
        """
        ...

    def capture(self, step: Callable[[], torch.Tensor]) -> Graph:
        """Capture the launches of ``step``, which returns its output, without running them.

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

    def warm_up(self, step: Callable[[], object]) -> None:
        """See `Graphs.warm_up`."""
        current, capture_stream = torch.cuda.current_stream(self._device), _stream(self._device)
        capture_stream.wait_stream(current)
        # Libraries allocate a workspace at their first call on a stream: do that here, outside the shared pool.
        try:
            with torch.cuda.stream(capture_stream):
                step()  # compiles and loads kernels, which may synchronize
                with _recording_syncs() as syncs:
                    step()
        finally:
            # Launches of a failed step too read buffers that are freed soon.
            current.wait_stream(capture_stream)
        if syncs:
            raise RuntimeError(f"its forward waits for the device ({syncs[0]})")

    def capture(self, step: Callable[[], torch.Tensor]) -> _CudaGraph:
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
                    output = step()
            except BaseException:
                self._discard(graph)
                raise
        unowned = _unowned(output)
        del output  # its memory is the next capture's, and is not freed while a graph is left in the pool
        self.bytes_kept += torch.cuda.memory_reserved(self._device) - reserved
        return _CudaGraph(graph, self._device, unowned)

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
    output: torch.Tensor

    def replay(self) -> None:
        """See `Graph.replay`."""
        self.graph.replay()

    def reset(self) -> None:
        """See `Graph.reset`."""
        torch.cuda.synchronize(self.device)
        self.graph.reset()


class _Memory:
    """Memory of a tensor on a GPU, for others to read; it does not keep the tensor alive."""

    def __init__(self, tensor: torch.Tensor) -> None:
        size = tensor.element_size()
        self.__cuda_array_interface__ = {
            "shape": tuple(tensor.shape),
            "strides": tuple(stride * size for stride in tensor.stride()),
            "typestr": f"<i{size}",  # the interface knows no bfloat16
            "data": (tensor.data_ptr(), False),
            "version": 2,
        }


def _unowned(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in the same memory that does not own it, so that the allocator may give it to others.

    A step's logits are large: 1,024 rows of 152 thousand numbers in bfloat16 are 311 MB. If each graph owned its own,
    sizes of 1 to 1,024 rows would hold 622 MB, and those with prefills several times that. A copy to memory that all
    graphs share would hold 311 MB twice, and read and write 622 MB in each step: 0.13 ms at 4.8 TB/s.
    """
    return torch.as_tensor(_Memory(tensor), device=tensor.device).view(tensor.dtype)


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
