"""Sampling parameters of single rows, and of a batch of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rollout.models.sampling.sampler import RowSampling


@dataclass(frozen=True)
class One:
    """Parameters of one row."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    key: tuple[int, int] = (1, 2)
    sample: int = 0


def rows_of(rows: list[One]) -> RowSampling:
    """Return the parameters of a batch."""
    return RowSampling(
        temperature=torch.tensor([row.temperature for row in rows]),
        top_k=torch.tensor([row.top_k for row in rows]),
        top_p=torch.tensor([row.top_p for row in rows]),
        min_p=torch.tensor([row.min_p for row in rows]),
        keys=torch.tensor([row.key for row in rows]),
        samples=torch.tensor([row.sample for row in rows]),
        most_top_k=max(row.top_k for row in rows),
        any_top_p=any(row.top_p < 1 for row in rows),
        any_min_p=any(row.min_p > 0 for row in rows),
    )
