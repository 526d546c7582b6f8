"""transformers' continuous batching, with a length per request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.utils import WorkloadHints

from jobs.bench.engines.harness import Bind, Setup
from jobs.bench.engines.loading import load
from jobs.bench.lib.workload import Request

PAGE_TOKENS = 256
"""As it comes."""


def prepare(setup: Setup) -> Bind:
    """Load the model; the engine sizes its batch from free memory and takes no cap."""
    if setup.cap is not None:
        raise SystemExit("continuous batching takes no cap")
    model: Any = load(setup)  # generation is mixed into it by its class
    run = Continuous(model, torch.device(setup.device), do_sample=True, top_k=0)

    def useful(requests: Sequence[Request]) -> int:
        return sum(min(request.n, len(ids)) for request, ids in zip(requests, run(requests), strict=True))

    return lambda requests: lambda: useful(requests)


class Continuous:
    """Run ``generate_batch`` with a length per request.

    It gives all requests one length, so this does what it does through its manager; as there, taking and freeing the
    memory is part of a call.

    Args:
        model: which it leaves with another attention implementation.
        device: of the model.
        rows: most that live; None is its own choice.
        blocks: of keys and values, of `PAGE_TOKENS` each; None is its own choice, most of the memory that is free.
        graphs: whether to use CUDA graphs and asynchronous batches on a GPU; None is its own choice.
        sampling: for the generation's configuration.
    """

    def __init__(
        self,
        model: Any,
        device: torch.device,
        rows: int | None = None,
        blocks: int | None = None,
        graphs: bool | None = True,
        **sampling: Any,
    ) -> None:
        self._model = model
        # Rows end by length, not by a token.
        self._config = GenerationConfig(eos_token_id=-1, pad_token_id=0, **sampling)
        # A CPU has neither.
        cuda = graphs if device.type == "cuda" else None
        self._batching = ContinuousBatchingConfig(
            num_blocks=blocks,
            max_requests_per_batch=rows,
            use_cuda_graph=cuda,
            use_async_batching=cuda,
        )

    def __call__(self, requests: Sequence[Request]) -> list[list[int]]:
        """Return the completion of each request."""
        # What `generate_batch` itself passes to the manager to size its memory.
        hints = WorkloadHints(
            max_prompt_length=max(len(request.ids) for request in requests),
            max_generated_length=max(request.n for request in requests),
            num_requests=len(requests),
        )
        wanted = {f"request-{index}": index for index in range(len(requests))}
        done: list[list[int]] = [[] for _ in requests]
        # Its worker thread fails silently inside inference_mode.
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
