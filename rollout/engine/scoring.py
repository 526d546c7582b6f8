"""Score pairs of a prompt and a completion: one call on a live module."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from rollout.engine.kv_memory import IdleMemory, KVMemory
from rollout.engine.live_module import LiveModule
from rollout.engine.scoring_loop import ForwardLimits, ScoringLoop
from rollout.engine.scoring_sequences import Pair, make_sequences
from rollout.headroom.headroom import Headroom, after_reserve
from rollout.models.kv_cache.layout import KVLayout
from rollout.models.module.inspect import (
    context_limit,
    forward_parameters,
    logits_size,
    unwrap_model,
    vocabulary_size,
)
from rollout.models.module.signals import deliver_signals
from rollout.scores import Scores, ScoringStats

#: Tokens of a forward; more make it no faster, and their activations take memory.
_TOKENS = {"cpu": 1024, "cuda": 8192}
#: Most bytes of a forward's logits, and their largest share of the free memory.
_LOGITS_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
_LOGITS_SHARE = 0.125
#: Bytes of one logit, at most: models that scale or cap logits hold two copies in float32.
_LOGIT_BYTES = 8
#: Length in tokens for which `Scoring.working_bytes` counts KV memory; longer pairs take more.
_LONGEST = 8192


class Scoring:
    """Scores on a live module, one call at a time.

    Args:
        module: the live module.
        headroom: free memory to follow.
        sessions: what open sessions keep, which makes way.
        max_kv_bytes: limit on KV bytes; None: all headroom.
        reserve_fraction: share of the device's total memory to leave free.
    """

    def __init__(
        self,
        module: LiveModule,
        headroom: Headroom,
        sessions: IdleMemory,
        *,
        max_kv_bytes: int | None,
        reserve_fraction: float,
    ) -> None:
        self._module = module
        self._headroom = headroom
        self._max_kv_bytes = max_kv_bytes
        self._reserve_fraction = reserve_fraction
        self._sessions = sessions

    def run(self, pairs: Sequence[Pair]) -> Scores:
        """Score the pairs; a pair that cannot be scored has an error, and the others are unaffected.

        Raises:
            UnsupportedModel: the model's active PEFT adapter cannot be served.
        """
        with self._module.call():
            return self._run(pairs)

    def _run(self, pairs: Sequence[Pair]) -> Scores:
        """Score the pairs while the module's weights are gathered."""
        start = time.perf_counter()
        # Before the KV budget: the packed weights take their share of memory.
        layout = self._module.prepare(self._free_bytes)
        strategy = self._module.strategy
        checked = self._checked(pairs)
        sequences = make_sequences(checked, layout, share=not strategy.prefills_whole_context)
        limits = self._limits()
        kv = self._kv_memory(layout, min(2 * limits.tokens, sum(len(sequence.ids) for sequence in sequences)))
        loop = ScoringLoop(
            checked,
            sequences,
            runner=strategy.runner(kv.pool),
            kv=kv,
            limits=limits,
            whole_context=strategy.prefills_whole_context,
            prefix_first=not strategy.runs_layers_together,
            sync=self._module.sync,
        )
        try:
            with self._module.borrowed():
                while loop.step():
                    deliver_signals()
            scores = loop.scores()
        finally:
            loop.close()
        stats = ScoringStats(
            pairs=len(checked),
            error_pairs=sum(bool(score.error_class) for score in scores),
            prompt_tokens=sum(len(pair.prompt_ids) for pair in checked),
            completion_tokens=sum(len(pair.completion_ids) for pair in checked),
            **asdict(loop.tally),
            peak_kv_bytes=kv.peak_bytes,
            kv_bytes_held=kv.bytes_held,
            seconds=time.perf_counter() - start,
        )
        return Scores(scores, stats)

    @property
    def working_bytes(self) -> int:
        """Memory that a call takes beside the weights: KV of pairs up to `_LONGEST` tokens, logits and activations."""
        model = self._module.model
        config: Any = unwrap_model(model).config.get_text_config(decoder=True)
        limits, layout = self._limits(), self._module.layout()
        longest = min(_LONGEST, context_limit(config) or _LONGEST)
        kv = (limits.tokens + longest) * layout.bytes_per_token + 64 * layout.bytes_per_row
        inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        activations = limits.tokens * (8 * config.hidden_size + 4 * inner) * layout.dtype.itemsize
        return int(kv + activations + limits.logits * _LOGIT_BYTES * logits_size(model))

    def _checked(self, pairs: Sequence[Pair]) -> list[Pair]:
        """Return the pairs with an error where the model cannot score them; of the weights as they are now."""
        model = self._module.model
        vocabulary = vocabulary_size(model)
        limit = context_limit(unwrap_model(model).config)
        completion_vocabulary = min(vocabulary, logits_size(model))

        def checked(pair: Pair) -> Pair:
            if pair.error_class:
                return pair
            if not len(pair.prompt_ids):
                error = "The prompt has no tokens, and a completion's first token has no probability without any."
                return replace(pair, error_class="empty_prompt", error=error)
            if limit is not None and len(pair) > limit:
                error = f"Prompt and completion have {len(pair)} tokens, but the model's context is {limit}."
                return replace(pair, error_class="too_long", error=error)
            for name, ids, size in (
                ("prompt", pair.prompt_ids, vocabulary),
                ("completion", pair.completion_ids, completion_vocabulary),
            ):
                if len(ids) and (ids.min() < 0 or ids.max() >= size):
                    error = f"The {name} has token ids outside of the vocabulary of {size}."
                    return replace(pair, error_class=f"bad_{name}", error=error)
            return pair

        return [checked(pair) for pair in pairs]

    def _limits(self) -> ForwardLimits:
        """Return the limits of a forward, by the device and the memory that is free."""
        model, kind = self._module.model, self._module.device.type
        free = min(_LOGITS_BYTES[kind], int(_LOGITS_SHARE * max(0.0, self._free_bytes())))
        logits = max(1, free // (_LOGIT_BYTES * logits_size(model)))
        # Models without this argument compute the logits of all tokens.
        tokens = _TOKENS[kind] if "logits_to_keep" in forward_parameters(model) else min(_TOKENS[kind], logits)
        return ForwardLimits(tokens, min(tokens, logits))

    def _free_bytes(self) -> float:
        return after_reserve(self._headroom, self._reserve_fraction)

    def _kv_memory(self, layout: KVLayout, expected_tokens: int) -> KVMemory:
        return KVMemory(
            layout,
            self._headroom,
            self._module.device,
            max_kv_bytes=self._max_kv_bytes,
            reserve_fraction=self._reserve_fraction,
            expected_tokens=expected_tokens,
            sync=self._module.sync,
            idle=self._sessions,
        )
