"""Attention of a model whose layers lie on several devices: each site's is computed where its keys and values are."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rollout.models.attention.base import AttentionBackend, PagedAttention
from rollout.models.attention.interface import ScoreParams
from rollout.models.forward_batch import ForwardBatch
from rollout.models.kv_cache.page_pool import PagePool


class MultiDeviceBackend:
    """Makes steps of those of each device.

    Args:
        parts: for each part of the pool.
    """

    def __init__(self, parts: Sequence[AttentionBackend]) -> None:
        self._parts = parts
        self.name = " and ".join(dict.fromkeys(steps.name for steps in parts))

    def __call__(self, pool: PagePool, packed: ForwardBatch) -> MultiDeviceAttention:
        """See `rollout.models.attention.base.AttentionBackend`."""
        steps = [steps(part, packed) for steps, part in zip(self._parts, pool.device_pools, strict=True)]
        return MultiDeviceAttention(pool, packed, steps)


class MultiDeviceAttention(PagedAttention):
    """Keeps the order of calls, and leaves each to a step of its own device, which has the sites there alone."""

    def __init__(self, pool: PagePool, packed: ForwardBatch, steps: Sequence[PagedAttention]) -> None:
        super().__init__(pool, packed)
        self._steps = steps

    def compute(
        self, index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: ScoreParams
    ) -> torch.Tensor:
        """See `PagedAttention.compute`."""
        part, place = self.pool.layer_locations[index]
        return self._steps[part].compute(place, q, k, v, scores)
