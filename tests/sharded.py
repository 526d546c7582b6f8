"""What each process of a launch runs that holds one model together: ``python -m tests.sharded MODEL …``.

Generates with a headroom of random numbers, other ones in each process, and writes the records to ``MODEL/RANK.json``.
"""

from __future__ import annotations

import json
import os
import random
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from torch import distributed

from rollout import Engine, SamplingParams
from rollout.models.load import ModelSource, load_model

PROMPTS = [list(range(3, 3 + length)) for length in (5, 20, 33, 12)]
GREEDY = SamplingParams(temperature=0, max_new_tokens=24)
SAMPLED = SamplingParams(n=3, max_new_tokens=24, top_p=0.9)


class RandomHeadroom:
    """Free memory that no two processes see alike."""

    total_bytes = 1 << 20

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    def free_bytes(self) -> int:
        return self._rng.randrange(-50_000, 400_000)


def main(model: str) -> None:
    """Generates with one of the models."""
    rank = int(os.environ["RANK"])
    held = load_model(ModelSource(model, dtype="float32", tensor_parallel=True), torch.device("cpu"))
    engine = Engine(held, None, latency_budget_ms=5.0, reserve_fraction=0.0, headroom=RandomHeadroom(rank))
    heads = [site.kv_heads for site in engine._tier.probe().sites]
    batches = [engine.generate(PROMPTS, params, seed=7) for params in (GREEDY, SAMPLED)]
    told = {
        "heads": heads,
        "records": [asdict(record) for batch in batches for record in batch],
        "preempted": sum(batch.stats.preempted_rows for batch in batches),
        "steps": sum(batch.stats.steps for batch in batches),
    }
    (Path(model) / f"{rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for folder in sys.argv[1:]:
        main(folder)
    distributed.destroy_process_group()
