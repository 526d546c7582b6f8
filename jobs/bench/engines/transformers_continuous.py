"""transformers' continuous batching: rows join and leave, each with a length of its own."""

from __future__ import annotations

from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.utils import WorkloadHints

from engines.harness import Generate, Task, main
from engines.loading import load


def prepare(task: Task) -> Generate:
    """It sizes its batch from free memory; a cap is not taken.

    ``generate_batch`` gives all requests one length, so this does what it does through its manager; as there, taking
    and freeing the memory is part of the call.
    """
    if task.cap is not None:
        raise SystemExit("continuous batching takes no cap")
    model: Any = load(task)  # generation is mixed into it by its class
    # No id ends a row: a length does.
    config = GenerationConfig(do_sample=True, top_k=0, eos_token_id=-1, pad_token_id=0)
    # Its fastest on a GPU; on a CPU there is neither.
    cuda = torch.device(task.device).type == "cuda"
    batching = ContinuousBatchingConfig(use_cuda_graph=cuda or None, use_async_batching=cuda or None)

    # What `generate_batch` itself tells the manager, to size its memory by.
    hints = WorkloadHints(
        max_prompt_length=max(len(request.ids) for request in task.requests),
        max_generated_length=max(request.n for request in task.requests),
        num_requests=len(task.requests),
    )

    def generate() -> int:
        wanted = {f"request-{index}": request for index, request in enumerate(task.requests)}
        useful = 0
        # Its worker thread fails inside inference_mode, without a word.
        running = model.continuous_batching_context_manager(
            generation_config=config, continuous_batching_config=batching, workload_hints=hints, timeout=5
        )
        with torch.no_grad(), running as manager:
            for name, request in wanted.items():
                manager.add_request(list(request.ids), request_id=name, max_new_tokens=request.n)
            while wanted:
                result = manager.get_result(timeout=1)
                if result is None:
                    if not manager.is_running():
                        raise RuntimeError("the continuous batching thread ended early")
                elif result.is_finished():
                    useful += min(wanted.pop(result.request_id).n, len(result.generated_tokens))
        return useful

    return generate


if __name__ == "__main__":
    main(prepare)
