"""This project's engine: all requests in one call, log-probabilities recorded as usual."""

from __future__ import annotations

from jobs.bench.engines.harness import Generate, Task, main
from jobs.bench.engines.loading import load
from rollout import Engine, SamplingParams


def prepare(task: Task) -> Generate:
    """Load the engine; the cap is ``max_rows``, and without one the policy alone decides."""
    model = load(task)
    # Token ids in and out, as for the other engines, so no tokenizer.
    engine = Engine(model, None) if task.cap is None else Engine(model, None, max_rows=task.cap)
    prompts = [list(request.ids) for request in task.requests]
    params = [SamplingParams(temperature=1.0, max_new_tokens=request.n, ignore_eos=True) for request in task.requests]

    def generate() -> int:
        return sum(len(record.completion_ids) for record in engine.generate(prompts, params, seed=0))

    return generate


if __name__ == "__main__":
    main(prepare)
