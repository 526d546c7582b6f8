"""Log-probabilities of given tokens, computed in blocks of rows: a float32 copy of all logits may not fit."""

from __future__ import annotations

import torch

from rollout.models.sampling.base import divisors

#: Most bytes of a block of logits in float32.
_BLOCK_BYTES = 32 << 20


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor, temperatures: torch.Tensor) -> torch.Tensor:
    """Return float32 [K]: ``log_softmax(logits / temperature)`` of each row's token; of the raw logits where it is 0.

    Args:
        logits: [K, V], any float dtype; may be overwritten.
        tokens: int64 [K], below V.
        temperatures: float32 [K].
    """
    scales = divisors(temperatures)[:, None]
    rows = max(1, _BLOCK_BYTES // (4 * logits.shape[1]))
    logprobs = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    for start in range(0, len(logits), rows):
        block = slice(start, start + rows)
        scores = logits[block].float() / scales[block]
        chosen = scores.gather(1, tokens[block, None])[:, 0]
        # In float64, as the sampler sums: large vocabularies lose digits otherwise.
        largest = scores.amax(1)
        sums = scores.sub_(largest[:, None]).exp_().sum(1, dtype=torch.float64)
        logprobs[block] = (chosen.double() - largest - sums.log()).float()
    return logprobs
