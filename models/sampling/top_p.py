"""Find the threshold of top-p: the smallest score in the smallest set whose mass reaches it."""

from __future__ import annotations

import logging
from functools import cache

import torch

from rollout.models.device import failure_of
from rollout.models.sampling.base import scores_above

logger = logging.getLogger(__name__)

_CANDIDATES = 1024
"""Largest scores that are tried before the whole vocabulary is sorted."""
_TOLERANCE = 1e-4
"""Bound on the rounding error of a probability mass."""


def top_p_threshold(
    logits: torch.Tensor, temperatures: torch.Tensor, top_p: torch.Tensor, floors: torch.Tensor
) -> torch.Tensor:
    """Return the smallest score in the smallest set of largest scores whose mass reaches top_p.

    Scores are logits over the temperature (over 1 where it is 0); those below the floors are left out. On a GPU, a
    Triton kernel finds the threshold without synchronizing with the device and without a copy of the logits. If the
    kernel fails its self-test, one warning is logged and the scores are sorted instead.

    Args:
        logits: [B, V], any float dtype.
        temperatures: [B] float32.
        top_p: [B] float32.
        floors: [B] float32, smallest score that an earlier filter keeps.

    Returns:
        [B] float32; -inf where top_p is 1.
    """
    if logits.is_cuda and _kernel_works(logits.device):
        from rollout.models.sampling.top_p_triton import threshold

        return threshold(logits, temperatures, top_p, floors)
    return threshold_by_sorting(scores_above(logits, temperatures, floors), top_p)


def threshold_by_sorting(scores: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Return the same threshold [B] of scores [B, V]. On a GPU it synchronizes to learn whether few scores suffice."""
    total = scores.logsumexp(-1, keepdim=True)
    wanted = torch.where(top_p < 1, top_p, 2.0)[:, None]
    candidates = min(_CANDIDATES, scores.shape[1])
    largest = scores.topk(candidates, dim=-1).values
    mass = (largest - total).exp().cumsum(-1)
    if candidates < scores.shape[1] and bool(((mass[:, -1:] < wanted) & (wanted <= 1)).any()):
        largest = scores.sort(dim=-1, descending=True).values
        mass = (largest - total).exp().cumsum(-1)
    reached = (mass < wanted).sum(-1, keepdim=True).clamp(max=largest.shape[1] - 1)
    return torch.where(wanted <= 1, largest.gather(1, reached), -torch.inf)[:, 0]


def is_threshold(scores: torch.Tensor, top_p: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Return [B] whether ``found`` [B] is the threshold of scores [B, V] within rounding."""
    probabilities = scores.double().softmax(-1)
    found = found[:, None]
    mass = probabilities.where(scores >= found, 0.0).sum(-1)
    mass_above = probabilities.where(scores > found, 0.0).sum(-1)
    right = (mass >= top_p - _TOLERANCE) & (mass_above < top_p + _TOLERANCE) & (scores == found).any(-1)
    return torch.where(top_p < 1, right, found[:, 0] == -torch.inf)


@cache
def _kernel_works(device: torch.device) -> bool:
    """Run the Triton kernel's self-test once per device; only a try shows whether Triton can compile on a machine."""
    # Not random, so that the process's generators keep their state.
    logits = torch.arange(3 * 40_000, device=device).mul(0.37).sin().mul(4).view(3, -1)
    temperatures = torch.tensor([0.8, 1.5, 0.0], device=device)
    top_p = torch.tensor([0.3, 0.99, 1.0], device=device)
    floors = torch.tensor([-torch.inf, -1.0, 0.0], device=device)

    def self_test() -> str | None:
        from rollout.models.sampling.top_p_triton import threshold

        for dtype in (torch.float32, torch.bfloat16):
            given = logits.to(dtype)
            scores = scores_above(given, temperatures, floors)
            if not bool(is_threshold(scores, top_p, threshold(given, temperatures, top_p, floors)).all()):
                return f"it finds a wrong threshold in {dtype}"
        return None

    reason = failure_of(self_test)
    if reason is not None:
        name = torch.cuda.get_device_name(device)
        logger.warning(
            "The Triton top-p kernel is not used on %s, so steps with top-p wait for the device: %s.", name, reason
        )
    return reason is None
