"""Counters of one `Engine` call. Rows are batch rows: one sample of one prompt each."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Parity:
    """How far log-probabilities of one call are from the model's own forward, and how far that is from itself.

    A few finished rows are computed again by plain forwards of the module, as a trainer computes them: in eval mode
    with the module's own attention, under the caller's autocast, padded together. The distance of an engine that only
    rounds differently is about that of the module from itself, the same rows alone and padded together.
    """

    rows: int
    tokens: int
    max: float
    """Largest absolute difference between ``Record.logprobs``, as sampled, and the padded forward, in nats."""
    mean: float
    p99: float
    self_max: float
    """The same between the module's own forwards of the rows alone and padded together."""
    self_mean: float
    self_p99: float
    calls_ago: int = 0
    """How many calls ago the rows finished; 0 in this one. Small calls measure nothing of their own, to stay cheap."""

    @classmethod
    def of(cls, rows: int, differences: NDArray[np.float32], own: NDArray[np.float32]) -> Parity:
        """Sum up absolute differences [tokens] of the engine, and those of the module from itself."""
        return cls(rows, len(differences), *_extremes(differences), *_extremes(own))


def _extremes(differences: NDArray[np.float32]) -> tuple[float, float, float]:
    """Return maximum, mean and 99th percentile."""
    return float(differences.max()), float(differences.mean()), float(np.percentile(differences, 99))


@dataclass(frozen=True, slots=True)
class Stats:
    """Totals of one call."""

    samples: int
    error_samples: int
    aborted_samples: int
    """Samples that a stop condition ended, or the end of a stream or a call that was interrupted."""
    prompt_tokens: int
    """Prompt tokens of all samples; a prompt that samples share counts once per sample."""
    output_tokens: int
    """Tokens of all completions, without those that resumed samples had before the call."""
    prefilled_tokens: int
    """Tokens that went through prefill, recomputation included."""
    reused_tokens: int
    """Tokens that went through no prefill, since their keys and values were in memory: of prompts that began with the
    same tokens, or kept from earlier calls."""
    prefix_hits: int
    """Prefills that began with such tokens."""
    pages_saved: int
    """KV pages that those prefills shared, and did not take for themselves."""
    preempted_rows: int
    recomputed_tokens: int
    """Tokens whose keys and values were dropped by preemption."""
    out_of_memory_events: int
    steps: int
    live_rows_min: int
    """Fewest live rows in a step while rows were waiting; equal to ``live_rows_max`` when no row ever waited."""
    live_rows_max: int
    peak_kv_bytes: int
    kv_bytes_held: int
    """KV bytes held after the call: what a session keeps, else 0."""
    seconds: float
    """Wall time of the call."""
    deciding_seconds: float
    """Part of ``seconds`` spent observing and deciding."""
    target_changes: int
    """Decisions whose row target differs from the previous one."""
    paused_row_steps: int
    """Tokens that live rows did not get because they were paused to keep the latency budget."""
    kept_mass: float = 1.0
    """Mean of ``Record.kept_mass`` over the tokens of the call; 1 if there are none."""
    parity: Parity | None = None
    """The last comparison, of this call or of an earlier one; None if there is none yet, if the module's forward
    failed, or if the call was closed early."""

    @property
    def tokens_per_s(self) -> float:
        return self.output_tokens / self.seconds if self.seconds else 0.0


@dataclass(slots=True)
class Tally:
    """Counters that a running loop updates; `Stats` says what each one means."""

    samples: int = 0
    error_samples: int = 0
    aborted_samples: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    prefilled_tokens: int = 0
    sampled_tokens: int = 0
    """Sampled tokens, including those discarded because their row had already finished."""
    reused_tokens: int = 0
    prefix_hits: int = 0
    pages_saved: int = 0
    preempted_rows: int = 0
    recomputed_tokens: int = 0
    out_of_memory_events: int = 0
    steps: int = 0
    live_rows_min: int | None = None
    live_rows_max: int = 0
    deciding_seconds: float = 0.0
    target_changes: int = 0
    paused_row_steps: int = 0
    kept_mass: float = 0.0
    """Sum over tokens."""
    massed_tokens: int = 0
    """Tokens in the sum."""

    @property
    def computed_tokens(self) -> int:
        """Tokens that went through the model."""
        return self.prefilled_tokens + self.sampled_tokens

    def count_live_rows(self, live: int, waiting: int) -> None:
        """Update the extremes of live rows with one step's counts."""
        self.live_rows_max = max(self.live_rows_max, live)
        if waiting:
            self.live_rows_min = live if self.live_rows_min is None else min(self.live_rows_min, live)

    def stats(self, peak_kv_bytes: int, kv_bytes_held: int, seconds: float, parity: Parity | None = None) -> Stats:
        """Return the totals so far."""
        counters = asdict(self)
        del counters["sampled_tokens"]
        tokens = counters.pop("massed_tokens")
        counters["kept_mass"] = self.kept_mass / tokens if tokens else 1.0
        if self.live_rows_min is None:
            counters["live_rows_min"] = self.live_rows_max
        return Stats(
            **counters, peak_kv_bytes=peak_kv_bytes, kv_bytes_held=kv_bytes_held, seconds=seconds, parity=parity
        )
