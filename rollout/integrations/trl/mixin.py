"""The mixin that lets a TRL trainer generate with an `Engine`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

from rollout.errors import InputError
from rollout.integrations.trl.completions import without_failed
from rollout.integrations.trl.sampling import refuse_other_backends, trainer_params
from rollout.integrations.trl.seam import Seam, refuse_images, seam_of
from rollout.integrations.trl.trainer_engine import TrainerEngine, mode_of


class RolloutMixin:
    """Generates a trainer's completions with an `Engine` on the module that it trains.

    TRL keeps its templates, tools, environments, masks and rewards: only token ids go in, and only token ids and
    log-probabilities come out. It stands before a trainer class; `with_rollout` puts it there.

    Args:
        engine_options: arguments of `Engine` by name, e.g. ``{"max_kv_bytes": 2**30}``.
        args, kwargs: those of the trainer.

    Raises:
        InputError: another backend is selected, or a sampling parameter that the engine does not offer.
    """

    _rollout_seam: ClassVar[Seam]

    def __init__(self, *args: Any, engine_options: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        self._rollout = TrainerEngine(engine_options or {})
        self._rollout_failed: list[bool] | None = None
        super().__init__(*args, **kwargs)
        refuse_other_backends(self)
        if getattr(self, "rollout_func", None) is not None:
            raise InputError("rollout_func would generate in this engine's place: leave it out, or use TRL's trainer.")
        trainer_params(self)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as the trainer does; the noise depends on the steps alone, so a resumed run goes on with the same."""
        self._rollout.keys.restart("train")
        return super().train(*args, **kwargs)  # type: ignore[misc]

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as the trainer does; every evaluation of a step draws the same noise."""
        self._rollout.keys.restart("eval")
        return super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        given = self._rollout_seam.bind(*args, **kwargs)
        refuse_images(given)
        completions = self._rollout.generate(self, given["prompt_ids"])
        ids, logprobs = completions.ids, completions.logprobs
        if self._rollout.keys.turn == 0:
            self._rollout_failed = completions.failed
        else:
            ids, logprobs = without_failed(completions)
        return (ids, logprobs) if self._rollout_seam.with_logprobs else ids

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate all turns, and free what they kept for each other before anything is scored."""
        try:
            return super()._generate(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._rollout.close_session()

    def _generate_and_score_completions(self, *args: Any, **kwargs: Any) -> Any:
        with self._rollout_generation():
            outputs = super()._generate_and_score_completions(*args, **kwargs)  # type: ignore[misc]
            if self._rollout_failed is not None and any(self._rollout_failed):
                mask = outputs["completion_mask"]
                outputs["completion_mask"] = mask * mask.new_tensor(self._rollout_failed).logical_not()[:, None]
            return outputs

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
        """Leave rows without a completion out of their group's mean, as TRL does with what nothing could score."""
        rewards = super()._calculate_rewards(*args, **kwargs)  # type: ignore[misc]
        if self._rollout_failed is None:
            return rewards
        failed = self.accelerator.gather(rewards.new_tensor(self._rollout_failed)).bool()  # type: ignore[attr-defined]
        return rewards.masked_fill(failed[:, None], float("nan"))

    @contextmanager
    def _rollout_generation(self) -> Iterator[None]:
        """Hold what belongs to one generation of several turns."""
        self._rollout.keys.begin_generation(mode_of(self), self.state.global_step)  # type: ignore[attr-defined]
        try:
            yield
        finally:
            self._rollout.close_session()
            self._rollout_failed = None


def with_rollout(trainer: type) -> Any:
    """Return a subclass of a TRL trainer that generates with an `Engine`.

    Args:
        trainer: ``GRPOTrainer``, ``RLOOTrainer``, ``DistillationTrainer``, or a subclass that generates as they do.

    Raises:
        InputError: the class generates in another way; the message says what is unknown.
    """
    return type(f"Rollout{trainer.__name__}", (RolloutMixin, trainer), {"_rollout_seam": seam_of(trainer)})
