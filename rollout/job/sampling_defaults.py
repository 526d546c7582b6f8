"""Sampling parameters that the model recommends, for a job that does not give them."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rollout.config.schema import SamplingConfig
from rollout.errors import InputError
from rollout.generation_defaults import recommended_sampling
from rollout.sampling_params import describe_parameters, unapplied_recommendations

logger = logging.getLogger(__name__)


def with_model_defaults(sampling: SamplingConfig, model: Path, given: Collection[str] = ()) -> SamplingConfig:
    """Apply what the model's generation_config recommends, or log that it is not applied, as ``defaults`` says.

    Args:
        model: folder or file of the model.
        given: names of parameters that the command line sets; a value that is not the default counts as given, too.

    Raises:
        InputError: the generation_config cannot be read, or recommends a value that is out of range.
    """
    path = model / "generation_config.json"
    params = sampling.params()
    try:
        generation_config = _read(path)
        recommended = unapplied_recommendations(generation_config, params, given)
    except InputError as error:
        raise InputError(f"{path} cannot be used: {error}") from error
    if sampling.defaults == "none":
        if recommended:
            logger.info(
                "The model's generation_config recommends %s; sampling.defaults=model applies this.",
                describe_parameters(recommended),
            )
        return sampling
    if recommended:
        logger.info("Applied from the model's generation_config: %s.", describe_parameters(recommended))
    else:
        logger.info("The model's generation_config recommends nothing that is not given.")
    overruled = {
        name: value
        for name, value in recommended_sampling(generation_config).items()
        if name not in recommended and value != getattr(params, name)
    }
    if overruled:
        logger.info(
            "Not applied from the model's generation_config, since this job sets them: %s.",
            describe_parameters(overruled),
        )
    return replace(sampling, **recommended)


def _read(path: Path) -> Any:
    """Return the fields of a generation_config, None if the model has none."""
    if not path.is_file():
        return None
    try:
        return SimpleNamespace(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise InputError(f"it is no JSON object ({error}).") from error
