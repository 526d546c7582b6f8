"""What a call of the engine did, in numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stats:
    """Totals of one call."""

    samples: int
    error_samples: int
    prompt_tokens: int
    """Prompt tokens of all samples, shared prompts counted once a sample."""
    output_tokens: int
    prefilled_tokens: int
    """Tokens that went through prefill, recomputation included."""
    preempted_rows: int
    recomputed_tokens: int
    """Tokens whose keys and values were dropped by preemption."""
    out_of_memory_events: int
    steps: int
    live_rows_min: int
    """Fewest rows alive in a step while rows were waiting; equal to ``live_rows_max`` when none ever waited."""
    live_rows_max: int
    peak_kv_bytes: int
    kv_bytes_held: int
    """After the call: 0."""
    seconds: float
    deciding_seconds: float
    """Part of ``seconds`` spent observing and deciding."""
    target_changes: int
    """Decisions that named another row target than the one before."""
    paused_row_steps: int
    """Tokens that live rows could have had and did not, paused for the latency budget."""

    @property
    def tokens_per_s(self) -> float:
        return self.output_tokens / self.seconds if self.seconds else 0.0


@dataclass(slots=True)
class Tally:
    """Counters of a running loop."""

    samples: int = 0
    error_samples: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    prefilled_tokens: int = 0
    preempted_rows: int = 0
    recomputed_tokens: int = 0
    out_of_memory_events: int = 0
    steps: int = 0
    drawn_tokens: int = 0
    live_rows_min: int | None = None
    live_rows_max: int = 0
    deciding_seconds: float = 0.0
    target_changes: int = 0
    paused_row_steps: int = 0

    def saw_live_rows(self, live: int, waiting: int) -> None:
        """Counts one step's rows."""
        self.live_rows_max = max(self.live_rows_max, live)
        if waiting:
            self.live_rows_min = live if self.live_rows_min is None else min(self.live_rows_min, live)

    def stats(self, peak_kv_bytes: int, kv_bytes_held: int, seconds: float) -> Stats:
        """The totals so far."""
        return Stats(
            samples=self.samples,
            error_samples=self.error_samples,
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            prefilled_tokens=self.prefilled_tokens,
            preempted_rows=self.preempted_rows,
            recomputed_tokens=self.recomputed_tokens,
            out_of_memory_events=self.out_of_memory_events,
            steps=self.steps,
            live_rows_min=self.live_rows_max if self.live_rows_min is None else self.live_rows_min,
            live_rows_max=self.live_rows_max,
            peak_kv_bytes=peak_kv_bytes,
            kv_bytes_held=kv_bytes_held,
            seconds=seconds,
            deciding_seconds=self.deciding_seconds,
            target_changes=self.target_changes,
            paused_row_steps=self.paused_row_steps,
        )
