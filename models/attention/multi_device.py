"""Attention of a model whose layers lie on several devices: each site's is computed where its keys and values are."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rollout.models.attention.base import PagedStep, Steps
from rollout.models.attention.interface import Scores
from rollout.models.forward_batch import Packed
from rollout.models.kv_cache.page_pool import PagePool


class SpreadSteps:
    """Makes steps of those of each device.

    Args:
        parts: for each part of the pool.
    """

    def __init__(self, parts: Sequence[Steps]) -> None:
        self._parts = parts
        self.name = " and ".join(dict.fromkeys(steps.name for steps in parts))

    def __call__(self, pool: PagePool, packed: Packed) -> SpreadStep:
        """See `rollout.models.attention.base.Steps`."""
        steps = [steps(part, packed) for steps, part in zip(self._parts, pool.parts, strict=True)]
        return SpreadStep(pool, packed, steps)


class SpreadStep(PagedStep):
    """Keeps the order of calls, and leaves each to a step of its own device, which has the sites there alone."""

    def __init__(self, pool: PagePool, packed: Packed, steps: Sequence[PagedStep]) -> None:
        super().__init__(pool, packed)
        self._steps = steps

    def compute(self, index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores) -> torch.Tensor:
        """See `PagedStep.compute`."""
        part, place = self.pool.places[index]
        return self._steps[part].compute(place, q, k, v, scores)
