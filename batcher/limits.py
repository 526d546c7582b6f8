"""What every policy counts and keeps: rows in decode and in prefill, and the user's bounds."""

from __future__ import annotations

import numpy as np

from rollout.batcher.types import Bounds, Observation


def decoding_rows(observation: Observation) -> int:
    """Live rows that have at least one token: the paper's N^d."""
    return int(np.count_nonzero(observation.generated_tokens))


def prefilling_rows(observation: Observation) -> int:
    """Rows that wait for admission or for the end of their prefill: the paper's N^p."""
    return observation.waiting_rows + observation.live_rows - decoding_rows(observation)


def within(rows: int, observation: Observation, bounds: Bounds) -> int:
    """``rows`` brought between the bounds, and not below the rows in decode.

    The floor is line 6 of Algorithm 1 and line 15 of Algorithm 2 (arXiv 2503.05248): a policy never sheds
    running work, only the engine's memory gate does. As there, ``max_rows`` goes before the floor.
    """
    return min(max(rows, decoding_rows(observation), bounds.min_rows), bounds.max_rows)
