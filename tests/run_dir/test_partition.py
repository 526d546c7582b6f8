"""How many input rows a shard gets."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from rollout.run_dir.partition import TOKENS_PER_SHARD, choose_rows_per_shard, rows_per_shard
from tests.support.jobs import config_of


@pytest.mark.parametrize(
    ("rows", "wanted", "workers", "expected"),
    [(10_000, 1024, 1, 1024), (10, 1024, 1, 1024), (64, 1024, 2, 4), (10_000, 1024, 2, 625), (10_000, 100, 2, 100)],
)
def test_several_workers_get_eight_shards_each_or_more(rows: int, wanted: int, workers: int, expected: int) -> None:
    assert choose_rows_per_shard(rows, wanted, workers, tokens_per_row=256) == expected


@pytest.mark.parametrize(
    ("tokens_per_row", "workers", "expected"),
    [(1024, 1, 8192), (1025, 1, 8184), (8 * 32_768, 1, 32), (8 * 32_768, 64, 32), (2**30, 1, 1), (1024, 64, 1954)],
)
def test_no_shard_can_have_more_tokens_than_a_commit_should_handle(
    tokens_per_row: int, workers: int, expected: int
) -> None:
    chosen = choose_rows_per_shard(1_000_000, 8192, workers, tokens_per_row)
    assert chosen == expected
    assert chosen == 1 or chosen * tokens_per_row <= TOKENS_PER_SHARD


@pytest.mark.parametrize(("tokens", "said"), [(1 << 20, True), (256, False)])
def test_the_start_of_a_run_says_where_tokens_make_shards_smaller(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, tokens: int, said: bool
) -> None:
    config = config_of(tmp_path, "sampling.n=4", f"sampling.max_new_tokens={tokens}", "output.rows_per_shard=100")
    with caplog.at_level(logging.INFO, "rollout"):
        assert rows_per_shard(config, rows=50, workers=1) == (2 if said else 100)
    assert ("Shards get 2 prompts instead of output.rows_per_shard=100" in caplog.text) is said
