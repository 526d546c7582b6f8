"""Counters of one `Engine` call. Rows are batch rows: one sample of one prompt each."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class Stats:
    """Totals of one call."""

    samples: int
    error_samples: int
    prompt_tokens: int
    """Prompt tokens of all samples; a prompt that samples share counts once per sample."""
    output_tokens: int
    prefilled_tokens: int
    """Tokens that went through prefill, recomputation included."""
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
    """KV bytes held after the call: 0."""
    seconds: float
    """Wall time of the call."""
    deciding_seconds: float
    """Part of ``seconds`` spent observing and deciding."""
    target_changes: int
    """Decisions whose row target differs from the previous one."""
    paused_row_steps: int
    """Tokens that live rows did not get because they were paused to keep the latency budget."""

    @property
    def tokens_per_s(self) -> float:
        return self.output_tokens / self.seconds if self.seconds else 0.0


@dataclass(slots=True)
class Tally:
    """Counters that a running loop updates; `Stats` says what each one means."""

    samples: int = 0
    error_samples: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    prefilled_tokens: int = 0
    sampled_tokens: int = 0
    """Sampled tokens, including those discarded because their row had already finished."""
    preempted_rows: int = 0
    recomputed_tokens: int = 0
    out_of_memory_events: int = 0
    steps: int = 0
    live_rows_min: int | None = None
    live_rows_max: int = 0
    deciding_seconds: float = 0.0
    target_changes: int = 0
    paused_row_steps: int = 0

    def count_live_rows(self, live: int, waiting: int) -> None:
        """Update the extremes of live rows with one step's counts."""
        self.live_rows_max = max(self.live_rows_max, live)
        if waiting:
            self.live_rows_min = live if self.live_rows_min is None else min(self.live_rows_min, live)

    def stats(self, peak_kv_bytes: int, kv_bytes_held: int, seconds: float) -> Stats:
        """Return the totals so far."""
        counters = asdict(self)
        del counters["sampled_tokens"]
        if self.live_rows_min is None:
            counters["live_rows_min"] = self.live_rows_max
        return Stats(**counters, peak_kv_bytes=peak_kv_bytes, kv_bytes_held=kv_bytes_held, seconds=seconds)
