"""A ``rollout_func`` for TRL's ``GRPOTrainer``: the second way, for single turns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rollout.engine.engine import Engine
from rollout.errors import InputError
from rollout.integrations.trl.sampling import refuse_other_backends
from rollout.integrations.trl.seam import refuse_images
from rollout.integrations.trl.trainer_engine import TrainerEngine, mode_of

RolloutFunc = Callable[[list[Any], Any], dict[str, Any]]


def rollout_func(engine: Engine | None = None, **engine_options: Any) -> RolloutFunc:
    """Return a function for ``GRPOTrainer(rollout_func=…)`` that generates with an `Engine`.

    It returns exactly one completion for each prompt that TRL passes, in their order. TRL has repeated each prompt
    ``num_generations`` times already, whatever its own documentation says; equal neighbours share their pages.

    Besides ``prompt_ids``, ``completion_ids`` and ``logprobs`` it returns ``finish_reason`` and ``sampler_logprobs``,
    which TRL passes on to reward functions; and ``env_mask``, which leaves rows without a completion out of the loss,
    if there are any.

    Args:
        engine: an engine on the trainer's model; None: one is made when the trainer first generates.
        engine_options: arguments of that `Engine`.

    Raises:
        InputError: both an engine and options are given; later: the trainer has tools, or prompts with images.
    """
    if engine is not None and engine_options:
        raise InputError(f"{next(iter(engine_options))} is given beside an engine: give one or the other.")
    rollout = TrainerEngine(engine_options, engine)

    def generate(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        refuse_other_backends(trainer)
        if trainer.tools:
            raise InputError("tools need several turns, and rollout_func serves one: use RolloutGRPOTrainer.")
        # TRL's own templates and tokenizer, so that the ids are those it would have generated from.
        prompt_ids, images, multimodal_fields = trainer._tokenize_prompts(prompts)
        refuse_images({"images": images, "multimodal_fields": multimodal_fields})
        rollout.keys.begin_generation(mode_of(trainer), trainer.state.global_step)
        done = rollout.generate(trainer, prompt_ids)
        result = {
            "prompt_ids": prompt_ids,
            "completion_ids": done.ids,
            "logprobs": done.logprobs,
            "finish_reason": done.finish_reasons,
            "sampler_logprobs": done.sampler_logprobs,
        }
        if any(done.failed):
            result["env_mask"] = [[int(not fails)] * len(ids) for ids, fails in zip(done.ids, done.failed, strict=True)]
        return result

    return generate
