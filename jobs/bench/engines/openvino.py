"""OpenVINO GenAI's continuous batching, on the model that its exporter made; see `jobs.bench.peer_envs`."""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino  # type: ignore[import-not-found, unused-ignore]
import openvino_genai as genai  # type: ignore[import-not-found, unused-ignore]

from jobs.bench.engines.harness import Generate, Task, main

CACHE_GB = 4
BATCHED_TOKENS = 4096
PRECISION = {"bfloat16": "bf16", "float32": "f32"}
"""Precision hint, followed with or without instructions for it; weights are 16 bit either way."""


def prepare(task: Task) -> Generate:
    """Load the pipeline; the cap is its ``max_num_seqs``."""
    if task.device != "cpu":
        raise SystemExit("this runs OpenVINO on a CPU only")
    scheduler: Any = genai.SchedulerConfig()
    scheduler.cache_size = CACHE_GB
    scheduler.max_num_seqs = task.cap or 128
    scheduler.max_num_batched_tokens = BATCHED_TOKENS
    scheduler.dynamic_split_fuse = True
    scheduler.enable_prefix_caching = task.grouped
    hint = {"INFERENCE_PRECISION_HINT": PRECISION[task.dtype]}
    pipe: Any = genai.ContinuousBatchingPipeline(task.model, scheduler, "CPU", hint)
    prompts = [openvino.Tensor(np.array([request.ids], np.int64)) for request in task.requests]
    configs = [_config(request.n) for request in task.requests]

    def generate() -> int:
        return sum(len(result.m_generation_ids[0]) for result in pipe.generate(prompts, configs))

    return generate


def _config(n: int) -> Any:
    config: Any = genai.GenerationConfig()
    config.max_new_tokens = config.min_new_tokens = n
    config.ignore_eos, config.do_sample, config.temperature, config.top_p = True, True, 1.0, 1.0
    return config


if __name__ == "__main__":
    main(prepare)
