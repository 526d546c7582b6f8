"""Measure ``batch_invariant`` on a GPU: steps and prefills with it and without, and the greedy tokens that differ.

python -m jobs.gpu.invariant qwen2.5-1.5b
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch

from jobs.bench.lib.spies import watched
from jobs.gpu.common import TINY, ended, guarded, random_model, say, start
from jobs.gpu.steps import ROWS, Steps, prefill
from rollout import Engine, Record, SamplingParams

#: Most live rows of each run; its prompts are the first of the largest run's.
CAPS = (6, 4, 1) if TINY else (256, 64, 5)
NEW_TOKENS = 8 if TINY else 64


def differences(model: Any, batch_invariant: bool) -> None:
    """Report how many greedy tokens, and the log-probabilities of equal ones, differ between row counts."""
    draws = torch.Generator().manual_seed(4)
    prompts = torch.randint(3, 150, (CAPS[0], 24), generator=draws).tolist()
    params = SamplingParams(temperature=0.0, max_new_tokens=NEW_TOKENS, ignore_eos=True)
    runs: list[list[Record]] = []
    for cap in CAPS:
        engine = Engine(model, None, max_rows=cap, batch_invariant=batch_invariant)
        runs.append(list(engine.generate(prompts[: CAPS[1]] if runs else prompts, params)))
    for cap, other in zip(CAPS[1:], runs[1:], strict=True):
        found = [compared(one, two) for one, two in zip(runs[0], other, strict=False)]
        say(
            f"    batch_invariant={batch_invariant}, {CAPS[0]} rows against {cap}: {sum(n for n, _ in found)} of"
            f" {len(found) * NEW_TOKENS} greedy tokens differ; |dlogp| of those before {max(d for _, d in found):.1e}"
        )


def compared(one: Record, other: Record) -> tuple[int, float]:
    """Return how many tokens of two completions differ, and the largest difference of log-probabilities before."""
    pairs = list(zip(one.completion_ids, other.completion_ids, strict=True))
    same = next((place for place, (a, b) in enumerate(pairs) if a != b), len(pairs))
    gaps = (abs(a - b) for a, b in zip(one.logprobs[:same], other.logprobs[:same], strict=True))
    return sum(a != b for a, b in pairs), max(gaps, default=0.0)


def main() -> None:
    """Measure in the order of value."""
    parser = argparse.ArgumentParser(description="Measures batch_invariant.")
    parser.add_argument("shape")
    given = parser.parse_args()
    start(given.shape)
    model = random_model(given.shape)
    with watched() as spies:
        steps = Steps(model, spies)
        guarded("greedy tokens, on", partial(differences, model, batch_invariant=True))
        guarded(f"{ROWS[0]} rows, on", partial(steps.profiled, ROWS[0], "on", named=4, batch_invariant=True))
        guarded(f"{ROWS[1]} rows, on", partial(steps.measure, ROWS[1], "on", batch_invariant=True))
        guarded("prefill, on", partial(prefill, model, "on ", batch_invariant=True))
        guarded("greedy tokens, off", partial(differences, model, batch_invariant=False))
        guarded(f"{ROWS[0]} rows, off", partial(steps.measure, ROWS[0], "off"))
        guarded(f"{ROWS[1]} rows, off", partial(steps.measure, ROWS[1], "off"))
    ended()


if __name__ == "__main__":
    main()
