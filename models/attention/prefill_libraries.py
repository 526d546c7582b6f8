"""Attention functions of other packages, for prefills on a GPU.

Both are FlashAttention 2 (Dao, arXiv 2307.08691) where nothing else was activated: a program computes a tile of one
sequence's queries over all their keys, block after block from that sequence's own beginning, so that a sequence's
numbers do not depend on its company. They would where keys are split among programs by how many there are in the
batch; with several queries a sequence FlashAttention 2 does not, and torch is told not to.

FlashInfer is not among them. It chooses the size of its tiles by the mean length of the sequences in a batch
(``FA2DetermineCtaTileQ``), and with it the order in which it sums, so numbers depend on company; and its plans lie in
pinned memory that the next plan overwrites, while here the device may not have read the last one yet.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, ClassVar

import torch

from rollout.models.attention.gather import GatherAttention
from rollout.models.attention.interface import ScoreParams
from rollout.models.attention.kernel_test import TOLERANCE, Attention, largest_error
from rollout.models.attention.prefill import PrefillAttention, VarlenFunction, VarlenMetadata
from rollout.models.device import is_out_of_memory
from rollout.models.errors import UnsupportedAttention, clause
from rollout.models.forward_batch import ForwardBatch
from rollout.models.kv_cache.layout import KVLayout, MaskKind
from rollout.models.kv_cache.page_pool import PagePool

DTYPES = (torch.bfloat16, torch.float16)
LARGEST_DIM = 256
"""Of a head."""
LEAST_CAPABILITY = (8, 0)
"""Of a GPU."""
_TRIED_WINDOW = 9


class Varlen:
    """``torch.nn.attention.varlen.varlen_attn``, of torch 2.11 or later.

    Args:
        function: that function.
    """

    name: ClassVar[str] = "varlen"
    module: ClassVar[str] = "torch.nn.attention.varlen"
    function: ClassVar[str] = "varlen_attn"

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        known = inspect.signature(function).parameters
        # torch 2.11 takes neither.
        self._shares_keys = "enable_gqa" in known
        self._options: dict[str, Any] = {"num_splits": 1} if "num_splits" in known else {}

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        packing: VarlenMetadata,
        span: MaskKind,
        scores: ScoreParams,
    ) -> torch.Tensor:
        """See `VarlenFunction.attend`."""
        _refuse_sinks(self.name, scores)
        if scores.softcap is not None:
            raise UnsupportedAttention(self.name, "it has no softcap, and the model caps its attention scores")
        options, group = self._options, q.shape[1] // k.shape[1]
        if group > 1 and self._shares_keys:
            options = options | {"enable_gqa": True}
        elif group > 1:
            k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        out: torch.Tensor = self._function(
            *(_rows(x) for x in (q, k, v)),
            packing.cu_seqlens_q,
            packing.cu_seqlens_k,
            packing.max_seqlen_q,
            _most_keys(packing, span),
            scale=scores.scale,
            window_size=(_left(span), 0),
            **options,
        )
        return out


class FlashAttn:
    """``flash_attn_varlen_func`` of the package flash-attn, version 2.6 or later.

    Args:
        function: that function.
    """

    name: ClassVar[str] = "flash_attn"
    module: ClassVar[str] = "flash_attn"
    function: ClassVar[str] = "flash_attn_varlen_func"

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        packing: VarlenMetadata,
        span: MaskKind,
        scores: ScoreParams,
    ) -> torch.Tensor:
        """See `VarlenFunction.attend`."""
        _refuse_sinks(self.name, scores)
        out: torch.Tensor = self._function(
            *(_rows(x) for x in (q, k, v)),
            cu_seqlens_q=packing.cu_seqlens_q,
            cu_seqlens_k=packing.cu_seqlens_k,
            max_seqlen_q=packing.max_seqlen_q,
            max_seqlen_k=_most_keys(packing, span),
            softmax_scale=scores.scale,
            causal=True,
            window_size=(_left(span), 0),
            # Only where there is one: earlier versions do not know it.
            **({} if scores.softcap is None else {"softcap": scores.softcap}),
        )
        return out


LIBRARIES: dict[str, type[Varlen] | type[FlashAttn]] = {kind.name: kind for kind in (Varlen, FlashAttn)}


@cache
def installed(name: str) -> VarlenFunction:
    """The library of a name among `LIBRARIES`.

    Raises:
        UnsupportedAttention: it is not installed, or cannot be loaded.
    """
    kind = LIBRARIES[name]
    try:
        return kind(getattr(import_module(kind.module), kind.function))
    except (ImportError, AttributeError, OSError) as error:
        reason = f"{kind.module}.{kind.function} cannot be loaded ({clause(error)})"
        raise UnsupportedAttention(name, reason) from error


def check(library: VarlenFunction, layout: KVLayout, device: torch.device) -> None:
    """Sees to it that a library serves a model on a device, and tries it out there.

    Scores (softcap, sinks) are known when a model runs: `VarlenFunction.attend` refuses those.

    Raises:
        UnsupportedAttention: it does not serve what the model stores, or computes something else.
        torch.OutOfMemoryError: there is no room to try.
    """
    name = library.name
    if layout.dtype not in DTYPES:
        said = " and ".join(map(_said, DTYPES))
        raise UnsupportedAttention(name, f"it serves {said}, and the model stores {_said(layout.dtype)}")
    for site in layout.layers:
        if site.key_dim != site.value_dim:
            sizes = f"keys of {site.key_dim} numbers a head and values of {site.value_dim}"
            raise UnsupportedAttention(name, f"it takes keys and values of one size, and the model has {sizes}")
        if site.key_dim > LARGEST_DIM or site.key_dim % 8:
            sizes = f"multiples of 8 up to {LARGEST_DIM}"
            raise UnsupportedAttention(name, f"it takes heads of {sizes} numbers, and the model's have {site.key_dim}")
        if site.mask_kind.kind == "chunk":
            raise UnsupportedAttention(name, "it has no chunks, within which the model attends")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        least = ".".join(map(str, LEAST_CAPABILITY))
        raise UnsupportedAttention(name, f"the GPU has a compute capability below {least}")
    dims = frozenset((site.key_dim, site.value_dim) for site in layout.layers)
    windows = any(site.mask_kind.kind == "window" for site in layout.layers)
    if (reason := _failure(library, dims, windows, layout.dtype, device)) is not None:
        raise UnsupportedAttention(name, reason)


@cache
def _failure(
    library: VarlenFunction, dims: frozenset[tuple[int, int]], windows: bool, dtype: torch.dtype, device: torch.device
) -> str | None:
    """What is wrong when it is tried out; None if nothing."""

    def attention(pool: PagePool, packed: ForwardBatch) -> Attention:
        return GatherAttention(pool, packed, PrefillAttention(pool, packed, library)).compute

    spans = (MaskKind(), MaskKind("window", _TRIED_WINDOW)) if windows else (MaskKind(),)
    try:
        wrong = max(largest_error(attention, dtype, tuple(sorted(dims)), device, span) for span in spans)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return f"it fails here ({clause(error)})"
    return None if wrong <= TOLERANCE[dtype] else f"it computes something else here (by {wrong:.2g})"


def _said(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _left(span: MaskKind) -> int:
    """Keys before a query's own that it sees; -1 is all."""
    return span.size - 1 if span.kind == "window" else -1


def _most_keys(packing: VarlenMetadata, span: MaskKind) -> int:
    """Or more: where no text is longer than the window, FlashAttention takes another kernel, whose bits may differ."""
    return max(packing.max_seqlen_k, span.size + 1) if span.kind == "window" else packing.max_seqlen_k


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Each head's numbers side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _refuse_sinks(name: str, scores: ScoreParams) -> None:
    if scores.sinks is not None:
        raise UnsupportedAttention(name, "it has no attention sinks, and the model has some")
