"""Paged attention on a CPU by a compiled kernel, called with ctypes.

The source is ``csrc/paged_attention.c``; `rollout.models.csrc.build` says how it is built and whose threads
it runs in. Where it cannot be built, `kernel` says why, once, and returns None: the engine then gathers pages instead.
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
from rollout.models.attention.compiled_library import DTYPES, CCall, CPlan, CSite, CSizes, CStep, CTask, Kernel
from rollout.models.attention.interface import ScoreParams
from rollout.models.attention.kernel_test import TOLERANCE, Attention, largest_error
from rollout.models.csrc.build import KernelUnavailable, build, try_build
from rollout.models.forward_batch import ForwardBatch
from rollout.models.kv_cache.layout import AttentionLayer, MaskKind
from rollout.models.kv_cache.page_pool import PagePool

SOURCE = Path(__file__).parents[1] / "csrc" / "paged_attention.c"

_SPANS = {"full": 0, "window": 1, "chunk": 2}


# The structures of `csrc/attention_call.h`, field by field: `CStep` is its `ForwardAttention`.


class CompiledForward:
    """Attention of one forward: a packed batch of sequences, each with its new tokens one after another.

    What depends on lengths alone is planned once, and serves every site. Not for two threads at a time.

    Args:
        kernel: of `kernel()`.
        pool: where keys and values lie; it must not grow or shrink while this is in use.
        tables: [S, pages] page ids of each sequence, those to be written included; entries past a sequence's
            end are not read.
        starts: [S] tokens that each sequence has in its pages.
        lengths: [S] new tokens of each in this forward.
        threads: by default as many as torch uses. Results do not depend on it.

    Raises:
        ValueError: the layout is not supported, or the arrays do not fit each other.
        IndexError: a page that a new token is written to, or that the first site reads, is in no slab.
    """

    def __init__(
        self,
        kernel: Kernel,
        pool: PagePool,
        tables: IntArray,
        starts: IntArray,
        lengths: IntArray,
        threads: int | None = None,
    ) -> None:
        if not kernel.supports(pool.layout, pool.device):
            raise ValueError(f"The compiled kernel does not serve {pool.layout.dtype} on {pool.device}.")
        self._tables, self._starts, self._lengths = (
            np.ascontiguousarray(array, np.int64) for array in (tables, starts, lengths)
        )
        if self._tables.ndim != 2 or not len(self._tables) == len(self._starts) == len(self._lengths):
            raise ValueError("tables must be [S, pages], starts and lengths [S].")
        if len(starts) and (self._starts.min() < 0 or self._lengths.min() < 0):
            raise ValueError("starts and lengths must not be negative.")
        self._kernel, self._pool = kernel, pool
        self._layout = pool.layout
        self._addresses = kernel.addresses(pool)
        self._threads = torch.get_num_threads() if threads is None else threads
        self.tokens = int(self._lengths.sum())
        self._offsets, self._slots = np.empty(len(self._starts), np.int64), np.empty(self.tokens, np.int64)
        self._step = CStep(
            *(len(self._starts), self._tables.shape[1], pool.layout.page_size, pool.slab_pages),
            *(len(self._addresses.slabs), self.tokens),
            *(a.ctypes.data for a in (self._tables, self._starts, self._lengths, self._offsets, self._slots)),
        )
        self._plans: dict[tuple[int, int, int, int, MaskKind], CPlan] = {}
        self._memory: list[np.ndarray[tuple[int, ...], np.dtype[np.generic]]] = []
        # Checks the pages, so that the next line reads only what the table holds.
        self._plan(self._site(0, 1), pool.layout.layers[0].mask_kind)
        kernel.prepare(byref(self._step))

    def __call__(
        self, index: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scores: ScoreParams
    ) -> torch.Tensor:
        """Writes the new keys and values of site ``index`` into their pages, and attends.

        Args:
            index: of the site in the pool's layout.
            query: [T, heads, key_dim], T new tokens in the order of the sequences; any strides.
            key: [T, kv_heads, key_dim]; any strides.
            value: [T, kv_heads, value_dim]; any strides.
            scores: how scores become weights.

        Returns:
            [T, heads, value_dim], contiguous, in the layout's dtype.

        Raises:
            ValueError: a shape is not that of the site.
            IndexError: a page that the site reads is in no slab.
        """
        site, dtype = self._layout.layers[index], self._layout.dtype
        heads = query.shape[1]
        if (
            query.shape != (self.tokens, heads, site.key_dim)
            or key.shape != (self.tokens, site.kv_heads, site.key_dim)
            or value.shape != (self.tokens, site.kv_heads, site.value_dim)
            or heads % site.kv_heads
        ):
            raise ValueError(
                f"Site {index} takes {self.tokens} tokens, {site.kv_heads} key heads or a multiple, dims "
                f"{site.key_dim} and {site.value_dim}; "
                f"got {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}."
            )
        query, key, value = _rows(query, dtype), _rows(key, dtype), _rows(value, dtype)
        out = torch.empty((self.tokens, heads, site.value_dim), dtype=dtype)
        if not self.tokens:
            return out
        group = heads // site.kv_heads
        call, size = self._call(index, group), dtype.itemsize
        call.query, call.key, call.value, call.out = (
            query.data_ptr(),
            key.data_ptr(),
            value.data_ptr(),
            out.data_ptr(),
        )
        token, head, _ = query.stride()
        call.query_token, call.query_head = token * size, head * size
        token, head, _ = key.stride()
        call.key_token, call.key_head = token * size, head * size
        token, head, _ = value.stride()
        call.value_token, call.value_head = token * size, head * size
        call.scale = scores.scale
        call.softcap = scores.softcap or 0.0
        if scores.sinks is None:
            call.sinks = None
        else:
            sinks = scores.sinks.detach().to(torch.float32).contiguous()
            if sinks.shape != (heads,):
                raise ValueError(f"sinks must be [{heads}], got {tuple(sinks.shape)}.")
            call.sinks = sinks.data_ptr()
        self._kernel.attend(byref(call))
        return out

    def _site(self, index: int, group: int) -> CSite:
        addresses = self._addresses
        known = addresses.sites.get((index, group))
        if known is None:
            site: AttentionLayer = self._layout.layers[index]
            keys, values = (addresses.bases[index, which].ctypes.data for which in (0, 1))
            known = addresses.sites[index, group] = CSite(
                *(DTYPES[self._layout.dtype], site.kv_heads, group, site.key_dim, site.value_dim),
                *(_SPANS[site.mask_kind.kind], site.mask_kind.size, keys, values),
            )
        return known

    def _call(self, index: int, group: int) -> CCall:
        site, calls = self._site(index, group), self._addresses.calls
        call = calls.get((index, group))
        if call is None:
            call = calls[index, group] = CCall(site=addressof(site), parallel=self._kernel.parallel)
        plan = self._plan(site, self._layout.layers[index].mask_kind)
        call.step, call.plan, call.threads = addressof(self._step), addressof(plan), self._threads
        return call

    def _plan(self, site: CSite, span: MaskKind) -> CPlan:
        key = (site.kv_heads, site.group, site.key_dim, site.value_dim, span)
        plan = self._plans.get(key)
        if plan is None:
            sizes = CSizes()
            arguments = (byref(self._step), byref(site), self._threads, byref(sizes))
            bad = self._kernel.plan(*arguments, None, None)
            if bad:
                raise IndexError(f"Sequence {bad - 1} of the step needs a page that is in no slab of the pool.")
            tasks = np.empty(max(1, sizes.tasks) * sizeof(CTask), np.uint8)
            pending = np.empty(max(1, sizes.splits), np.int64)
            partials = np.empty(max(1, sizes.partial_floats), np.float32)
            scratch = np.empty(max(1, self._threads) * sizes.scratch_floats, np.float32)
            self._kernel.plan(*arguments, tasks.ctypes.data, pending.ctypes.data)
            arrays = (tasks, pending, partials, scratch)
            self._memory.extend(arrays)
            plan = self._plans[key] = CPlan(*(array.ctypes.data for array in arrays), sizes)
        return plan


def _rows(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``x`` in a dtype, each head's numbers side by side."""
    if x.dtype != dtype:
        x = x.to(dtype)
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


