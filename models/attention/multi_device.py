"""Attention of a model whose layers lie on several devices: each layer attends where its keys and values are."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rollout.models.attention.base import AttentionBackend, PagedAttention
from rollout.models.attention.interface import ScoreParams
from rollout.models.forward_batch import ForwardBatch
from rollout.models.kv_cache.page_pool import PagePool


class MultiDeviceBackend:
    """Combines the backends of several devices.

    Args:
        backends: one for each of `PagePool.device_pools`.
    """

    def __init__(self, backends: Sequence[AttentionBackend]) -> None:
        self._backends = backends
        self.name = " and ".join(dict.fromkeys(backend.name for backend in backends))

    def __call__(self, pool: PagePool, batch: ForwardBatch) -> MultiDeviceAttention:
        """See `rollout.models.attention.base.AttentionBackend`."""
        attentions = [
            backend(device_pool, batch) for backend, device_pool in zip(self._backends, pool.device_pools, strict=True)
        ]
        return MultiDeviceAttention(pool, batch, attentions)


class MultiDeviceAttention(PagedAttention):
    """Checks the order of calls and delegates each layer to the attention of its device."""

    def __init__(self, pool: PagePool, batch: ForwardBatch, attentions: Sequence[PagedAttention]) -> None:
        super().__init__(pool, batch)
        self._attentions = attentions

    def compute(
        self, index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: ScoreParams
    ) -> torch.Tensor:
        """See `PagedAttention.compute`."""
        location = self.pool.layer_locations[index]
        return self._attentions[location.pool].compute(location.layer, q, k, v, scores)
