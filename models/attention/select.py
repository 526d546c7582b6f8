"""Selection of the attention backend: the requested one, else the fastest that serves the model."""

from __future__ import annotations

import logging
from functools import cache

import torch

from rollout.models.attention import prefill_libraries
from rollout.models.attention.base import AttentionBackend
from rollout.models.attention.compiled import CompiledBackend, kernel
from rollout.models.attention.gather import GatherAttention, GatherBackend
from rollout.models.attention.kernel_test import HeadShape
from rollout.models.attention.multi_device import MultiDeviceBackend
from rollout.models.attention.names import AUTO
from rollout.models.attention.prefill import VarlenFunction
from rollout.models.attention.prefill_libraries import LIBRARIES, installed
from rollout.models.device import failure_of
from rollout.models.errors import UnsupportedAttention
from rollout.models.kv_cache.layout import KVLayout
from rollout.models.kv_cache.page_pool import PagePool

logger = logging.getLogger(__name__)


def check_available(name: str, device: torch.device) -> None:
    """Check what can be checked before a model is loaded: the device, installed packages and the C compiler.

    Raises:
        UnsupportedAttention: the backend is not installed, or does not support the device.
    """
    if (name == "triton" or name in LIBRARIES) and device.type != "cuda":
        raise UnsupportedAttention(name, f"it is for GPUs, and the model is on {device.type}")
    if name in LIBRARIES:
        installed(name)
    if name == "compiled":
        if device.type != "cpu":
            raise UnsupportedAttention(name, f"it is for CPUs, and the model is on {device.type}")
        if kernel() is None:
            raise UnsupportedAttention(name, "its kernel could not be compiled (see the warning above)")


def select_backend(name: str, pool: PagePool) -> AttentionBackend:
    """Return the backend of a name from `names.ATTENTION_BACKENDS` for the layout and device of ``pool``.

    ``auto`` selects the fastest of the engine's own backends: ``triton`` on a GPU, ``compiled`` on a CPU, else
    ``gather``, which gathers pages for torch's attention. ``varlen`` and ``flash_attn`` serve prefills; decoding rows
    then use the fastest of the engine's own backends.

    Raises:
        UnsupportedAttention: the backend is not available, or does not support the layout or device.
        torch.OutOfMemoryError: too little memory is left for the kernel self-test.
    """
    if name == AUTO:
        return fastest_backend(pool)
    if len(pool.device_pools) > 1:
        return MultiDeviceBackend([select_backend(name, device_pool) for device_pool in pool.device_pools])
    layout, device = pool.layout, pool.device
    check_available(name, device)
    if name in LIBRARIES:
        function = installed(name)
        prefill_libraries.check(function, layout, device)
        return _triton_or_none(pool, function) or GatherBackend(function)
    if name == "triton":
        if (reason := _triton_failure(_shapes(layout), layout.dtype, device, layout.page_size)) is not None:
            raise UnsupportedAttention(name, f"its kernels failed here ({reason})")
        return _triton_backend(pool, None)
    if name == "compiled":
        backend = _compiled_or_none(pool)
        if backend is None:
            dtype = str(layout.dtype).removeprefix("torch.")
            raise UnsupportedAttention(name, f"it does not support {dtype}, the dtype of the model's keys and values")
        return backend
    return GatherAttention


def fastest_backend(pool: PagePool) -> AttentionBackend:
    """Return the fastest of the engine's own backends for the layout and device of ``pool``, device by device."""
    if len(pool.device_pools) > 1:
        return MultiDeviceBackend([fastest_backend(device_pool) for device_pool in pool.device_pools])
    return _triton_or_none(pool) or _compiled_or_none(pool) or GatherAttention


def _compiled_or_none(pool: PagePool) -> AttentionBackend | None:
    compiled = kernel() if pool.device.type == "cpu" else None
    return CompiledBackend(compiled) if compiled is not None and compiled.supports(pool.layout, pool.device) else None


def _triton_or_none(pool: PagePool, function: VarlenFunction | None = None) -> AttentionBackend | None:
    """Return the Triton backend, or None, with a warning on a GPU, if its kernels do not work."""
    layout, device = pool.layout, pool.device
    if (
        device.type != "cuda"
        or not layout.layers
        or not _triton_works(_shapes(layout), layout.dtype, device, layout.page_size)
    ):
        return None
    return _triton_backend(pool, function)


def _triton_backend(pool: PagePool, function: VarlenFunction | None) -> AttentionBackend:
    # Imported late: triton comes only with torch's GPU builds.
    from rollout.models.attention.triton import TritonBackend

    return TritonBackend(pool, function)


def _shapes(layout: KVLayout) -> frozenset[HeadShape]:
    return frozenset(map(HeadShape.of, layout.layers))


@cache
def _triton_works(shapes: frozenset[HeadShape], dtype: torch.dtype, device: torch.device, page_size: int) -> bool:
    """Return whether the Triton kernels pass their self-test; warn once if they do not.

    Raises:
        torch.OutOfMemoryError: too little memory is left for the self-test.
    """
    reason = _triton_failure(shapes, dtype, device, page_size)
    if reason is not None:
        logger.warning(
            "Triton attention is not used on %s; pages are gathered instead, which is slower: %s.",
            torch.cuda.get_device_name(device),
            reason,
        )
    return reason is None


@cache
def _triton_failure(
    shapes: frozenset[HeadShape], dtype: torch.dtype, device: torch.device, page_size: int
) -> str | None:
    """Run the Triton kernels once and return why they failed, or None.

    Only a trial shows whether Triton can compile on this machine.

    Raises:
        torch.OutOfMemoryError: too little memory is left for the trial.
    """

    def trial() -> None:
        from rollout.models.attention.triton import check

        check(shapes, dtype, device, page_size)

    return failure_of(trial)
