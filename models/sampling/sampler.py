"""From logits to tokens and their log-probabilities, for rows that each have their own parameters.

Gumbel-max in two levels: first over blocks of the vocabulary by their log-sum-exp, then over the tokens
of the winning block. This draws exactly from the softmax, needs a few hundred random numbers a row instead
of one a vocabulary entry, and rounding noise in the logits flips a draw only about as often as it moves
probability mass. Kernels do the same, a compiled one on a CPU, two of Triton's on a GPU; what is here is what they
must come to, and serves where there are none.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, TypeAlias

import torch
import torch.nn.functional as F

from rollout.models.device import failure_of
from rollout.models.sampling.gumbel_cpu import GumbelMax, gumbel_max
from rollout.models.sampling.philox import gumbel
from rollout.models.sampling.top_p import top_p_threshold

if TYPE_CHECKING:
    from rollout.models.sampling.gumbel_triton import TritonGumbelMax

logger = logging.getLogger(__name__)

Kernel: TypeAlias = "GumbelMax | TritonGumbelMax"

_BLOCK = 256
#: On a CPU, rows are sampled a few at a time, so that their logits stay in cache between the passes.
_CPU_ROWS = 16


@dataclass(frozen=True, slots=True)
class RowSampling:
    """Sampling parameters of B rows, as tensors of shape [B] on the logits' device."""

    temperature: torch.Tensor
    """float32; 0 is greedy."""
    top_k: torch.Tensor
    """int64; 0 is off."""
    top_p: torch.Tensor
    """float32; 1 is off."""
    min_p: torch.Tensor
    """float32; 0 is off."""
    keys: torch.Tensor
    """[B, 2] int64, see `rollout.models.sampling.philox.gumbel`."""
    samples: torch.Tensor
    """int64."""
    # Known on the host, so that no step asks the device:
    most_top_k: int
    """The largest top_k of any row; 0 where it is off for all."""
    any_top_p: bool
    any_min_p: bool
    any_greedy: bool

    @property
    def filtered(self) -> bool:
        return self.most_top_k > 0 or self.any_top_p or self.any_min_p

    def rows(self, part: slice) -> RowSampling:
        """The parameters of some of the rows."""
        names = ("temperature", "top_k", "top_p", "min_p", "keys", "samples")
        return replace(self, **{name: getattr(self, name)[part] for name in names})


@dataclass(frozen=True, slots=True)
class Sampled:
    """One token for each row, all of shape [B]."""

    tokens: torch.Tensor
    """int64."""
    logprobs: torch.Tensor
    """float32: of the token under ``log_softmax(logits / temperature)``; of raw logits where greedy."""
    sampler_logprobs: torch.Tensor
    """float32: the same after the filters renormalised."""


def sample(logits: torch.Tensor, rows: RowSampling, positions: torch.Tensor) -> Sampled:
    """Draws a token for each row.

    Args:
        logits: [B, V], any float dtype.
        rows: parameters of the B rows.
        positions: [B] int64, how many tokens each completion has already.
    """
    kernel = gumbel_max() if logits.device.type == "cpu" else _triton(logits.device)
    if kernel is not None:
        return _sample_compiled(kernel, logits, rows, positions)
    if logits.device.type != "cpu" or len(logits) <= _CPU_ROWS:
        return _sample(logits, rows, positions)
    parts = [slice(start, start + _CPU_ROWS) for start in range(0, len(logits), _CPU_ROWS)]
    done = [_sample(logits[part], rows.rows(part), positions[part]) for part in parts]
    return Sampled(
        torch.cat([part.tokens for part in done]),
        torch.cat([part.logprobs for part in done]),
        torch.cat([part.sampler_logprobs for part in done]),
    )


@cache
def _triton(device: torch.device) -> TritonGumbelMax | None:
    """Triton's, if they compile for a device and draw what tensor operations do; else None, with one warning."""
    # Comes with torch's builds for GPUs, and with no other.
    if device.type != "cuda" or find_spec("triton") is None:
        return None
    from rollout.models.sampling.gumbel_triton import TritonGumbelMax

    kernel = TritonGumbelMax()
    reason = failure_of(lambda: _disagreement(kernel, device))
    if reason is None:
        return kernel
    name = torch.cuda.get_device_name(device)
    logger.warning("Triton's sampling is not used on %s, which is slower: %s.", name, reason)
    return None


