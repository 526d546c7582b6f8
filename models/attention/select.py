"""Which attention reads the pages: the one that was asked for, or a kernel where one serves them, else gathering."""

from __future__ import annotations

import logging
from functools import cache

import torch

from rollout.models.attention import prefill_libraries
from rollout.models.attention.base import AttentionBackend
from rollout.models.attention.compiled import CompiledBackend, kernel
from rollout.models.attention.gather import GatherAttention, GatherBackend
from rollout.models.attention.multi_device import MultiDeviceBackend
from rollout.models.attention.names import AUTO
from rollout.models.attention.prefill import VarlenFunction
from rollout.models.attention.prefill_libraries import LIBRARIES, installed
from rollout.models.device import failure_of
from rollout.models.errors import UnsupportedAttention
from rollout.models.kv_cache.layout import KVLayout
from rollout.models.kv_cache.page_pool import PagePool

logger = logging.getLogger(__name__)


def check_available(choice: str, device: torch.device) -> None:
    """Refuses what cannot be on a device whatever the model: known before one is loaded.

    Raises:
        UnsupportedAttention: the attention of that name is not there, or not for such a device.
    """
    on_gpu = choice == "triton" or choice in LIBRARIES
    if on_gpu and device.type != "cuda":
        raise UnsupportedAttention(choice, f"it is for GPUs, and the model is on {device.type}")
    if choice in LIBRARIES:
        installed(choice)
    if choice == "compiled":
        if device.type != "cpu":
            raise UnsupportedAttention(choice, f"it is for CPUs, and the model is on {device.type}")
        if kernel() is None:
            raise UnsupportedAttention(choice, "it could not be compiled, as a warning says")


def select_backend(choice: str, pool: PagePool) -> AttentionBackend:
    """The attention of a name, for the layout and device of ``pool``.

    ``auto`` is the fastest of the engine's own: ``triton``, on a GPU, or ``compiled``, on a CPU; ``gather`` gathers
    pages for torch's. ``varlen`` and ``flash_attn`` are libraries, which serve prefills; rows that decode are read by
    the fastest of the engine's own.

    Raises:
        UnsupportedAttention: it is not there, or does not serve.
        torch.OutOfMemoryError: there is no room to try it out.
    """
    if choice == AUTO:
        return fastest_backend(pool)
    if len(pool.device_pools) > 1:
        return MultiDeviceBackend([select_backend(choice, part) for part in pool.device_pools])
    layout, device = pool.layout, pool.device
    check_available(choice, device)
    if choice in LIBRARIES:
        library = installed(choice)
        prefill_libraries.check(library, layout, device)
        return _triton(pool, library) or GatherBackend(library)
    if choice == "triton":
        if (reason := _triton_failure(_dims(layout), layout.dtype, device)) is not None:
            raise UnsupportedAttention(choice, f"it does not serve here ({reason})")
        return _triton_steps(pool, None)
    if choice == "compiled":
        steps = _compiled(pool)
        if steps is None:
            stored = str(layout.dtype).removeprefix("torch.")
            raise UnsupportedAttention(choice, f"it does not serve {stored}, which the model stores")
        return steps
    return GatherAttention


def fastest_backend(pool: PagePool) -> AttentionBackend:
    """The fastest of the engine's own for the layout and device of ``pool``; of several devices, each has its own."""
    if len(pool.device_pools) > 1:
        return MultiDeviceBackend([fastest_backend(part) for part in pool.device_pools])
    return _triton(pool) or _compiled(pool) or GatherAttention


def _compiled(pool: PagePool) -> AttentionBackend | None:
    compiled = kernel() if pool.device.type == "cpu" else None
    return CompiledBackend(compiled) if compiled is not None and compiled.supports(pool.layout, pool.device) else None


def _triton(pool: PagePool, library: VarlenFunction | None = None) -> AttentionBackend | None:
    """None where Triton's kernels do not serve; a warning then says why."""
    layout, device = pool.layout, pool.device
    if device.type != "cuda" or not layout.layers or not _triton_serves(_dims(layout), layout.dtype, device):
        return None
    return _triton_steps(pool, library)


def _triton_steps(pool: PagePool, library: VarlenFunction | None) -> AttentionBackend:
    # Comes with torch's builds for GPUs, and with no other.
    from rollout.models.attention.triton import TritonBackend

    return TritonBackend(pool, library)


def _dims(layout: KVLayout) -> frozenset[tuple[int, int]]:
    return frozenset((site.key_dim, site.value_dim) for site in layout.layers)


@cache
def _triton_serves(dims: frozenset[tuple[int, int]], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether Triton's kernels serve keys and values of such sizes on a GPU; where they do not, a warning says why.

    Raises:
        torch.OutOfMemoryError: there is no room to try.
    """
    reason = _triton_failure(dims, dtype, device)
    if reason is not None:
        logger.warning(
            "Triton's attention is not used on %s, pages are gathered instead, which is slower: %s.",
            torch.cuda.get_device_name(device),
            reason,
        )
    return reason is None


@cache
def _triton_failure(dims: frozenset[tuple[int, int]], dtype: torch.dtype, device: torch.device) -> str | None:
    """Why Triton's kernels do not serve; None if they do.

    Found out once, by trying: whether Triton can compile on a machine cannot be known otherwise.

    Raises:
        torch.OutOfMemoryError: there is no room to try.
    """

    def tried() -> None:
        from rollout.models.attention.triton import check

        check(dims, dtype, device)

    return failure_of(tried)
