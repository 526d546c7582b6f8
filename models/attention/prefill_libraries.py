"""Attention functions of other packages, for prefills on a GPU.

Both are FlashAttention 2 (Dao, arXiv 2307.08691) unless another implementation was activated in torch: one program
computes a tile of a sequence's queries over all their keys, block by block from the sequence's own start, so results
do not depend on the batch composition. They would if keys were split among programs by the batch size; FlashAttention
2 does not do so with several queries per sequence, and torch is told not to (``num_splits``).

FlashInfer is not supported. It chooses its tile size by the mean sequence length of the batch
(``FA2DetermineCtaTileQ``), and with it the order of summation, so results depend on the batch composition. Its plans
also lie in pinned memory that the next plan overwrites, possibly before the device has read the last one.
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
from rollout.models.attention.kernel_test import TOLERANCE, Attention, HeadShape, largest_error
from rollout.models.attention.prefill import PrefillAttention, VarlenFunction, VarlenMetadata
from rollout.models.device import is_out_of_memory
from rollout.models.errors import UnsupportedAttention, clause
from rollout.models.forward_batch import ForwardBatch
from rollout.models.kv_cache.layout import KVLayout, MaskKind
from rollout.models.kv_cache.page_pool import PagePool

DTYPES = (torch.bfloat16, torch.float16)
LARGEST_DIM = 256
"""Largest head dim."""
LEAST_CAPABILITY = (8, 0)
"""Lowest compute capability of a GPU."""
_TEST_WINDOW = 9
"""Window of the self-test, in tokens."""


class Varlen:
    """``torch.nn.attention.varlen.varlen_attn``, of torch 2.11 or later.

    Args:
        function: ``varlen_attn`` itself.
    """

    name: ClassVar[str] = "varlen"
    module_name: ClassVar[str] = "torch.nn.attention.varlen"
    function_name: ClassVar[str] = "varlen_attn"

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        parameters = inspect.signature(function).parameters
        # torch 2.11 has neither parameter.
        self._supports_gqa = "enable_gqa" in parameters
        self._options: dict[str, Any] = {"num_splits": 1} if "num_splits" in parameters else {}

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        metadata: VarlenMetadata,
        mask_kind: MaskKind,
        scores: ScoreParams,
    ) -> torch.Tensor:
        """See `VarlenFunction.attend`."""
        _refuse_sinks(self.name, scores)
        if scores.softcap is not None:
            raise UnsupportedAttention(self.name, "it does not support softcap, which the model uses")
        options, group = self._options, q.shape[1] // k.shape[1]
        if group > 1 and self._supports_gqa:
            options = options | {"enable_gqa": True}
        elif group > 1:
            k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        out: torch.Tensor = self._function(
            *(_dense_heads(x) for x in (q, k, v)),
            metadata.cu_seqlens_q,
            metadata.cu_seqlens_k,
            metadata.max_seqlen_q,
            _max_seqlen_k(metadata, mask_kind),
            scale=scores.scale,
            window_size=(_left(mask_kind), 0),
            **options,
        )
        return out


class FlashAttn:
    """``flash_attn_varlen_func`` of the package flash-attn, version 2.6 or later.

    Args:
        function: ``flash_attn_varlen_func`` itself.
    """

    name: ClassVar[str] = "flash_attn"
    module_name: ClassVar[str] = "flash_attn"
    function_name: ClassVar[str] = "flash_attn_varlen_func"

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        metadata: VarlenMetadata,
        mask_kind: MaskKind,
        scores: ScoreParams,
    ) -> torch.Tensor:
        """See `VarlenFunction.attend`."""
        _refuse_sinks(self.name, scores)
        out: torch.Tensor = self._function(
            *(_dense_heads(x) for x in (q, k, v)),
            cu_seqlens_q=metadata.cu_seqlens_q,
            cu_seqlens_k=metadata.cu_seqlens_k,
            max_seqlen_q=metadata.max_seqlen_q,
            max_seqlen_k=_max_seqlen_k(metadata, mask_kind),
            softmax_scale=scores.scale,
            causal=True,
            window_size=(_left(mask_kind), 0),
            # Passed only if set, since earlier versions lack it.
            **({} if scores.softcap is None else {"softcap": scores.softcap}),
        )
        return out


LIBRARIES: dict[str, type[Varlen] | type[FlashAttn]] = {library.name: library for library in (Varlen, FlashAttn)}


@cache
def installed(name: str) -> VarlenFunction:
    """Import the function of a library named in `LIBRARIES`.

    Raises:
        UnsupportedAttention: the package is not installed, or cannot be loaded.
    """
    library = LIBRARIES[name]
    try:
        return library(getattr(import_module(library.module_name), library.function_name))
    except (ImportError, AttributeError, OSError) as error:
        reason = f"{library.module_name}.{library.function_name} cannot be loaded ({clause(error)})"
        raise UnsupportedAttention(name, reason) from error


def check(function: VarlenFunction, layout: KVLayout, device: torch.device) -> None:
    """Check that a function supports a model's layout and device, and run its self-test there.

    Softcap and sinks are known only when the model runs; `VarlenFunction.attend` refuses them then.

    Raises:
        UnsupportedAttention: the layout or device is not supported, or the self-test failed.
        torch.OutOfMemoryError: too little memory is left for the self-test.
    """
    name = function.name
    if layout.dtype not in DTYPES:
        supported = " and ".join(map(_short_name, DTYPES))
        raise UnsupportedAttention(
            name, f"it supports {supported}, and the model's keys and values are {_short_name(layout.dtype)}"
        )
    for layer in layout.layers:
        if layer.key_dim != layer.value_dim:
            dims = f"key dim {layer.key_dim} and value dim {layer.value_dim}"
            raise UnsupportedAttention(name, f"it needs equal key and value dims, and the model has {dims}")
        if layer.key_dim > LARGEST_DIM or layer.key_dim % 8:
            raise UnsupportedAttention(
                name, f"its head dim must be a multiple of 8 up to {LARGEST_DIM}, and the model's is {layer.key_dim}"
            )
        if layer.mask_kind.kind == "chunk":
            raise UnsupportedAttention(name, "it does not support chunked attention, which the model uses")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        least = ".".join(map(str, LEAST_CAPABILITY))
        raise UnsupportedAttention(name, f"the GPU's compute capability is below {least}")
    dims_of_layers = frozenset((layer.key_dim, layer.value_dim) for layer in layout.layers)
    windows = any(layer.mask_kind.kind == "window" for layer in layout.layers)
    if (reason := _failure(function, dims_of_layers, windows, layout.dtype, device)) is not None:
        raise UnsupportedAttention(name, reason)


@cache
def _failure(
    function: VarlenFunction, dims: frozenset[tuple[int, int]], windows: bool, dtype: torch.dtype, device: torch.device
) -> str | None:
    """Run the self-test once and return why it failed, or None."""

    def attention(pool: PagePool, batch: ForwardBatch) -> Attention:
        return GatherAttention(pool, batch, PrefillAttention(pool, batch, function)).compute

    mask_kinds = (MaskKind(), MaskKind("window", _TEST_WINDOW)) if windows else (MaskKind(),)
    shapes = [HeadShape(*pair) for pair in sorted(dims)]
    try:
        error = max(largest_error(attention, dtype, shapes, device, mask_kind) for mask_kind in mask_kinds)
    except Exception as failure:
        if is_out_of_memory(failure):
            raise
        return f"its self-test failed ({clause(failure)})"
    if error <= TOLERANCE[dtype]:
        return None
    return f"it differs from reference attention by {error:.2g} (tolerance {TOLERANCE[dtype]:g})"


def _short_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _left(mask_kind: MaskKind) -> int:
    """Return how many keys before its own a query sees; -1 means all."""
    return mask_kind.size - 1 if mask_kind.kind == "window" else -1


def _max_seqlen_k(metadata: VarlenMetadata, mask_kind: MaskKind) -> int:
    """Return an upper bound of sequence lengths that does not change which kernel runs.

    If no sequence is longer than the window, FlashAttention uses another kernel, whose bits may differ.
    """
    return max(metadata.max_seqlen_k, mask_kind.size + 1) if mask_kind.kind == "window" else metadata.max_seqlen_k


def _dense_heads(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` with stride 1 in its last dimension."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _refuse_sinks(name: str, scores: ScoreParams) -> None:
    if scores.sinks is not None:
        raise UnsupportedAttention(name, "it does not support attention sinks, which the model uses")
