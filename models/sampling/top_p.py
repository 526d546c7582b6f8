"""Which scores are in the smallest set whose mass reaches top-p."""

from __future__ import annotations

import logging
from functools import cache

import torch

from rollout.models.device import failure_of

logger = logging.getLogger(__name__)

#: On a CPU, top-p first looks among this many tokens, and sorts the vocabulary only where their mass is too small.
_CANDIDATES = 1024
#: What rounding moves of a mass of 1.
_TOLERANCE = 1e-4


def top_p_threshold(scores: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """[B, 1] the smallest score in the smallest set of largest scores whose mass reaches top_p; -inf where that is 1.

    Args:
        scores: [B, V] float32.
        top_p: [B] float32.

    On a GPU by `rollout.models.sampling.top_p_triton`, which nobody waits for; where that cannot be, a warning says so
    once.
    """
    if scores.is_cuda and _kernel_serves(scores.device):
        from rollout.models.sampling.top_p_triton import threshold

        return threshold(scores, top_p)
    return by_sorting(scores, top_p)


def by_sorting(scores: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """The same by sorting. Asks the device, which a GPU is waited for, whether few of the scores are enough."""
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
    """[B] whether ``found`` [B, 1] is the threshold, or one that rounding may take for it."""
    shares = scores.double().softmax(-1)
    reached, above = (shares.where(seen, 0.0).sum(-1) for seen in (scores >= found, scores > found))
    right = (reached >= top_p - _TOLERANCE) & (above < top_p + _TOLERANCE) & (scores == found).any(-1)
    return torch.where(top_p < 1, right, found[:, 0] == -torch.inf)


@cache
def _kernel_serves(device: torch.device) -> bool:
    """Found out once, by trying: whether Triton can compile on a machine cannot be known otherwise."""
    # No random numbers: the process's generators stay as they are.
    scores = torch.arange(3 * 9000, device=device).mul(0.37).sin().mul(4).view(3, -1)
    top_p = torch.tensor([0.3, 0.99, 1.0], device=device)

    def tried() -> str | None:
        from rollout.models.sampling.top_p_triton import threshold

        right = bool(is_threshold(scores, top_p, threshold(scores, top_p)).all())
        return None if right else "it finds something else"

    reason = failure_of(tried)
    if reason is not None:
        name = torch.cuda.get_device_name(device)
        logger.warning("Triton's top-p is not used on %s, steps with top-p wait for the device: %s.", name, reason)
    return reason is None