# -- loading ---------------------------------------------------------------------------------------------


@cache
def kernel() -> Kernel | None:
    """The kernel, built if this is its first use on this machine; None, with one warning, where there is none."""
    return try_build(SOURCE, _checked)


def load() -> Kernel:
    """Loads the kernel, and builds it first if need be.

    Raises:
        KernelUnavailable: it cannot be built, or computes something else.
    """
    return build(SOURCE, _checked)


def _checked(library: ctypes.CDLL) -> Kernel:
    """The kernel, if it agrees with plain attention.

    Raises:
        KernelUnavailable: it does not.
        AttributeError: the library is another one.
    """
    loaded = Kernel(library)

    def attention(pool: PagePool, packed: ForwardBatch) -> Attention:
        return CompiledForward(loaded, pool, packed.page_tables, packed.prefix_lens, packed.query_lens, 1)

    for dtype in loaded.dtypes:
        error = largest_error(attention, dtype, ((64, 32), (13, 20)), torch.device("cpu"))
        if not error <= TOLERANCE[dtype]:
            raise KernelUnavailable(f"what it built computes something else in {dtype} (by {error:.2g}).")
    return loaded


class CompiledAttention(PagedAttention):
    """The compiled kernel writes new keys and values and attends to all, page by page, in place."""

    name: ClassVar[str] = "compiled"

    def __init__(self, pool: PagePool, packed: ForwardBatch, compiled: Kernel) -> None:
        super().__init__(pool, packed)
        self._attention = CompiledForward(compiled, pool, packed.page_tables, packed.prefix_lens, packed.query_lens)

    def compute(
        self, index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: ScoreParams
    ) -> torch.Tensor:
        """See `PagedAttention.compute`."""
        return self._attention(index, q, k, v, scores)


@dataclass(frozen=True, slots=True)
class CompiledBackend:
    """Makes steps by the compiled kernel."""

    compiled: Kernel
    name: ClassVar[str] = CompiledAttention.name

    def __call__(self, pool: PagePool, packed: ForwardBatch) -> CompiledAttention:
        return CompiledAttention(pool, packed, self.compiled)
