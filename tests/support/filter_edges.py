"""Where top-p and min-p cut within rounding: the one place at which equal logits may give other sampler numbers."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from rollout import Record, SamplingParams

#: Two forwards of one sequence differ by about 1e-6 in probability, of which a cumulative sum makes several.
_ROUNDING = 1e-5


def sampler_logprobs_agree(
    model: PreTrainedModel, params: SamplingParams, one: Record, other: Record, atol: float
) -> bool:
    """Compare the sampler log-probabilities of two records of the same tokens.

    A token whose probability ends within rounding of ``top_p`` or ``min_p`` may be kept in one forward and dropped in
    another, and all others are renormalised. A position may differ by that alone.
    """
    if len(one.sampler_logprobs) != len(other.sampler_logprobs):
        return False
    pairs = zip(one.sampler_logprobs, other.sampler_logprobs, strict=True)
    differing = [i for i, (a, b) in enumerate(pairs) if not abs(a - b) <= atol]
    return all(_cuts_within_rounding(model, params, one, position) for position in differing)


def _cuts_within_rounding(model: PreTrainedModel, params: SamplingParams, record: Record, position: int) -> bool:
    """Whether a filter's edge lies within rounding of a token's probability at one position of a completion."""
    ids = torch.tensor([[*record.prompt_ids, *record.completion_ids[:position]]], device=model.device)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0, -1].double().cpu()
    if not params.temperature:
        return False
    probabilities = (logits / params.temperature).softmax(-1).sort(descending=True).values
    if params.top_k:
        probabilities = probabilities[: params.top_k] / probabilities[: params.top_k].sum()
    to_top_p = (probabilities.cumsum(-1) - params.top_p).abs().min() if params.top_p < 1 else torch.tensor(1.0)
    to_min_p = (probabilities / probabilities[0] - params.min_p).abs().min() if params.min_p else torch.tensor(1.0)
    return bool(min(to_top_p, to_min_p) < _ROUNDING)
