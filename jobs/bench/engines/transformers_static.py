"""transformers' ``generate`` on padded batches: each runs until its longest row is done."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig

from jobs.bench.engines.harness import Bind, Setup
from jobs.bench.engines.loading import load
from jobs.bench.lib.workload import Request

DEFAULT_ROWS = 32


def prepare(setup: Setup) -> Bind:
    """Load the model; the cap is the batch size. Batches follow the file: lengths are unknown beforehand."""
    model: Any = load(setup)  # generation is mixed into it by its class
    end = model.generation_config.eos_token_id
    pad = end[0] if isinstance(end, list) else end or 0
    # The model's own settings would replace what is left out below.
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad)
    return lambda requests: partial(_generate, model, requests, setup.cap or DEFAULT_ROWS)


def _generate(model: Any, requests: Sequence[Request], rows: int) -> int:
    useful, pad = 0, model.generation_config.pad_token_id
    with torch.inference_mode():
        for start in range(0, len(requests), rows):
            batch = requests[start : start + rows]
            width, new = max(len(request.ids) for request in batch), max(request.n for request in batch)
            gaps = [width - len(request.ids) for request in batch]
            ids = [[pad] * gap + list(request.ids) for gap, request in zip(gaps, batch, strict=True)]
            mask = [[0] * gap + [1] * (width - gap) for gap in gaps]
            out = model.generate(
                input_ids=torch.tensor(ids, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
            )
            useful += sum(min(request.n, out.shape[1] - width) for request in batch)
    if torch.device(model.device).type == "cuda":
        torch.cuda.synchronize(model.device)
    return useful
