"""transformers' continuous batching: rows join and leave, each with a length of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.utils import WorkloadHints

from jobs.bench.engines.harness import Generate, Task, main
from jobs.bench.engines.loading import load
from jobs.bench.lib.workload import Request

PAGE_TOKENS = 256
"""As it comes."""


def prepare(task: Task) -> Generate:
    """It sizes its batch from free memory; a cap is not taken."""
    if task.cap is not None:
        raise SystemExit("continuous batching takes no cap")
    model: Any = load(task)  # generation is mixed into it by its class
    run = Continuous(model, torch.device(task.device), do_sample=True, top_k=0)

    def generate() -> int:
        done = run(task.requests)
        return sum(min(request.n, len(ids)) for request, ids in zip(task.requests, done, strict=True))

    return generate


class Continuous:
    """``generate_batch`` with a length for each request.

    It gives all requests one length, so this does what it does through its manager; as there, taking and freeing the
    memory is part of a call.

    Args:
        model: which it leaves with another attention implementation.
        device: of the model.
        rows: most that live; None is its own choice.
        blocks: of keys and values, of `PAGE_TOKENS` each; None is its own choice, most of the memory that is free.
        sampling: for the generation's configuration.
    """

    def __init__(
        self, model: Any, device: torch.device, rows: int | None = None, blocks: int | None = None, **sampling: Any
    ) -> None:
        self._model = model
        # No id ends a row: a length does.
        self._config = GenerationConfig(eos_token_id=-1, pad_token_id=0, **sampling)
        # Its fastest on a GPU; on a CPU there is neither.
        cuda = device.type == "cuda"
        self._batching = ContinuousBatchingConfig(
            num_blocks=blocks,
            max_requests_per_batch=rows,
            use_cuda_graph=cuda or None,
            use_async_batching=cuda or None,
        )

    def __call__(self, requests: Sequence[Request]) -> list[list[int]]:
        """The completion of each request."""
        # What `generate_batch` itself tells the manager, to size its memory by.
        hints = WorkloadHints(
            max_prompt_length=max(len(request.ids) for request in requests),
            max_generated_length=max(request.n for request in requests),
            num_requests=len(requests),
        )
        wanted = {f"request-{index}": index for index in range(len(requests))}
        done: list[list[int]] = [[] for _ in requests]
        # Its worker thread fails inside inference_mode, without a word.
        running = self._model.continuous_batching_context_manager(
            generation_config=self._config,
            continuous_batching_config=self._batching,
            workload_hints=hints,
            timeout=5,
        )
        with torch.no_grad(), running as manager:
            for name, index in wanted.items():
                request = requests[index]
                manager.add_request(list(request.ids), request_id=name, max_new_tokens=request.n)
            while wanted:
                result = manager.get_result(timeout=1)
                if result is None:
                    if not manager.is_running():
                        raise RuntimeError("the continuous batching thread ended early")
                elif result.is_finished():
                    done[wanted.pop(result.request_id)] = list(result.generated_tokens)
        return done


if __name__ == "__main__":
    main(prepare)
