"""vLLM's offline call, with log-probabilities of the sampled tokens."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from jobs.bench.engines.harness import Bind, Generate, Setup
from jobs.bench.lib.workload import Request

CONTEXT = 2048
CACHE_GB = "4"


def prepare(setup: Setup) -> Bind:
    """Load vLLM; the cap is its ``max_num_seqs``."""
    if setup.device == "cpu":
        # vLLM's default leaves a core idle.
        cores = sorted(os.sched_getaffinity(0))
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
        os.environ.setdefault("OMP_NUM_THREADS", str(len(cores)))
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", CACHE_GB)
    # vLLM reads the environment while it is imported.
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found, unused-ignore]

    engine: Any = LLM(
        setup.model,
        dtype=setup.dtype,
        max_model_len=max(CONTEXT, setup.longest),
        max_num_seqs=setup.cap or 128,
        enable_prefix_caching=True,
        # A folder without weights has no tokenizer.
        skip_tokenizer_init=setup.random_weights,
        load_format="dummy" if setup.random_weights else "auto",
    )

    def bind(requests: Sequence[Request]) -> Generate:
        if not engine.reset_prefix_cache():
            raise RuntimeError("prefixes of the run before are still cached")
        prompts = [{"prompt_token_ids": list(request.ids)} for request in requests]
        params = [
            SamplingParams(
                temperature=1.0,
                max_tokens=request.n,
                min_tokens=request.n,
                ignore_eos=True,
                detokenize=False,
                logprobs=0,
            )
            for request in requests
        ]
        return lambda: sum(len(done.outputs[0].token_ids) for done in engine.generate(prompts, params, use_tqdm=False))

    return bind
