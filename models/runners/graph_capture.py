"""Capture steps in CUDA graphs, recover from captures that the driver aborts, and share their memory."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch

from rollout.models.device import is_out_of_memory
from rollout.models.garbage import without_collections

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
    """Captures steps in graphs that share memory for intermediate tensors and outputs."""

    @property
    def bytes_kept(self) -> int:
        """Size of the shared memory."""
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
        """Free the shared memory, after all graphs were reset; later captures create a new pool."""


class CudaGraphs:
    """Implements `Graphs` on a GPU.

    Captures begin and end on the graph itself: `torch.cuda.graph` waits for the device and empties the allocators'
    caches first, so that the next eager steps would have to allocate from the driver again.

    A capture that the driver aborts leaks its graph and needs the repair in `_discard`. Calls that synchronize are
    what aborts captures, so the warm-up runs under torch's synchronization debug mode to find them first.

    Args:
        device: of the pool and the model.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pools: list[_Pool] = []
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
        handled = sys.exception()
        try:
            return self._capture(step)
        except RuntimeError as error:
            if not is_out_of_memory(root_cause(error, handled)):
                raise
        # When the driver has no memory left, the allocator frees what it has cached, but not during a capture. Only
        # now is the error gone, whose traceback held the tensors of the failed step.
        torch.cuda.empty_cache()
        return self._capture(step)

    def _capture(self, step: Callable[[], torch.Tensor]) -> _CudaGraph:
        graph, pool = torch.cuda.CUDAGraph(), self._pool_to_join()
        # Nothing runs in a capture, so it need not wait for the current stream, where the step's inputs are filled.
        # A collection may finalize anything: a Triton kernel, for one, unloads its code then, and the driver aborts the
        # capture of a thread that does so. vLLM and SGLang, which capture all sizes at once, collect before that and
        # freeze what is left. Here captures come one by one, and a collection would take longer than one.
        with torch.cuda.stream(_stream(self._device)), without_collections():
            try:
                # thread_local: other threads, such as a trainer's, may keep using the device.
                graph.capture_begin(pool=pool.handle, capture_error_mode="thread_local")
                try:
                    output = step()
                finally:
                    graph.capture_end()
            except BaseException:
                self._discard(graph, pool)
                raise
        unowned = _unowned(output)
        del output  # its memory is the next capture's, and is not freed while a graph is left in the pool
        pool.graphs += 1
        self.bytes_kept = sum(shared.bytes_held for shared in self._pools)
        return _CudaGraph(graph, self._device, unowned, pool)

    def _pool_to_join(self) -> _Pool:
        """Return the pool of earlier captures, or a new one where torch lets no capture join that."""
        self._pools = [pool for pool in self._pools if pool.graphs]  # the allocator may free the others
        if not self._pools or self._pools[-1].aborted:
            self._pools.append(_Pool(torch.cuda.graph_pool_handle()))
        return self._pools[-1]

    def _discard(self, graph: torch.cuda.CUDAGraph, pool: _Pool) -> None:
        """Discard a graph whose capture failed, on the current device.

        Where the driver aborts a capture, ``CUDAGraph::capture_end`` raises before it tells the rest of torch that the
        capture has ended (torch 2.11 to 2.13). For the rest of the process the allocator would neither free cached
        memory nor reuse memory that other streams have used, so this ends the capture there by hand.
        """
        try:
            graph.pool()
        except RuntimeError:  # only a graph whose capture ended has a pool
            # The allocator of pinned memory keeps querying the graph and cannot be told to stop.
            _aborted.append(graph)
            pool.aborted = True
            device = torch.cuda.current_device()
            torch._C._cuda_endAllocateToPool(device, pool.handle)
            torch._C._cuda_releasePool(device, pool.handle)
            if torch.__version__ < "2.12":
                # The default generator too would refuse to draw; the copy has its seed and offset.
                generator = torch.cuda.default_generators[device]
                generator.graphsafe_set_state(generator.clone_state())
        else:
            graph.reset()

    def release(self) -> None:
        """See `Graphs.release`."""
        if self._pools:
            self._pools.clear()
            self.bytes_kept = 0
            # The allocator reuses blocks of a pool without graphs only after its cache was emptied.
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()


@dataclass(slots=True)
class _Pool:
    """Memory that captures share."""

    handle: Any
    """Torch's name of it."""
    graphs: int = 0
    """Graphs that use it; torch lets no capture join a pool that its last graph has left."""
    aborted: bool = False
    """A capture was aborted in it. torch's allocator of pinned memory holds that to last, and refuses another."""

    @property
    def bytes_held(self) -> int:
        """Size of what the allocator got from the driver for it."""
        segments = torch.cuda.memory_snapshot(self.handle, include_traces=False)
        return sum(segment["total_size"] for segment in segments)


@dataclass(frozen=True, slots=True)
class _CudaGraph:
    graph: torch.cuda.CUDAGraph
    device: torch.device
    output: torch.Tensor
    pool: _Pool

    def replay(self) -> None:
        """See `Graph.replay`."""
        self.graph.replay()

    def reset(self) -> None:
        """See `Graph.reset`."""
        torch.cuda.synchronize(self.device)
        self.graph.reset()
        self.pool.graphs -= 1


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


def root_cause(error: BaseException, handled: BaseException | None) -> BaseException:
    """Return the first error of a chain, out-of-memory errors before all others.

    Ending a failed capture raises a second error.

    Args:
        handled: what the caller was handling before the capture began; it and what led to it are no cause.
    """
    chain = [error]
    while (context := chain[-1].__context__) not in (None, handled):
        assert context is not None
        chain.append(context)
    return next(filter(is_out_of_memory, chain), chain[-1])
