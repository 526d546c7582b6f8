"""A reward of your own: a right answer scores 1, and each word beyond a limit costs a little."""

from __future__ import annotations

from typing import Any

from rollout.arithmetic import exact_match


def right_and_short(prompt_row: dict[str, Any], completion_text: str, most_words: int = 40) -> float:
    """Score a completion.

    Args:
        prompt_row: the columns of the input row, here with ``answer``.
        completion_text: without special tokens.
        most_words: set by ``+reward.most_words=20``.
    """
    extra_words = max(0, len(completion_text.split()) - most_words)
    return exact_match(prompt_row, completion_text) - 0.01 * extra_words
