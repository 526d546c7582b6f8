"""Headroom of a CUDA device, from the driver and torch's allocator."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from typing import Any

import pynvml
import torch

from rollout.headroom.cached_reading import CachedReading

logger = logging.getLogger(__name__)


class CudaHeadroom:
    """Headroom of one CUDA device: memory that no process uses, plus blocks that torch caches.

    The driver is queried at most every ``refresh_s`` seconds, since a query can take longer than a small decode step.
    Allocations of this process are read from torch's allocator each time, so only other processes are seen late:

        free = total - (driver's used bytes - torch's reserved bytes, both then) - torch's allocated bytes, now

    Cached blocks count as free although they may be fragmented, so an allocation can still fail.

    Args:
        device: a CUDA device, in torch's numbering.
        refresh_s: seconds between queries of the driver.
        clock: monotonic seconds.
    """

    def __init__(
        self, device: torch.device, refresh_s: float = 0.05, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._device = device
        self._nvml = _nvml_handle(device)
        self._total = int(torch.cuda.get_device_properties(device).total_memory)
        self._others = CachedReading(self._read_others, refresh_s, clock)

    @property
    def total_bytes(self) -> int:
        return self._total

    def free_bytes(self) -> int:
        return self._total - self._others() - self._torch_bytes("allocated_bytes")

    def _read_others(self) -> int:
        """Return the used bytes of the device, without those that torch reserves in this process."""
        return self._total - self._driver_free_bytes() - self._torch_bytes("reserved_bytes")

    def _torch_bytes(self, which: str) -> int:
        """Return ``allocated_bytes`` or ``reserved_bytes`` of torch's allocator."""
        # memory_allocated() flattens about a hundred counters to return one; the nested form is much cheaper.
        stats = torch.cuda.memory_stats_as_nested_dict(self._device)
        if not stats:  # nothing has been allocated yet
            return 0
        return int(stats[which]["all"]["current"])

    def _driver_free_bytes(self) -> int:
        # On a MIG slice the two differ: NVML may report the whole GPU, the runtime reports the slice.
        free, _ = torch.cuda.mem_get_info(self._device)
        if self._nvml is not None:
            try:
                free = min(free, int(pynvml.nvmlDeviceGetMemoryInfo(self._nvml).free))
            except pynvml.NVMLError as error:
                self._nvml = None
                _log_without_nvml(str(error))
        return free


def _nvml_handle(device: torch.device) -> Any | None:
    """Return NVML's handle of a torch device, or None.

    Devices are matched by UUID or PCI address, since NVML does not renumber by CUDA_VISIBLE_DEVICES.
    """
    properties: Any = torch.cuda.get_device_properties(device)  # torch's stub leaves the PCI numbers out
    pci = f"{properties.pci_domain_id:08x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
    failure = "no such device"
    try:
        pynvml.nvmlInit()
        for find, key in (
            (pynvml.nvmlDeviceGetHandleByUUID, f"GPU-{properties.uuid}"),
            (pynvml.nvmlDeviceGetHandleByUUID, f"MIG-{properties.uuid}"),
            (pynvml.nvmlDeviceGetHandleByPciBusId, pci),
        ):
            try:
                return find(key)
            except pynvml.NVMLError as error:
                failure = str(error)
    except pynvml.NVMLError as error:
        failure = str(error)
    _log_without_nvml(failure)
    return None


@functools.cache  # a trainer may create an engine per call; warn only once
def _log_without_nvml(failure: str) -> None:
    logger.warning("NVML is not available (%s); free GPU memory is read from the CUDA runtime alone.", failure)
