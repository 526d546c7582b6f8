"""Select the run strategy of a model."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from rollout.models.attention.names import AUTO
from rollout.models.device import is_out_of_memory
from rollout.models.errors import UnsupportedAttention, UnsupportedModel, clause
from rollout.models.module.adapters import refuse_adapters
from rollout.models.module.inspect import family_name
from rollout.models.runners.base import RunStrategy
from rollout.models.runners.packed import PackedStrategy
from rollout.models.runners.padded import PaddedStrategy
from rollout.models.runners.parity_check import check_parity
from rollout.models.runners.recurrent import RecurrentStrategy

#: In the order of trial, fastest first.
STRATEGIES: tuple[type[RunStrategy], ...] = (PackedStrategy, PaddedStrategy, RecurrentStrategy)


def select_strategy(
    model: nn.Module, choice: str = AUTO, check: Callable[[RunStrategy], None] = check_parity
) -> RunStrategy:
    """Return the first strategy that supports ``choice`` of attention and reproduces the model's own logits.

    Args:
        model: a transformers causal LM, wrapped or not.
        choice: attention backend.
        check: raises UnsupportedModel if a strategy does not reproduce the logits.

    Raises:
        UnsupportedAttention: the chosen attention cannot run this model.
        UnsupportedModel: no strategy can run this model; the message gives the reason of each.
        torch.OutOfMemoryError, MemoryError: the parity check ran out of memory.
    """
    refuse_adapters(model)
    reasons: list[str] = []
    cause: Exception | None = None
    for strategy_type in STRATEGIES:
        try:
            strategy = strategy_type(model, choice)
            if choice != AUTO and not strategy_type.chooses_attention:
                why_not = _joined(reasons).rstrip(".")
                raise UnsupportedAttention(choice, f"the model attends with code of its own ({why_not})")
            check(strategy)
        except UnsupportedAttention:
            raise
        except UnsupportedModel as error:
            reasons.append(str(error))
        except Exception as error:
            if is_out_of_memory(error):
                raise
            cause = error
            reasons.append(f"{family_name(model)} fails in the {strategy_type.name} strategy: {clause(error)}.")
        else:
            return strategy
    raise UnsupportedModel(_joined(reasons)) from cause


def _joined(reasons: list[str]) -> str:
    """Join sentences into one text, without repeats."""
    return " ".join(dict.fromkeys(reasons))
