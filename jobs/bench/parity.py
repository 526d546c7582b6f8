"""Families that give the model's own numbers: greedy against ``generate``, log-probabilities against a plain forward.

    python -m jobs.bench.parity

runs from the repository's root, on the tiny random models of the tests, with rows joining late and being preempted.
"""

from __future__ import annotations

import torch

from rollout import SamplingParams
from tests.contract.conftest import greedy, random_prompts, teacher_forced, tight_engine
from tests.families import SERVED, tiny

_NEW_TOKENS = 24


def main() -> None:
    """Prints a line for each family, and totals."""
    torch.set_num_threads(1)
    prompts = random_prompts(11, 7)
    params = SamplingParams(max_new_tokens=_NEW_TOKENS, temperature=0)
    worst, passed = 0.0, 0
    for family in SERVED:
        differences = {}
        for dtype in (torch.float32, torch.bfloat16):
            model = tiny(family, dtype=dtype)
            batch = tight_engine(model, 9, max_rows=4).generate(prompts, params)
            gaps = [(teacher_forced(model, record) - torch.tensor(record.logprobs)).abs() for record in batch]
            differences[dtype] = torch.cat(gaps)
            if dtype == torch.float32:
                same = sum(r.completion_ids == greedy(model, r.prompt_ids, _NEW_TOKENS) for r in batch)
        exact, half = differences[torch.float32], differences[torch.bfloat16]
        worst, passed = max(worst, float(exact.max())), passed + (same == len(prompts))
        print(
            f"{family:14} {same}/{len(prompts)} rows equal  max |Δ| fp32 {float(exact.max()):.1e}  "
            f"bf16 {float(half.max()):.1e} (mean {float(half.mean()):.1e})"
        )
    print(f"{passed} of {len(SERVED)} families pass; max |Δ logprob| in fp32 {worst:.1e}")


if __name__ == "__main__":
    main()
