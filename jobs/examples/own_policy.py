"""A batching policy of your own: one more sample per step while steps are fast, half of them after a slow one."""

from __future__ import annotations

import argparse

import torch

from rollout import Engine, SamplingParams
from rollout.batcher.types import Decision, Observation
from rollout.models.loading.load import ModelSource, load_model, load_tokenizer


class AdditiveIncrease:
    """Additive increase, multiplicative decrease, as TCP finds the rate of a link.

    A policy sees only its observations: no clock, no model. So it also runs in a simulator.
    """

    def __init__(self, budget_ms: float, most_rows: int = 256) -> None:
        self.budget_ms = budget_ms
        self.most_rows = most_rows
        self.rows = 1

    def decide(self, observation: Observation) -> Decision:
        """Return the number of live samples for the next step; the engine lowers it where memory is short."""
        slow = any(step.ms > self.budget_ms for step in observation.steps)
        if slow:
            self.rows = max(1, self.rows // 2)
        elif observation.waiting_rows:
            self.rows = min(self.most_rows, self.rows + 1)
        return Decision(rows=self.rows, prefill_tokens=256, reason="slow" if slow else "fast")


def main() -> None:
    """Generate with the policy, and print what became of the batch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget-ms", type=float, default=500.0)
    parser.add_argument("--samples", type=int, default=16)
    options = parser.parse_args()

    source = ModelSource(path="packaged:SmolLM2-135M-Instruct")  # or any transformers model that you have loaded
    model, tokenizer = load_model(source, torch.device("cpu")), load_tokenizer(source)

    engine = Engine(model, tokenizer, policy=AdditiveIncrease(options.budget_ms))
    params = SamplingParams(n=options.samples, max_new_tokens=24)
    batch = engine.generate([[{"role": "user", "content": "Name a colour."}]], params)
    stats = batch.stats
    print(f"{len(batch)} samples in {stats.steps} steps, {stats.live_rows_min} to {stats.live_rows_max} live")
    print(f"{stats.target_changes} changes of the target, {stats.tokens_per_s:.1f} tokens/s")


if __name__ == "__main__":
    main()
