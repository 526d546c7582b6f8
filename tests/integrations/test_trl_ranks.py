"""Two trainer processes: their samples differ, though their prompts do not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.forks import output_of_ranks


@pytest.mark.long
def test_two_ranks_draw_different_samples(tmp_path: Path) -> None:
    # As `accelerate launch --multi_gpu` sets it.
    accelerate = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "no"}
    output_of_ranks("tests.support.trl_ranks", str(tmp_path), **accelerate)
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]
    assert ranks[0]["prompts"] == ranks[1]["prompts"]
    samples = [tuple(ids) for rank in ranks for call in rank["ids"] for ids in call]
    assert len(samples) == 2 * 3 * 2
    assert len(set(samples)) == len(samples)
    assert max(max(rank["distances"]) for rank in ranks) < 1e-5
