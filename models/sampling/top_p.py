"""Find the threshold of top-p: the smallest score in the smallest set whose mass reaches it."""

from __future__ import annotations

import logging
from functools import cache

import torch

from rollout.models.device import failure_of

logger = logging.getLogger(__name__)

_CANDIDATES = 1024
"""Largest scores that are tried before the whole vocabulary is sorted."""
_TOLERANCE = 1e-4
"""Bound on the rounding error of a probability mass."""


def top_p_threshold(scores: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Return the smallest score in the smallest set of largest scores whose mass reaches top_p.

    On a GPU, a Triton kernel finds it without synchronizing with the device. If the kernel fails its self-test, one
    warning is logged and the scores are sorted instead.

    Args:
        scores: [B, V] float32.
        top_p: [B] float32.

    Returns:
        [B, 1]; -inf where top_p is 1.
    """
    if scores.is_cuda and _kernel_works(scores.device):
        from rollout.models.sampling.top_p_triton import threshold

        return threshold(scores, top_p)
    return threshold_by_sorting(scores, top_p)


def threshold_by_sorting(scores: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Return the same threshold by sorting. On a GPU it synchronizes to learn whether few scores suffice."""
    total = scores.logsumexp(-1, keepdim=True)
    wanted = torch.where(top_p < 1, top_p, 2.0)[:, None]
    candidates = min(_CANDIDATES, scores.shape[1])
    largest = scores.topk(candidates, dim=-1).values
    mass = (largest - total).exp().cumsum(-1)
    if candidates < scores.shape[1] and bool(((mass[:, -1:] < wanted) & (wanted <= 1)).any()):
        largest = scores.sort(dim=-1, descending=True).values
        mass = (largest - total).exp().cumsum(-1)
    reached = (mass < wanted).sum(-1, keepdim=True).clamp(max=largest.shape[1] - 1)
    return torch.where(wanted <= 1, largest.gather(1, reached), -torch.inf)


def is_threshold(scores: torch.Tensor, top_p: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Return [B] whether ``found`` [B, 1] is the threshold within rounding."""
    probabilities = scores.double().softmax(-1)
    mass = probabilities.where(scores >= found, 0.0).sum(-1)
    mass_above = probabilities.where(scores > found, 0.0).sum(-1)
    right = (mass >= top_p - _TOLERANCE) & (mass_above < top_p + _TOLERANCE) & (scores == found).any(-1)
    return torch.where(top_p < 1, right, found[:, 0] == -torch.inf)


@cache
def _kernel_works(device: torch.device) -> bool:
    """Run the Triton kernel's self-test once per device; only a try shows whether Triton can compile on a machine."""
    # Not random, so that the process's generators keep their state.
    scores = torch.arange(3 * 9000, device=device).mul(0.37).sin().mul(4).view(3, -1)
    top_p = torch.tensor([0.3, 0.99, 1.0], device=device)

    def self_test() -> str | None:
        from rollout.models.sampling.top_p_triton import threshold

        right = bool(is_threshold(scores, top_p, threshold(scores, top_p)).all())
        return None if right else "it finds a wrong threshold"

    reason = failure_of(self_test)
    if reason is not None:
        name = torch.cuda.get_device_name(device)
        logger.warning(
            "The Triton top-p kernel is not used on %s, so steps with top-p wait for the device: %s.", name, reason
        )
    return reason is None
