"""Sequences on pages, for Triton's kernels."""

from __future__ import annotations

import torch

from rollout.models.attention.triton import TritonAttention, TritonBackend
from rollout.models.kv_cache.layout import MaskKind
from tests.support.paged_sequences import Kind, PagedWorld, Parts

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: Of a result of size 1: rounding of the output, of weights, and in float32 of the sums.
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
KINDS = (
    Kind(2, 3, 16, 16),
    Kind(1, 5, 13, 24, softcap=1.5),
    Kind(2, 1, 40, 8, MaskKind("window", 11), sinks=True),
    Kind(1, 2, 24, 24, MaskKind("chunk", 14), softcap=0.7, sinks=True),
)


class World(PagedWorld):
    def __init__(
        self, lengths: list[int], dtype: torch.dtype, seed: int, device: torch.device, kinds: tuple[Kind, ...] = KINDS,
        **places: int,
    ) -> None:  # fmt: skip
        super().__init__(lengths, dtype, seed, kinds, TOLERANCE[dtype], device=device, **places)
        self.steps = TritonBackend(self.pool)

    def step(self, parts: Parts) -> TritonAttention:
        return self.steps(self.pool, self.forward(parts))

    def run(self, parts: Parts) -> list[torch.Tensor]:
        return self.attend(self.step(parts).compute, parts)
