"""Paged attention on a CPU by a compiled kernel, called with ctypes.

The source is ``csrc/paged_attention.c``; `rollout.models.csrc.build` documents how it is built, and
`rollout.models.csrc.threads` which threads run it. If it cannot be built, `kernel` warns once and returns None, and the
engine gathers pages instead.
"""

from __future__ import annotations

import ctypes
from ctypes import addressof, byref, sizeof
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from rollout.models.arrays import IntArray
from rollout.models.attention.base import PagedAttention
from rollout.models.attention.compiled_library import (
    DTYPES,
    Addresses,
    CBatch,
    CCall,
    CLayer,
    CPlan,
    CSizes,
    CTask,
    Kernel,
)
from rollout.models.attention.interface import ScoreParams
from rollout.models.attention.kernel_test import TOLERANCE, Attention, HeadShape, largest_error
from rollout.models.csrc.build import KernelUnavailable, build, try_build
from rollout.models.forward_batch import ForwardBatch
from rollout.models.kv_cache.layout import MaskKind
from rollout.models.kv_cache.page_pool import PagePool

SOURCE = Path(__file__).parents[1] / "csrc" / "paged_attention.c"

#: The enum of ``csrc/attention_call.h``.
_MASK_KINDS = {"full": 0, "window": 1, "chunk": 2}


