"""The scoring loop: each forward takes the next chunks of many sequences, within memory."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rollout.batcher.types import IntArray
from rollout.engine.kv_memory import KVMemory
from rollout.engine.recomputation import Recomputation
from rollout.engine.scoring_schedule import ScoringSchedule
from rollout.engine.scoring_sequences import Chunk, Pair, ScoredSequence, build_batch, plan_chunks
from rollout.engine.tp_sync import SingleProcess
from rollout.models.arrays import uploaded
from rollout.models.device import is_out_of_memory
from rollout.models.runners.base import Runner
from rollout.models.sampling.token_logprobs import token_logprobs
from rollout.scores import Score

logger = logging.getLogger(__name__)

#: Seconds to wait for other processes to free memory on a device that holds none of our sequences.
_PATIENCE_S = 60.0
_RETRY_S = 0.05
#: Forwards without an allocator failure after which halved limits are doubled.
_CALM_FORWARDS = 64


@dataclass(frozen=True, slots=True)
class ForwardLimits:
    """Most tokens of a forward, and most of them whose logits are computed; at least 1 each."""

    tokens: int
    logits: int

    def halved(self) -> ForwardLimits:
        """Return half of both."""
        return ForwardLimits(max(1, self.tokens // 2), max(1, self.logits // 2))

    def doubled(self, most: ForwardLimits) -> ForwardLimits:
        """Return twice both, up to ``most``."""
        return ForwardLimits(min(most.tokens, 2 * self.tokens), min(most.logits, 2 * self.logits))


@dataclass(slots=True)
class ScoringTally:
    """Counters of a loop; `rollout.scores.ScoringStats` says what each one means."""

    computed_tokens: int = 0
    forwards: int = 0
    out_of_memory_events: int = 0


@dataclass(frozen=True, slots=True)
class _Pending:
    """A forward whose log-probabilities have not been read yet."""

    chunks: Sequence[Chunk]
    logprobs: torch.Tensor


class ScoringLoop:
    """Scores pairs: call `step` until it returns False, then `close`.

    Args:
        pairs: what to score.
        sequences: those of the pairs, each after its prefix.
        runner: runs the model on the pages of ``kv``.
        kv: the KV pages and the memory they may grow into.
        limits: of one forward.
        whole_context: every forward of a sequence begins with its first token.
        prefix_first: a prefix must be in its pages before the forward of a sequence that shares them.
        sync: agrees with the other ranks of a tensor-parallel model.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        sequences: Iterable[ScoredSequence],
        *,
        runner: Runner,
        kv: KVMemory,
        limits: ForwardLimits,
        whole_context: bool,
        prefix_first: bool,
        sync: SingleProcess,
    ) -> None:
        self._pairs = pairs
        self._runner = runner
        self._kv = kv
        self._most = self._limits = limits
        self._whole_context = whole_context
        self._prefix_first = prefix_first
        self._sync = sync
        self._overlap = kv.pool.device.type == "cuda"
        self._schedule = ScoringSchedule(kv, sequences, whole_context=whole_context, settle=self._settle)
        self._pending: _Pending | None = None
        self._calm_forwards = 0
        self._stuck_since: float | None = None
        self._logprobs = [np.zeros(len(pair.completion_ids), np.float32) for pair in pairs]
        self._errors = {i: (pair.error_class, pair.error) for i, pair in enumerate(pairs) if pair.error_class}
        self.tally = ScoringTally()

    def step(self) -> bool:
        """Run one forward; on an allocator failure, back off instead. Return False when all pairs are scored."""
        if not self._schedule:
            return False
        try:
            self._step()
        except (RuntimeError, MemoryError) as error:
            # The other ranks are blocked in this forward's collectives and cannot be interrupted.
            if not is_out_of_memory(error) or not self._sync.alone:
                raise
            self._back_off()
        return True

    def scores(self) -> tuple[Score, ...]:
        """Return the score of each pair."""
        return tuple(
            Score(error_class=self._errors[i][0], error=self._errors[i][1])
            if i in self._errors
            else Score(logprobs.tolist())
            for i, logprobs in enumerate(self._logprobs)
        )

    def close(self) -> None:
        """Free all memory."""
        self._pending = None
        self._schedule.close()
        self._runner.close()

    def _step(self) -> None:
        self._kv.read_headroom(self._runner.bytes_kept)
        self._schedule.shrink(self._kv.excess_bytes)
        needed_pages = self._schedule.admit(self._limits.tokens)
        chunks = plan_chunks(
            self._schedule.live,
            self._limits.tokens,
            self._limits.logits,
            Recomputation(self._kv.pool.layout),
            whole_context=self._whole_context,
            prefix_first=self._prefix_first,
        )
        if not chunks:
            if not self._settle() and needed_pages is not None:
                self._wait_or_give_up(needed_pages)
            return
        batch = build_batch(chunks, self._kv.pool.layout, self._kv.pool.device)
        logprobs = self._token_logprobs(chunks, self._runner.forward(batch))
        # On a GPU the previous forward's numbers are read now, so that the device never waits for the host.
        self._settle()
        self._pending = _Pending(chunks, logprobs)
        for chunk in chunks:
            chunk.sequence.computed = chunk.end
        if not self._overlap:
            self._settle()
        self.tally.forwards += 1
        self.tally.computed_tokens += int(batch.query_lens.sum())
        self._stuck_since = None
        self._calm_forwards += 1
        if self._calm_forwards % _CALM_FORWARDS == 0:
            self._limits = self._limits.doubled(self._most)

    def _token_logprobs(self, chunks: Sequence[Chunk], logits: torch.Tensor) -> torch.Tensor:
        """Return [K] the log-probability of the completion token that follows each token of ``logits`` [K, V]."""
        pairs = [self._pairs[chunk.sequence.pairs[0]] for chunk in chunks]
        followers: list[IntArray] = [
            pair.completion_ids[chunk.first_target :][: chunk.wanted] for pair, chunk in zip(pairs, chunks, strict=True)
        ]
        temperatures = np.repeat([np.float32(pair.temperature) for pair in pairs], [chunk.wanted for chunk in chunks])
        return token_logprobs(
            logits, uploaded(np.concatenate(followers), logits.device), uploaded(temperatures, logits.device)
        )

    def _settle(self) -> bool:
        """Read the pending log-probabilities and end the pairs that are done. Return whether any were pending."""
        pending, self._pending = self._pending, None
        if pending is None:
            return False
        read = pending.logprobs.cpu().numpy()
        start = 0
        for chunk in pending.chunks:
            if not chunk.wanted:
                continue
            index, first = chunk.sequence.pairs[0], chunk.first_target
            self._logprobs[index][first : first + chunk.wanted] = read[start : start + chunk.wanted]
            start += chunk.wanted
            if chunk.end == len(chunk.sequence.ids):
                failed = bool(np.isnan(self._logprobs[index]).any())
                if failed:
                    self._errors[index] = ("not_finite", "The model's logits are not finite.")
                self._schedule.end(chunk.sequence, scrub=failed)
        return True

    # -- when memory runs out ------------------------------------------------------------------------

    def _back_off(self) -> None:
        """Recover from an allocator failure: smaller forwards, then waiting with nothing on the device."""
        self._settle()
        self.tally.out_of_memory_events += 1
        tokens = self._limits.tokens
        logger.warning("Out of memory in a forward of up to %d tokens; continuing with fewer.", tokens)
        smaller = self._limits.halved()
        fits = smaller != self._limits
        self._limits = smaller
        schedule = self._schedule
        while schedule.live and (not fits or schedule.planned_tokens - schedule.live[-1].remaining >= smaller.tokens):
            schedule.preempt_youngest()
        self._kv.release_idle()
        schedule.drop_free_slabs()
        self._runner.shed()
        self._kv.release_cached()
        if not fits and schedule.queue:
            self._wait_or_give_up(self._kv.pool.layout.pages_for(1))

    def _wait_or_give_up(self, pages: int) -> None:
        """Wait for memory for the next sequence, which needs ``pages``; give it up if it can never fit or waited long.

        Called when the device holds no sequence of ours that can go on. Other processes may free memory; patience is
        `_PATIENCE_S` without a forward.
        """
        now = self._sync.first_rank_value(time.monotonic())
        self._stuck_since = self._stuck_since or now
        if self._schedule.could_hold(pages) and now - self._stuck_since < _PATIENCE_S:
            time.sleep(_RETRY_S)
            return
        self._stuck_since = None
        self._limits = self._most
        for index in self._schedule.give_up():
            error = f"A sequence of {len(self._pairs[index])} tokens does not fit into {self._kv.bound}, even alone."
            self._errors[index] = ("too_large", error)
