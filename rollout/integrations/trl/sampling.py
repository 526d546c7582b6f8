"""The sampling parameters that a TRL trainer asks for."""

from __future__ import annotations

import copy
import logging
from typing import Any

from rollout.engine.params_arguments import params_of_generation_config
from rollout.errors import InputError
from rollout.models.module.inspect import unwrap_model
from rollout.sampling_params import SamplingParams

#: Backends of TRL that would generate in this engine's place.
_OTHER_BACKENDS = ("use_vllm", "use_transformers_continuous_batching", "use_transformers_paged")

logger = logging.getLogger(__name__)


def refuse_other_backends(trainer: Any) -> None:
    """Refuse a trainer that is told to generate with another backend.

    Raises:
        InputError: the message names the argument.
    """
    for name in _OTHER_BACKENDS:
        if getattr(trainer.args, name, False):
            raise InputError(f"{name}=True selects another generation backend than this engine: unset {name}.")


def trainer_params(trainer: Any) -> SamplingParams:
    """Return the parameters of a trainer's generation, as its own ``generate`` would apply them.

    TRL makes a ``generation_config`` of its arguments and of ``generation_kwargs``. What that leaves unset,
    ``generate`` takes from the model's own configuration, and so does this.

    Raises:
        InputError: a parameter is set that this engine does not offer; the message names it.
    """
    config = trainer.generation_config
    own = unwrap_model(trainer.model).generation_config
    merged = copy.deepcopy(config)
    merged.update(**own.to_dict(), defaults_only=True)
    cache = merged.cache_implementation
    if cache == "quantized":
        raise InputError(
            "cache_implementation='quantized' would change the tokens, and this engine does not offer it: unset it."
        )
    if cache is not None:
        logger.warning("cache_implementation=%r has no effect: this engine has its own KV memory.", cache)
        merged.cache_implementation = None
    params = params_of_generation_config(merged, "The trainer (its arguments, generation_kwargs or its model)")
    if params.n != 1:
        raise InputError(f"num_return_sequences is {params.n}, but TRL repeats the prompts itself: unset it.")
    return params
