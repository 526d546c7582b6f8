"""Which tier serves a model."""

from __future__ import annotations

from torch import nn

from rollout.models.check import check_pages
from rollout.models.choice import AUTO
from rollout.models.errors import UnsupportedAttention, UnsupportedModel, clause
from rollout.models.gathering import GatheringTier
from rollout.models.interface import InterfaceTier
from rollout.models.loan import family_name
from rollout.models.out_of_memory import is_out_of_memory
from rollout.models.stateful import StateTier
from rollout.models.tier import Tier

#: In the order in which they are tried: the fastest first.
TIERS: tuple[type[Tier], ...] = (InterfaceTier, GatheringTier, StateTier)


def serve(model: nn.Module, choice: str = AUTO) -> Tier:
    """The first tier whose numbers are the model's own, with the attention that was chosen.

    Raises:
        UnsupportedAttention: that attention cannot serve it.
        UnsupportedModel: there is none; says each tier's reason.
        torch.OutOfMemoryError, MemoryError: there is no room for the trial.
    """
    reasons: list[str] = []
    cause: Exception | None = None
    for tier in TIERS:
        try:
            served = tier(model, choice)
            if choice != AUTO and not tier.chooses_attention:
                said = " ".join(dict.fromkeys(reasons)).rstrip(".")
                raise UnsupportedAttention(choice, f"the model attends with code of its own ({said})")
            check_pages(served)
        except UnsupportedAttention:
            raise
        except UnsupportedModel as reason:
            reasons.append(str(reason))
        except Exception as error:
            if is_out_of_memory(error):
                raise
            cause = error
            reasons.append(f"{family_name(model)} fails in the {tier.name} tier: {clause(error)}.")
        else:
            return served
    raise UnsupportedModel(" ".join(dict.fromkeys(reasons))) from cause
