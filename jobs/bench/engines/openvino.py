"""OpenVINO GenAI's continuous batching, on the model that its exporter made; see `jobs.bench.peer_envs`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import openvino  # type: ignore[import-not-found, unused-ignore]
import openvino_genai as genai  # type: ignore[import-not-found, unused-ignore]

from jobs.bench.engines.harness import Bind, Generate, Setup, grouped
from jobs.bench.lib.workload import Request

CACHE_GB = 4
BATCHED_TOKENS = 4096
PRECISION = {"bfloat16": "bf16", "float32": "f32"}
"""Precision hint, followed with or without instructions for it; weights are 16 bit either way."""


def prepare(setup: Setup) -> Bind:
    """Return what loads a pipeline for each workload; the cap is its ``max_num_seqs``."""
    if setup.device != "cpu":
        raise SystemExit("this runs OpenVINO on a CPU only")
    pipe: Any = None

    def bind(requests: Sequence[Request]) -> Generate:
        nonlocal pipe
        # The only way to a cache without prefixes of the run before. Freed first: memory holds one at a time.
        pipe = None
        pipe = _pipeline(setup, grouped(requests))
        prompts = [openvino.Tensor(np.array([request.ids], np.int64)) for request in requests]
        configs = [_config(request.n) for request in requests]
        return lambda: sum(len(result.m_generation_ids[0]) for result in pipe.generate(prompts, configs))

    return bind


def _pipeline(setup: Setup, prefixes: bool) -> Any:
    scheduler: Any = genai.SchedulerConfig()
    scheduler.cache_size = CACHE_GB
    scheduler.max_num_seqs = setup.cap or 128
    scheduler.max_num_batched_tokens = BATCHED_TOKENS
    scheduler.dynamic_split_fuse = True
    scheduler.enable_prefix_caching = prefixes
    hint = {"INFERENCE_PRECISION_HINT": PRECISION[setup.dtype]}
    return genai.ContinuousBatchingPipeline(setup.model, scheduler, "CPU", hint)


def _config(n: int) -> Any:
    config: Any = genai.GenerationConfig()
    config.max_new_tokens = config.min_new_tokens = n
    config.ignore_eos, config.do_sample, config.temperature, config.top_p = True, True, 1.0, 1.0
    return config
