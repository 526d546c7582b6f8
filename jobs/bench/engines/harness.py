"""What every engine's process does alike: read the task, time the one call, report."""

from __future__ import annotations

import argparse
import json
import platform
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import torch
import workload
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel


@dataclass(frozen=True, slots=True)
class Task:
    """One run of one engine."""

    model: str
    dtype: torch.dtype
    device: torch.device
    cap: int | None
    """Most rows in a batch; None is the engine's own choice."""
    requests: list[workload.Request]


Generate = Callable[[], int]
"""The call that is timed; gives the number of useful output tokens."""


def load(task: Task) -> PreTrainedModel:
    """The model as transformers loads it, alike for all: with its own default attention."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(task.model, dtype=task.dtype, use_safetensors=True)
    cast(nn.Module, model).to(task.device)
    model.eval()
    return model


def main(prepare: Callable[[Task], Generate]) -> None:
    """Run one engine: ``prepare`` loads what it needs, and what it returns is timed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("workload", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--cap", type=int)
    given = parser.parse_args()
    task = Task(
        model=given.model,
        dtype=getattr(torch, given.dtype),
        device=torch.device(given.device),
        cap=given.cap,
        requests=workload.read(given.workload),
    )
    began = time.perf_counter()
    generate = prepare(task)
    ready = time.perf_counter()
    tokens = generate()
    if task.device.type == "cuda":
        torch.cuda.synchronize(task.device)
    done = time.perf_counter()
    wanted = sum(request.n for request in task.requests)
    if tokens != wanted:
        sys.exit(f"{tokens} useful tokens came out, but the workload asks for {wanted}: not the same work")
    given.out.write_text(json.dumps(_result(task, tokens, ready - began, done - ready)), encoding="utf-8")


def _result(task: Task, tokens: int, setup: float, seconds: float) -> dict[str, Any]:
    cuda = task.device.type == "cuda"
    unit = 1 if platform.system() == "Darwin" else 1024
    return {
        "tokens": tokens,
        "seconds": seconds,
        "setup_seconds": setup,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "peak_device_bytes": torch.cuda.max_memory_allocated(task.device) if cuda else None,
        "device": torch.cuda.get_device_name(task.device) if cuda else "cpu",
        "threads": torch.get_num_threads(),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "rollout")},
    }
