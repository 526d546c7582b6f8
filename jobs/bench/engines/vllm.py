"""vLLM's offline call, with log-probabilities of the sampled tokens."""

from __future__ import annotations

import os
from typing import Any

from jobs.bench.engines.harness import Generate, Task, main

CONTEXT = 2048
CACHE_GB = "4"


def prepare(task: Task) -> Generate:
    """Load vLLM; the cap is its ``max_num_seqs``."""
    if task.device == "cpu":
        # vLLM's default leaves a core idle.
        cores = sorted(os.sched_getaffinity(0))
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
        os.environ.setdefault("OMP_NUM_THREADS", str(len(cores)))
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", CACHE_GB)
    # vLLM reads the environment while it is imported.
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found, unused-ignore]

    longest = max(len(request.ids) + request.n for request in task.requests)
    engine: Any = LLM(
        task.model,
        dtype=task.dtype,
        max_model_len=max(CONTEXT, longest),
        max_num_seqs=task.cap or 128,
        enable_prefix_caching=task.grouped,
        # A folder without weights has no tokenizer.
        skip_tokenizer_init=task.random_weights,
        load_format="dummy" if task.random_weights else "auto",
    )
    prompts = [{"prompt_token_ids": list(request.ids)} for request in task.requests]
    params = [
        SamplingParams(
            temperature=1.0,
            max_tokens=request.n,
            min_tokens=request.n,
            ignore_eos=True,
            detokenize=False,
            logprobs=0,
        )
        for request in task.requests
    ]

    def generate() -> int:
        return sum(len(done.outputs[0].token_ids) for done in engine.generate(prompts, params, use_tqdm=False))

    return generate


if __name__ == "__main__":
    main(prepare)
