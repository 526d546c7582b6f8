"""Score completions with the configured reward function."""

from __future__ import annotations

import inspect
import math
import pkgutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hydra.errors import HydraException
from hydra.utils import instantiate

from rollout.errors import InputError
from rollout.models.errors import first_line
from rollout.records import Record

Reward = Callable[[dict[str, Any], str], float]
"""Takes the columns of an input row and the text of a completion."""


def load_reward(config: dict[str, Any] | None) -> Reward | None:
    """Load ``reward._target_`` with the other keys as arguments; a class is instantiated.

    Raises:
        InputError: the target does not exist, or does not take an input row and a text.
    """
    if config is None:
        return None
    target = config["_target_"]
    try:
        # Resolved here because Hydra would also log the error that is reported below.
        resolved = pkgutil.resolve_name(target)
        function: Any = instantiate(config | {"_target_": resolved, "_partial_": not isinstance(resolved, type)})
    except (HydraException, ImportError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"reward._target_={target} cannot be used: {first_line(error.__cause__ or error)}.") from error
    try:
        inspect.signature(function).bind({}, "")
    except (TypeError, ValueError) as error:
        raise InputError(
            f"reward._target_={target} must accept an input row and the text of a completion: {error}."
        ) from error
    return function  # type: ignore[no-any-return]


def score(record: Record, columns: dict[str, Any], reward: Reward | None) -> Record:
    """Return the record with its reward, or with the error ``reward_failed`` if the function fails.

    Records without a completion get no reward.
    """
    if reward is None or record.finish_reason in ("error", "abort"):
        return record
    try:
        value = float(reward(columns, record.text))
    except Exception as error:  # noqa: BLE001  # a user's function may raise anything; only this record fails
        return replace(record, error_class="reward_failed", error=f"{type(error).__name__}: {error}")
    if not math.isfinite(value):
        return replace(record, error_class="reward_failed", error=f"The reward is {value}.")
    return replace(record, reward=value)
