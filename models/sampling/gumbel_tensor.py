"""Gumbel-max sampling by tensor operations: the reference of the kernels, and the fallback on any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from rollout.models.sampling.base import BLOCK, Draws, divisors, scores_above
from rollout.models.sampling.philox import gumbel

_CPU_ROWS = 16
"""Rows per chunk on a CPU, so that their logits stay in cache between the passes."""


class TensorGumbelMax:
    """Gumbel-max for tensors on any device."""

    def draw(
        self,
        logits: torch.Tensor,
        temperatures: torch.Tensor,
        keys: torch.Tensor,
        samples: torch.Tensor,
        positions: torch.Tensor,
        thresholds: torch.Tensor | None = None,
    ) -> Draws:
        """Draw a token for each row, see `GumbelKernel.draw`."""
        if thresholds is not None:
            logits, temperatures = scores_above(logits, temperatures, thresholds), (temperatures > 0).float()
        given = (logits, temperatures, keys, samples, positions)
        if logits.device.type != "cpu" or len(logits) <= _CPU_ROWS:
            return _draw(*given)
        parts = [_draw(*part) for part in zip(*(tensor.split(_CPU_ROWS) for tensor in given), strict=True)]
        return Draws(
            tokens=torch.cat([part.tokens for part in parts]),
            logprobs=torch.cat([part.logprobs for part in parts]),
            log_sums=torch.cat([part.log_sums for part in parts]),
        )


def _draw(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    keys: torch.Tensor,
    samples: torch.Tensor,
    positions: torch.Tensor,
) -> Draws:
    scores = logits.float() / divisors(temperatures)[:, None]
    blocks = F.pad(scores, (0, -scores.shape[1] % BLOCK), value=-torch.inf).unflatten(1, (-1, BLOCK))
    sums = blocks.logsumexp(-1)
    noise = gumbel(sums.shape[1] + BLOCK, keys, samples, positions)
    block = (sums + noise[:, : sums.shape[1]]).argmax(-1)
    winning_block = blocks[torch.arange(len(blocks), device=blocks.device), block]
    tokens = block * BLOCK + (winning_block + noise[:, sums.shape[1] :]).argmax(-1)
    tokens = torch.where(temperatures > 0, tokens, scores.argmax(-1))
    log_sums = sums.double().logsumexp(-1)
    chosen = scores.gather(1, tokens[:, None])[:, 0].double()
    return Draws(tokens=tokens, logprobs=(chosen - log_sums).float(), log_sums=log_sums)
