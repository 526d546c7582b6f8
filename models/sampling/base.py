"""Interface of the sampling kernels, and the block size that all implementations share."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

BLOCK = 256
"""Tokens per block of the vocabulary in the two levels of Gumbel-max. Every draw depends on it: ``gumbel_max.c``, the
Triton kernels and the tensor operations must agree."""


class Draws(NamedTuple):
    """One token per row of a batch, all of shape [B]."""

    tokens: torch.Tensor
    """int64."""
    logprobs: torch.Tensor
    """float32: log-probabilities of the tokens."""
    log_sums: torch.Tensor
    """float64: log-sum-exp of each row's logits over its temperature."""


class GumbelKernel(Protocol):
    """A kernel that samples by Gumbel-max, with the draws of `rollout.models.sampling.sampler`."""

    def draw(
        self,
        logits: torch.Tensor,
        temperatures: torch.Tensor,
        keys: torch.Tensor,
        samples: torch.Tensor,
        positions: torch.Tensor,
        thresholds: torch.Tensor | None = None,
    ) -> Draws:
        """Draw a token for each row.

        Args:
            logits: [B, V] on the kernel's device.
            temperatures: float32 [B]; 0 is greedy.
            keys: int64 [B, 2], see `rollout.models.sampling.philox.gumbel`.
            samples: int64 [B].
            positions: int64 [B].
            thresholds: float32 [B], the smallest score of each row that may be drawn; None allows all. Scores are
                logits over the temperature, over 1 where it is 0.
        """
        ...


def divisors(temperatures: torch.Tensor) -> torch.Tensor:
    """Return what logits are divided by: the temperatures [B], 1 where a row is greedy."""
    return torch.where(temperatures > 0, temperatures, 1.0)


def scores_above(logits: torch.Tensor, temperatures: torch.Tensor, floors: torch.Tensor) -> torch.Tensor:
    """Return the float32 scores [B, V] of logits at temperatures [B]; -inf where they are below the floors [B]."""
    scores = logits.float() / divisors(temperatures)[:, None]
    return scores.masked_fill_(scores < floors[:, None], -torch.inf)
