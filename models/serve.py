"""Which tier serves a model."""

from __future__ import annotations

from torch import nn

from rollout.models.check import check_pages
from rollout.models.errors import UnsupportedModel
from rollout.models.interface import InterfaceTier
from rollout.models.tier import Tier

#: In the order in which they are tried: the fastest first.
TIERS: tuple[type[Tier], ...] = (InterfaceTier,)


def serve(model: nn.Module) -> Tier:
    """The first tier whose numbers are the model's own.

    Raises:
        UnsupportedModel: there is none; says each tier's reason.
    """
    reasons = []
    for tier in TIERS:
        try:
            served = tier(model)
            check_pages(served)
        except UnsupportedModel as reason:
            reasons.append(str(reason))
        else:
            return served
    raise UnsupportedModel(" ".join(dict.fromkeys(reasons)))
