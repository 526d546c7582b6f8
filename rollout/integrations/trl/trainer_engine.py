"""The engine of one trainer: made when the trainer first generates, on the module that it trains."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rollout.batcher.suggestions import describe_names
from rollout.engine.engine import Engine
from rollout.engine.session import Session
from rollout.errors import InputError
from rollout.integrations.trl.call_keys import CallKeys, Mode
from rollout.integrations.trl.completions import Completions, completions_of
from rollout.integrations.trl.sampling import trainer_params
from rollout.integrations.trl.turns import Turns
from rollout.models.module.inspect import unwrap_model
from rollout.records import Batch
from rollout.sampling_params import SamplingParams
from rollout.stats import Stats

#: What of the call's parity is logged: the engine's distance from the module's own forward, and that from itself.
_PARITY = ("max", "mean", "self_max", "self_mean")
_OPTIONS = [name for name in inspect.signature(Engine).parameters if name not in ("model", "tokenizer")]


class TrainerEngine:
    """Generates for a trainer with its arguments, its live weights and keys of its own.

    Args:
        options: arguments of `Engine`, by name.
        engine: an engine on the trainer's own model; None: one is made.
    """

    def __init__(self, options: Mapping[str, Any], engine: Engine | None = None) -> None:
        for name in options:
            if name not in _OPTIONS:
                raise InputError(
                    f"engine_options names {name!r}, which is no argument of Engine; {describe_names(name, _OPTIONS)}."
                )
        self._options = dict(options)
        self._given = engine
        self._engine = engine
        self._session: Session | None = None
        self._turns = Turns()
        self.keys = CallKeys()

    def generate(self, trainer: Any, prompt_ids: Sequence[Sequence[int]]) -> Completions:
        """Return one completion for each prompt, in their order; equal neighbours share their pages.

        With tools, the KV of finished rows is kept for their next turns until `close_session`.

        Raises:
            InputError: the trainer asks for something that the engine does not offer, or no prompt can be completed.
        """
        prompts = [list(ids) for ids in prompt_ids]
        row_ids = self.keys.next_turn(trainer.accelerator.process_index, len(prompts))
        if self.keys.turn == 0:
            self._turns.restart()
        shared, engine = trainer_params(trainer), self._of(trainer)
        left = self._turns.left(prompts, trainer.max_completion_length)
        # TRL cuts later turns alone.
        params = [_within(shared, tokens) for tokens in left] if self.keys.turn else shared
        if getattr(trainer, "tools", None) and self._session is None:
            self._session = engine.session()
        engine.weight_version = trainer.state.global_step
        # Accelerate patches the autocast into the forward of the outermost module alone.
        with trainer.accelerator.autocast():
            batch = (self._session or engine).generate(prompts, params, seed=trainer.args.seed, row_ids=row_ids)
        self._log(trainer, batch)
        done = completions_of(batch, eos_token_id(trainer))
        self._turns.ended(done.ids)
        return done

    def close_session(self) -> None:
        """Free the KV that is kept between turns."""
        if self._session is not None:
            self._session.close()
            self._session = None

    @property
    def stats(self) -> Stats | None:
        """Totals of the last call, None before the first."""
        return None if self._engine is None else self._engine.stats

    def _of(self, trainer: Any) -> Engine:
        """Return the engine on the module that the trainer trains now."""
        model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
        if self._given is not None:
            if unwrap_model(self._given.model) is not unwrap_model(model):
                raise InputError("engine is on another model than the trainer's: make it on trainer.model.")
            return self._given
        if self._engine is None or self._engine.model is not model:
            self._engine = Engine(model, tokenizer_of(trainer), **self._options)
        return self._engine

    def _log(self, trainer: Any, batch: Batch) -> None:
        stats, metrics = batch.stats, trainer._metrics[mode_of(trainer)]
        numbers = {
            "tokens_per_s": stats.tokens_per_s,
            "seconds": stats.seconds,
            "peak_kv_mib": stats.peak_kv_bytes / 2**20,
            "failed_rows": stats.error_samples,
            "reused_tokens": stats.reused_tokens,
            "prefix_hits": stats.prefix_hits,
            "pages_saved": stats.pages_saved,
            "preempted_rows": stats.preempted_rows,
        }
        if stats.parity is not None:
            numbers |= {f"parity_{name}": getattr(stats.parity, name) for name in _PARITY}
        for name, value in numbers.items():
            metrics[f"rollout/{name}"].append(float(value))


def _within(params: SamplingParams, tokens: int) -> SamplingParams:
    """Return the parameters with at most ``tokens`` tokens."""
    return replace(
        params,
        max_new_tokens=min(params.max_new_tokens, tokens),
        min_new_tokens=min(params.min_new_tokens, tokens),
    )


def mode_of(trainer: Any) -> Mode:
    """Return what the trainer does, as TRL tells it."""
    return "train" if trainer.model.training else "eval"


def tokenizer_of(trainer: Any) -> Any:
    """Return the tokenizer, also that inside a processor."""
    return getattr(trainer.processing_class, "tokenizer", trainer.processing_class)


def eos_token_id(trainer: Any) -> int:
    """Return an id that TRL takes for the end of a completion."""
    eos = trainer.generation_config.eos_token_id
    return int(eos[0] if isinstance(eos, list | tuple) else eos)
