"""Headroom of one of several that take memory from a device in turn."""

from __future__ import annotations

from rollout.headroom.headroom import Headroom


class KeptFree:
    """Headroom that leaves some bytes of a device free for others in this process, beyond the reserve.

    Args:
        memory: headroom of the device.
        kept_bytes: bytes to leave free.
    """

    def __init__(self, memory: Headroom, kept_bytes: int) -> None:
        self._memory = memory
        self._kept_bytes = kept_bytes

    @property
    def total_bytes(self) -> int:
        """See `Headroom.total_bytes`."""
        return max(0, self._memory.total_bytes - self._kept_bytes)

    def free_bytes(self) -> int:
        """See `Headroom.free_bytes`."""
        return self._memory.free_bytes() - self._kept_bytes
