"""What transformers' own generate and forward give, and engines that must preempt."""

from __future__ import annotations

import random
from typing import Any

import torch
from transformers import PreTrainedModel

from rollout import Engine, Record
from rollout.models.runners.select import select_strategy
from tests.contract.conftest import BEYOND_TABLE
from tests.support.tiny_models import VOCABULARY


def random_prompts(seed: int, count: int, longest: int = 48) -> list[list[int]]:
    """Prompts of mixed lengths: the first of one token, the third longer than the first page table is wide."""
    print(f"seed {seed}")
    rng = random.Random(seed)
    lengths = [1, *(rng.randint(1, longest) for _ in range(count - 1))]
    if count > 2:
        lengths[2] += BEYOND_TABLE
    return [[rng.randrange(3, VOCABULARY) for _ in range(length)] for length in lengths]


def page_bytes(model: PreTrainedModel) -> int:
    """KV bytes of a page of ``model``."""
    return select_strategy(model).kv_layout().bytes_per_page


def _generated(model: PreTrainedModel, prompt: list[int], tokens: int, copies: int, **options: Any) -> Any:
    """What transformers' own generate returns for a prompt, computed so many times side by side."""
    ids = torch.tensor([prompt] * copies, device=model.device)
    return model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=tokens,
        pad_token_id=0,
        return_dict_in_generate=True,
        **options,
    )


def greedy(model: PreTrainedModel, prompt: list[int], tokens: int, use_cache: bool = True) -> list[int]:
    """The completion that transformers' own generate gives; without a cache, each token from the whole text anew."""
    out = _generated(model, prompt, tokens, copies=1, use_cache=use_cache)
    return [int(i) for i in out.sequences[0, len(prompt) :]]


def greedy_logprobs(
    model: PreTrainedModel, prompt: list[int], tokens: int, copies: int = 1
) -> tuple[list[int], torch.Tensor]:
    """The same completion, computed so many times side by side, and the first one's log-probabilities [tokens]."""
    out = _generated(model, prompt, tokens, copies, output_logits=True)
    found = out.sequences[0, len(prompt) :].cpu()
    logprobs = torch.stack(out.logits)[:, 0].float().log_softmax(-1).cpu()
    return found.tolist(), logprobs.gather(1, found[:, None])[:, 0]


def rounding(model: PreTrainedModel, prompts: list[list[int]], tokens: int = 20) -> float:
    """Twice the distance that generate's log-probabilities have from themselves between batch sizes; 1e-5 at least.

    Matrix products run other kernels for one row than for four, so they round otherwise.
    """
    distances = []
    for prompt in prompts:
        expected, alone = greedy_logprobs(model, prompt, tokens)
        for copies in (2, 4):
            found, logprobs = greedy_logprobs(model, prompt, tokens, copies)
            assert found == expected
            distances.append(float((logprobs - alone).abs().max()))
    return max(1e-5, 2 * max(distances))


def teacher_forced(model: PreTrainedModel, record: Record, temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities of a record's completion under one plain forward of the model."""
    with torch.no_grad():
        ids = torch.tensor([record.prompt_ids + record.completion_ids], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, len(record.prompt_ids) - 1 : -1].float().cpu()
    logprobs = (logits / temperature).log_softmax(-1)
    chosen: torch.Tensor = logprobs.gather(1, torch.tensor(record.completion_ids)[:, None])[:, 0]
    return chosen


def worst_logprob(model: PreTrainedModel, records: list[Record], temperature: float = 1.0) -> float:
    """Largest |difference| between recorded log-probabilities and teacher forcing."""
    return max(
        float((teacher_forced(model, record, temperature) - torch.tensor(record.logprobs)).abs().max())
        for record in records
    )


def tight_engine(model: PreTrainedModel, pages: int, **options: Any) -> Engine:
    """An engine that must preempt: it starts all rows at once, and has ``pages`` pages."""
    return Engine(model, None, policy="static", max_kv_bytes=pages * page_bytes(model), **options)