def _disagreement(kernel: Kernel, device: torch.device) -> str | None:
    """What of some draws is not as it should be; None if nothing."""
    count, vocabulary = 24, 5000
    # No random numbers: the process's generators stay as they are.
    logits = torch.arange(count * vocabulary, device=device).mul(0.37).sin().mul(4).view(count, vocabulary)
    number = torch.arange(count, device=device)
    off, zero = torch.ones(count, device=device), torch.zeros(count, device=device)
    temperature = (number % 4).float() / 2
    keys = torch.stack((number * 7919, 2**32 - 1 - number), 1)
    rows = RowSampling(temperature, number * 0, off, zero, keys, number % 3, 0, False, False, any_greedy=True)
    tokens, logprobs, totals = kernel.draw(logits, temperature, keys, rows.samples, 5 * number)
    wanted = _sample(logits, rows, 5 * number)
    if not torch.equal(tokens, wanted.tokens):
        return "it draws other tokens"
    distance = float((logprobs - wanted.logprobs).abs().max())
    chosen = _scores(logits, rows).gather(1, tokens[:, None])[:, 0]
    distance = max(distance, float((chosen - totals - logprobs).abs().max()))
    return None if distance <= 1e-5 else f"its log-probabilities are others (by {distance:.2g})"


def _sample_compiled(kernel: Kernel, logits: torch.Tensor, rows: RowSampling, positions: torch.Tensor) -> Sampled:
    """A row without filters comes out with the same bits, whether others have some or not."""
    noise = (rows.keys, rows.samples, positions)
    tokens, logprobs, totals = kernel.draw(logits, rows.temperature, *noise)
    if not rows.filtered:
        return Sampled(tokens, logprobs, logprobs)
    scores = _scores(logits, rows)
    tokens, sampler_logprobs, _ = kernel.draw(keep(scores, rows), (rows.temperature > 0).float(), *noise)
    chosen = scores.gather(1, tokens[:, None])[:, 0].double()
    return Sampled(tokens, (chosen - totals).float(), sampler_logprobs)


def _scores(logits: torch.Tensor, rows: RowSampling) -> torch.Tensor:
    """[B, V] float32, divided by the temperature; of greedy rows as they are."""
    return logits.float() / torch.where(rows.temperature > 0, rows.temperature, 1.0)[:, None]


def _sample(logits: torch.Tensor, rows: RowSampling, positions: torch.Tensor) -> Sampled:
    scores = _scores(logits, rows)
    kept = keep(scores, rows) if rows.filtered else scores
    blocks = F.pad(kept, (0, -kept.shape[1] % _BLOCK), value=-torch.inf).unflatten(1, (-1, _BLOCK))
    sums = blocks.logsumexp(-1)
    noise = gumbel(sums.shape[1] + _BLOCK, rows.keys, rows.samples, positions)
    block = (sums + noise[:, : sums.shape[1]]).argmax(-1)
    inside = blocks[torch.arange(len(blocks), device=blocks.device), block]
    tokens = block * _BLOCK + (inside + noise[:, sums.shape[1] :]).argmax(-1)
    if rows.any_greedy:
        tokens = torch.where(rows.temperature > 0, tokens, kept.argmax(-1))
    total = sums.logsumexp(-1)
    chosen = scores.gather(1, tokens[:, None])[:, 0]
    everything = scores.logsumexp(-1) if rows.filtered else total
    return Sampled(tokens, chosen - everything, chosen - total)


def keep(scores: torch.Tensor, rows: RowSampling) -> torch.Tensor:
    """``scores`` [B, V] with -inf where top-k, then top-p, then min-p drop a token.

    Each filter is a threshold on the score, so that tokens with equal scores are kept or dropped together.
    """
    if rows.most_top_k:
        scores = scores.masked_fill(scores < _top_k_threshold(scores, rows.top_k, rows.most_top_k), -torch.inf)
    if rows.any_top_p:
        scores = scores.masked_fill(scores < top_p_threshold(scores, rows.top_p), -torch.inf)
    if rows.any_min_p:
        scores = scores.masked_fill(scores < _min_p_threshold(scores, rows.min_p), -torch.inf)
    return scores


def _top_k_threshold(scores: torch.Tensor, top_k: torch.Tensor, most: int) -> torch.Tensor:
    """[B, 1] the k-th largest score; -inf where top-k is off."""
    largest = scores.topk(min(most, scores.shape[1]), dim=-1).values
    at = largest.gather(1, (top_k.clamp(1, largest.shape[1]) - 1)[:, None])
    return torch.where(top_k[:, None] > 0, at, -torch.inf)


def _min_p_threshold(scores: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """[B, 1] the score of min_p times the largest probability (Nguyen et al., arXiv 2407.01082)."""
    return scores.amax(-1, keepdim=True) + min_p[:, None].log()
