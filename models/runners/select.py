"""Which tier serves a model."""

from __future__ import annotations

from torch import nn

from rollout.models.attention.names import AUTO
from rollout.models.device import is_out_of_memory
from rollout.models.errors import UnsupportedAttention, UnsupportedModel, clause
from rollout.models.module.inspect import family_name
from rollout.models.runners.base import RunStrategy
from rollout.models.runners.packed import PackedStrategy
from rollout.models.runners.padded import PaddedStrategy
from rollout.models.runners.parity_check import check_parity
from rollout.models.runners.recurrent import RecurrentStrategy

#: In the order in which they are tried: the fastest first.
STRATEGIES: tuple[type[RunStrategy], ...] = (PackedStrategy, PaddedStrategy, RecurrentStrategy)


def select_strategy(model: nn.Module, choice: str = AUTO) -> RunStrategy:
    """The first tier whose numbers are the model's own, with the attention that was chosen.

    Raises:
        UnsupportedAttention: that attention cannot serve it.
        UnsupportedModel: there is none; says each tier's reason.
        torch.OutOfMemoryError, MemoryError: there is no room for the trial.
    """
    reasons: list[str] = []
    cause: Exception | None = None
    for tier in STRATEGIES:
        try:
            served = tier(model, choice)
            if choice != AUTO and not tier.chooses_attention:
                said = " ".join(dict.fromkeys(reasons)).rstrip(".")
                raise UnsupportedAttention(choice, f"the model attends with code of its own ({said})")
            check_parity(served)
        except UnsupportedAttention:
            raise
        except UnsupportedModel as reason:
            reasons.append(str(reason))
        except Exception as error:
            if is_out_of_memory(error):
                raise
            cause = error
            reasons.append(f"{family_name(model)} fails in the {tier.name} strategy: {clause(error)}.")
        else:
            return served
    raise UnsupportedModel(" ".join(dict.fromkeys(reasons))) from cause
