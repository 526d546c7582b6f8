"""Scores: the log-probabilities of given completions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Score:
    """The log-probabilities of one completion, or the error that prevented them.

    ``logprobs`` has one number per completion token: ``log_softmax(logits / temperature)`` over the full vocabulary in
    fp32 (raw logits at temperature 0). It is empty if the completion is, or if ``error_class`` says why it could not be
    scored.
    """

    logprobs: list[float] = field(default_factory=list)
    error_class: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True)
class ScoringStats:
    """Totals of one call."""

    pairs: int
    """Prompts with a completion."""
    error_pairs: int
    prompt_tokens: int
    """Prompt tokens of all pairs; a prompt that pairs share counts once per pair."""
    completion_tokens: int
    """Completion tokens of all pairs."""
    computed_tokens: int
    """Tokens that went through the model. A prompt that pairs share goes through once, but for its last page."""
    forwards: int
    out_of_memory_events: int
    peak_kv_bytes: int
    kv_bytes_held: int
    """KV bytes held after the call: 0."""
    seconds: float
    """Wall time of the call."""


@dataclass(frozen=True, slots=True)
class Scores:
    """The scores of one call, in the order of the pairs."""

    scores: tuple[Score, ...]
    stats: ScoringStats

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, index: int) -> Score:
        return self.scores[index]

    def __iter__(self) -> Iterator[Score]:
        return iter(self.scores)

    @property
    def logprobs(self) -> list[list[float] | None]:
        """One list per pair, with one number per completion token; None where the pair has an error."""
        return [None if score.error_class else score.logprobs for score in self.scores]
