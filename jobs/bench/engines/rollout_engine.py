"""This project's engine: all requests in one call, log-probabilities recorded as usual."""

from __future__ import annotations

from collections.abc import Sequence

from jobs.bench.engines.harness import Bind, Generate, Setup
from jobs.bench.engines.loading import load
from jobs.bench.lib.workload import Request
from rollout import Engine, SamplingParams


def prepare(setup: Setup) -> Bind:
    """Load the engine; the cap is ``max_rows``, and without one the policy alone decides."""
    model = load(setup)
    # Token ids in and out, as for the other engines, so no tokenizer.
    engine = Engine(model, None) if setup.cap is None else Engine(model, None, max_rows=setup.cap)

    def bind(requests: Sequence[Request]) -> Generate:
        prompts = [list(request.ids) for request in requests]
        params = [SamplingParams(temperature=1.0, max_new_tokens=request.n, ignore_eos=True) for request in requests]
        return lambda: sum(len(record.completion_ids) for record in engine.generate(prompts, params, seed=0))

    return bind
