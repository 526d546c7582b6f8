"""How many input rows a shard of a new run gets."""

from __future__ import annotations

import logging
import math

from rollout.config.schema import Config

logger = logging.getLogger(__name__)

SHARDS_PER_WORKER = 8
"""Least number of shards per worker when there are several, so that a slow worker does not delay the end."""
TOKENS_PER_SHARD = 1 << 23
"""Most completion tokens of a shard, so that its commit, and generating it again, stay small."""


def rows_per_shard(config: Config, rows: int, workers: int) -> int:
    """Choose the input rows per shard, and say so where tokens bound them."""
    configured = config.output.rows_per_shard
    tokens_per_row = config.sampling.n * config.sampling.max_new_tokens
    chosen = choose_rows_per_shard(rows, configured, workers, tokens_per_row)
    if chosen < choose_rows_per_shard(rows, configured, workers, tokens_per_row=1):
        logger.info(
            "Shards get %s prompts instead of output.rows_per_shard=%d, because each may hold %s tokens at most.",
            f"{chosen:,}",
            configured,
            f"{TOKENS_PER_SHARD:,}",
        )
    return chosen


def choose_rows_per_shard(rows: int, configured: int, workers: int, tokens_per_row: int) -> int:
    """Return the input rows per shard: as configured, or fewer.

    They are fewer so that several workers share them evenly, and where so many rows could have more than
    `TOKENS_PER_SHARD`.

    Args:
        tokens_per_row: most completion tokens of an input row, all its samples together.
    """
    shared = configured if workers == 1 else min(configured, math.ceil(rows / (SHARDS_PER_WORKER * workers)))
    return min(shared, max(1, TOKENS_PER_SHARD // tokens_per_row))
