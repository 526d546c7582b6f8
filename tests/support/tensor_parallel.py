"""A tensor parallel launch of two processes, each of which runs ``python -m tests.support.tensor_parallel MODEL …``.

They generate with a random headroom that differs per process, then with room for few pages, and write the records
to ``MODEL/RANK.json``.
"""

from __future__ import annotations

import json
import os
import random
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import distributed
from transformers import PreTrainedModel

from rollout import Engine, SamplingParams
from rollout.engine.loop import Loop
from rollout.models.loading.load import ModelSource, load_model, resolve_device
from tests.support.devices import DEVICE
from tests.support.forks import output_of_ranks

PROMPTS = [list(range(3, 3 + length)) for length in (5, 20, 33, 12)]
GREEDY = SamplingParams(temperature=0, max_new_tokens=24)
SAMPLED = SamplingParams(n=3, max_new_tokens=24, top_p=0.9)
#: Fewer than the 12 rows need, which are up to 4 pages each.
_PAGES = 10


def assert_records_match_one_process(models: dict[str, PreTrainedModel], folder: Path) -> None:
    """Generate with each model in two processes and in this one, and compare the records."""
    for name, model in models.items():
        model.save_pretrained(folder / name)
    output_of_ranks("tests.support.tensor_parallel", *(str(folder / name) for name in models))
    for name, model in models.items():
        reports: list[dict[str, Any]] = [json.loads((folder / name / f"{rank}.json").read_text()) for rank in (0, 1)]
        assert reports[0] == reports[1]
        assert reports[0]["heads"] == [model.config.num_key_value_heads // 2] * model.config.num_hidden_layers
        assert min(reports[0]["preempted"]) > 0, "no row was preempted"
        engine = Engine(model, None)
        greedy, sampled = (list(engine.generate(PROMPTS, params, seed=7)) for params in (GREEDY, SAMPLED))
        expected = [*greedy, *sampled]
        assert len(reports[0]["records"]) == len(expected)
        for ours, theirs in zip(reports[0]["records"], expected, strict=True):
            assert ours["completion_ids"] == theirs.completion_ids
            np.testing.assert_allclose(ours["logprobs"], theirs.logprobs, atol=1e-5)
        for record, prompt in zip(greedy, PROMPTS, strict=True):
            ids = torch.tensor([prompt], device=DEVICE)
            whole = model.generate(ids, do_sample=False, max_new_tokens=24)[0, len(prompt) :]
            assert record.completion_ids == whole.tolist()


class RandomHeadroom:
    """Random free memory, which differs per process."""

    total_bytes = 1 << 20

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    def free_bytes(self) -> int:
        return self._rng.randrange(-50_000, 400_000)


def main(model: str) -> None:
    """Generate with a model as one rank of the launch and write its report."""
    rank = int(os.environ["RANK"])
    model_slice = load_model(ModelSource(model, dtype="float32", tensor_parallel=True), resolve_device())
    squeezed = Engine(model_slice, None, latency_budget_ms=5.0, reserve_fraction=0.0, headroom=RandomHeadroom(rank))
    layout = squeezed._module.strategy.kv_layout()
    tight = Engine(model_slice, None, policy="static", max_kv_bytes=_PAGES * layout.bytes_per_page)
    batches = [squeezed.generate(PROMPTS, GREEDY, seed=7)]
    with patch("rollout.engine.generation.Loop", partial(Loop, overlap=True)):
        batches.append(tight.generate(PROMPTS, SAMPLED, seed=7))
    report = {
        "heads": [site.kv_heads for site in layout.layers],
        "records": [asdict(record) for batch in batches for record in batch],
        "preempted": [batch.stats.preempted_rows for batch in batches],
        "steps": [batch.stats.steps for batch in batches],
    }
    (Path(model) / f"{rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for folder in sys.argv[1:]:
        main(folder)
    distributed.destroy_process_group()