class CompiledForward:
    """Attention of one forward by the compiled kernel.

    What depends on lengths alone is planned once, for all layers. Not thread-safe.

    Args:
        kernel: the result of `kernel()`.
        pool: holds keys and values; it must not grow or shrink during the forward.
        page_tables: [S, pages] page ids of each sequence, including pages for the new tokens; entries past a
            sequence's end are not read.
        prefix_lens: [S] tokens of each sequence that are already in its pages.
        query_lens: [S] new tokens of each sequence.
        threads: number of threads, by default torch's. Results do not depend on it.

    Raises:
        ValueError: the layout is not supported, or the arrays' shapes do not match.
        IndexError: a page that is written, or read by the first layer, is in no slab.
    """

    def __init__(
        self,
        kernel: Kernel,
        pool: PagePool,
        page_tables: IntArray,
        prefix_lens: IntArray,
        query_lens: IntArray,
        threads: int | None = None,
    ) -> None:
        if not kernel.supports(pool.layout, pool.device):
            raise ValueError(f"The compiled kernel does not support {pool.layout.dtype} on {pool.device}.")
        self._page_tables = np.ascontiguousarray(page_tables, np.int64)
        self._prefix_lens = np.ascontiguousarray(prefix_lens, np.int64)
        self._query_lens = np.ascontiguousarray(query_lens, np.int64)
        if self._page_tables.ndim != 2 or not len(page_tables) == len(prefix_lens) == len(query_lens):
            raise ValueError(
                "page_tables must be [S, pages], prefix_lens and query_lens [S]; "
                f"got {self._page_tables.shape}, {self._prefix_lens.shape} and {self._query_lens.shape}."
            )
        if len(prefix_lens) and (self._prefix_lens.min() < 0 or self._query_lens.min() < 0):
            raise ValueError("prefix_lens and query_lens must not be negative.")
        self._kernel = kernel
        self._pool = pool
        self._layout = pool.layout
        self._addresses = kernel.addresses(pool)
        self._threads = torch.get_num_threads() if threads is None else threads
        self.tokens = int(self._query_lens.sum())
        self._offsets = np.empty(len(self._prefix_lens), np.int64)
        self._slot_mapping = np.empty(self.tokens, np.int64)
        self._batch = CBatch(
            sequences=len(self._prefix_lens),
            width=self._page_tables.shape[1],
            page_size=pool.layout.page_size,
            slab_pages=pool.slab_pages,
            slabs=len(self._addresses.slabs),
            tokens=self.tokens,
            page_tables=self._page_tables.ctypes.data,
            prefix_lens=self._prefix_lens.ctypes.data,
            query_lens=self._query_lens.ctypes.data,
            offsets=self._offsets.ctypes.data,
            slot_mapping=self._slot_mapping.ctypes.data,
        )
        self._plans: dict[tuple[int, int, int, int, MaskKind], CPlan] = {}
        self._sinks: dict[int, torch.Tensor] = {}
        self._plan_arrays: list[np.ndarray[tuple[int, ...], np.dtype[np.generic]]] = []
        # Planning checks the pages, so that `prepare` reads only existing table entries.
        self._plan(self._layer(0, 1), pool.layout.layers[0].mask_kind)
        kernel.prepare(byref(self._batch))

    def __call__(
        self, index: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scores: ScoreParams
    ) -> torch.Tensor:
        """Write the new keys and values of layer ``index`` to their pages, and attend.

        Args:
            index: of the layer in the pool's layout.
            query: [T, heads, key_dim] of the T new tokens, sequence by sequence; any strides.
            key: [T, kv_heads, key_dim]; any strides.
            value: [T, kv_heads, value_dim]; any strides.
            scores: scale, softcap and sinks.

        Returns:
            [T, heads, value_dim], contiguous, in the layout's dtype.

        Raises:
            ValueError: a shape does not match the layer.
            IndexError: a page that the layer reads is in no slab.
        """
        layer, dtype = self._layout.layers[index], self._layout.dtype
        heads = query.shape[1]
        if (
            query.shape != (self.tokens, heads, layer.key_dim)
            or key.shape != (self.tokens, layer.kv_heads, layer.key_dim)
            or value.shape != (self.tokens, layer.kv_heads, layer.value_dim)
            or heads % layer.kv_heads
        ):
            raise ValueError(
                f"Layer {index} takes {self.tokens} tokens, {layer.kv_heads} key heads, a multiple of that in query "
                f"heads, key dim {layer.key_dim} and value dim {layer.value_dim}; "
                f"got {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}."
            )
        query, key, value = (_dense_heads(x, dtype) for x in (query, key, value))
        out = torch.empty((self.tokens, heads, layer.value_dim), dtype=dtype)
        if not self.tokens:
            return out
        call, itemsize = self._call(index, heads, scores), dtype.itemsize
        call.query = query.data_ptr()
        call.key = key.data_ptr()
        call.value = value.data_ptr()
        call.out = out.data_ptr()
        call.query_token, call.query_head = query.stride(0) * itemsize, query.stride(1) * itemsize
        call.key_token, call.key_head = key.stride(0) * itemsize, key.stride(1) * itemsize
        call.value_token, call.value_head = value.stride(0) * itemsize, value.stride(1) * itemsize
        self._kernel.attend(byref(call))
        return out

    def _layer(self, index: int, group: int) -> CLayer:
        addresses = self._addresses
        c_layer = addresses.layers.get((index, group))
        if c_layer is None:
            layer = self._layout.layers[index]
            c_layer = addresses.layers[index, group] = CLayer(
                dtype=DTYPES[self._layout.dtype],
                kv_heads=layer.kv_heads,
                group=group,
                key_dim=layer.key_dim,
                value_dim=layer.value_dim,
                mask_kind=_MASK_KINDS[layer.mask_kind.kind],
                mask_size=layer.mask_kind.size,
                keys=addresses.bases[index, 0].ctypes.data,
                values=addresses.bases[index, 1].ctypes.data,
            )
        return c_layer

    def _call(self, index: int, heads: int, scores: ScoreParams) -> CCall:
        """Return the arguments of the kernel for one layer, without the addresses and strides of its tensors.

        They stay valid as long as this object lives and no later forward asks for the same layer.

        Args:
            index: of the layer in the pool's layout.
            heads: query heads, a multiple of the layer's key heads.
            scores: scale, softcap and sinks.

        Raises:
            ValueError: the sinks are not one a head.
            IndexError: a page that the layer reads is in no slab.
        """
        group = heads // self._layout.layers[index].kv_heads
        layer, calls = self._layer(index, group), self._addresses.calls
        call = calls.get((index, group))
        if call is None:
            call = calls[index, group] = CCall(layer=addressof(layer), parallel=self._kernel.parallel)
        plan = self._plan(layer, self._layout.layers[index].mask_kind)
        call.batch = addressof(self._batch)
        call.plan = addressof(plan)
        call.threads = self._threads
        call.scale = scores.scale
        call.softcap = scores.softcap or 0.0
        call.sinks = None
        if scores.sinks is not None:
            sinks = scores.sinks.detach().to(torch.float32).contiguous()
            if sinks.shape != (heads,):
                raise ValueError(f"sinks must be [{heads}], got {tuple(sinks.shape)}.")
            self._sinks[index] = sinks  # the call holds a bare address
            call.sinks = sinks.data_ptr()
        return call

    @property
    def batch(self) -> CBatch:
        """The sequences of this forward."""
        return self._batch

    @property
    def threads(self) -> int:
        """Number of threads that plans are made for."""
        return self._threads

    @property
    def addresses(self) -> Addresses:
        """Addresses of the pool's slabs; another object after the pool has grown or shrunk."""
        return self._addresses

    def layer(self, index: int, heads: int) -> CLayer:
        """Return one layer as the kernel reads it; it stays valid as long as `addresses`."""
        return self._layer(index, heads // self._layout.layers[index].kv_heads)

    def plan(self, index: int, heads: int) -> CPlan:
        """Return the plan of one layer, valid as long as this object; layers of one shape and mask share it.

        Raises:
            IndexError: a page that the layer reads is in no slab.
        """
        return self._plan(self.layer(index, heads), self._layout.layers[index].mask_kind)

    def _plan(self, layer: CLayer, mask_kind: MaskKind) -> CPlan:
        key = (layer.kv_heads, layer.group, layer.key_dim, layer.value_dim, mask_kind)
        plan = self._plans.get(key)
        if plan is None:
            sizes = CSizes()
            arguments = (byref(self._batch), byref(layer), self._threads, byref(sizes))
            failed = self._kernel.plan(*arguments, None, None)
            if failed:
                raise IndexError(f"Sequence {failed - 1} of the forward needs a page that is in no slab of the pool.")
            tasks = np.empty(max(1, sizes.tasks) * sizeof(CTask), np.uint8)
            pending = np.empty(max(1, sizes.splits), np.int64)
            partials = np.empty(max(1, sizes.partial_floats), np.float32)
            scratch = np.empty(max(1, self._threads) * sizes.scratch_floats, np.float32)
            self._kernel.plan(*arguments, tasks.ctypes.data, pending.ctypes.data)
            # The plan holds bare addresses, so the arrays must live as long as this object.
            self._plan_arrays.extend((tasks, pending, partials, scratch))
            plan = self._plans[key] = CPlan(
                tasks=tasks.ctypes.data,
                pending=pending.ctypes.data,
                partials=partials.ctypes.data,
                scratch=scratch.ctypes.data,
                sizes=sizes,
            )
        return plan


def _dense_heads(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return ``x`` in ``dtype``, with stride 1 in its last dimension."""
    if x.dtype != dtype:
        x = x.to(dtype)
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


# -- loading ---------------------------------------------------------------------------------------------


@cache
def kernel() -> Kernel | None:
    """Return the kernel, built at the first call on a machine; None, with one warning, if it cannot be built."""
    return try_build(SOURCE, _checked)


def load() -> Kernel:
    """Load the kernel, and build it first if needed.

    Raises:
        KernelUnavailable: the kernel cannot be built, or differs from reference attention.
    """
    return build(SOURCE, _checked)


def _checked(library: ctypes.CDLL) -> Kernel:
    """Return the library's kernel after comparing it with reference attention.

    Raises:
        KernelUnavailable: the results differ.
        AttributeError: the library has other entry points.
    """
    loaded = Kernel(library)

    def attention(pool: PagePool, batch: ForwardBatch) -> Attention:
        return _forward(loaded, pool, batch, threads=1)

    for dtype in loaded.dtypes:
        error = largest_error(attention, dtype, (HeadShape(64, 32), HeadShape(13, 20)), torch.device("cpu"))
        if not error <= TOLERANCE[dtype]:
            raise KernelUnavailable(
                f"the compiled kernel differs from reference attention by {error:.2g} in {dtype} "
                f"(tolerance {TOLERANCE[dtype]:g})."
            )
    return loaded


def _forward(compiled: Kernel, pool: PagePool, batch: ForwardBatch, threads: int | None = None) -> CompiledForward:
    return CompiledForward(
        compiled,
        pool,
        page_tables=batch.page_tables,
        prefix_lens=batch.prefix_lens,
        query_lens=batch.query_lens,
        threads=threads,
    )


class CompiledAttention(PagedAttention):
    """Serves one forward by the compiled kernel, which reads pages in place."""

    name: ClassVar[str] = "compiled"

    def __init__(self, pool: PagePool, batch: ForwardBatch, compiled: Kernel) -> None:
        super().__init__(pool, batch)
        self.forward = _forward(compiled, pool, batch)

    def compute(
        self, index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: ScoreParams
    ) -> torch.Tensor:
        """See `PagedAttention.compute`."""
        return self.forward(index, q, k, v, scores)


@dataclass(frozen=True, slots=True)
class CompiledBackend:
    """Attends by the compiled kernel."""

    compiled: Kernel
    name: ClassVar[str] = CompiledAttention.name

    def __call__(self, pool: PagePool, batch: ForwardBatch) -> CompiledAttention:
        return CompiledAttention(pool, batch, self.compiled)
