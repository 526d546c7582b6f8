"""Scoring completions with the function that the configuration names."""

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
from rollout.records import Record

Reward = Callable[[dict[str, Any], str], float]
"""Takes the row of the dataset and the text of a completion."""


def load_reward(config: dict[str, Any] | None) -> Reward | None:
    """The function of ``reward._target_``, with the other keys as further arguments; of a class, an instance.

    Raises:
        InputError: there is no such function, or it does not take a row and a text.
    """
    if config is None:
        return None
    target = config["_target_"]
    try:
        # Not by Hydra, which would log what is said below.
        found = pkgutil.resolve_name(target)
        function: Any = instantiate(config | {"_target_": found, "_partial_": not isinstance(found, type)})
    except (HydraException, ImportError, ValueError, TypeError, AttributeError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0].rstrip(".")
        raise InputError(f"reward._target_={target} cannot be used: {reason}.") from error
    try:
        inspect.signature(function).bind({}, "")
    except (TypeError, ValueError) as error:
        raise InputError(
            f"reward._target_={target} must be called with the row of the dataset and a completion's text: {error}."
        ) from error
    return function  # type: ignore[no-any-return]


def scored(record: Record, columns: dict[str, Any], reward: Reward | None) -> Record:
    """The record with its reward; where the function fails, the completion is kept and the failure said.

    Records without a completion have no reward.
    """
    if reward is None or record.finish_reason in ("error", "abort"):
        return record
    try:
        value = float(reward(columns, record.text))
    except Exception as error:  # noqa: BLE001  # whatever a user's function raises is this record's error alone
        return replace(record, error_class="reward_failed", error=f"{type(error).__name__}: {error}")
    if not math.isfinite(value):
        return replace(record, error_class="reward_failed", error=f"The reward is {value}.")
    return replace(record, reward=value)
