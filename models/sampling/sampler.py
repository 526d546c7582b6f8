"""Sample tokens and their log-probabilities from logits; each row has its own parameters.

Gumbel-max in two levels: first over blocks of the vocabulary by their log-sum-exp, then over the tokens of the
winning block. It samples exactly from the softmax and needs a few hundred random numbers per row instead of one per
vocabulary entry. Rounding noise in the logits flips a draw only about as often as it moves probability mass. A
compiled kernel (CPU) and two Triton kernels (GPU) do the same; tensor operations are their reference, and the fallback
where they are unavailable.

Rows with filters or token rules are drawn a second time, from the changed logits; the first draw gives the model's own
log-probabilities.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec

import torch

from rollout.models.device import failure_of
from rollout.models.sampling.base import GumbelKernel, divisors
from rollout.models.sampling.gumbel_cpu import gumbel_max
from rollout.models.sampling.gumbel_tensor import TensorGumbelMax
from rollout.models.sampling.logit_edits import LogitEdits
from rollout.models.sampling.top_p import top_p_threshold

logger = logging.getLogger(__name__)

_TOLERANCE = 1e-5
"""Largest error of a kernel's log-probabilities in the self-test."""


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
    # Known on the host, so that no step reads them from the device:
    most_top_k: int
    """The largest top_k of any row; 0 where it is off for all."""
    any_top_p: bool
    any_min_p: bool
    edited: tuple[EditedRows, ...] = ()
    """Rows with token rules; the flags above are for the others."""

    @property
    def filtered(self) -> bool:
        """True if any row has a filter."""
        return self.most_top_k > 0 or self.any_top_p or self.any_min_p

    def rows(self, part: slice) -> RowSampling:
        """Return the parameters of a slice of rows without token rules."""
        assert not self.edited, "token rules name rows by their index in the batch"
        return replace(
            self,
            temperature=self.temperature[part],
            top_k=self.top_k[part],
            top_p=self.top_p[part],
            min_p=self.min_p[part],
            keys=self.keys[part],
            samples=self.samples[part],
        )


@dataclass(frozen=True, slots=True)
class EditedRows:
    """Some rows of a batch that have token rules: the rules, and the parameters of these rows alone."""

    edits: LogitEdits
    rows: RowSampling


@dataclass(frozen=True, slots=True)
class Sampled:
    """One token for each row, all of shape [B]."""

    tokens: torch.Tensor
    """int64."""
    logprobs: torch.Tensor
    """float32: log-probabilities under ``log_softmax(logits / temperature)``; under the raw logits where greedy."""
    sampler_logprobs: torch.Tensor
    """float32: log-probabilities after token rules, filters and renormalisation; NaN where no token may be drawn."""


def sample(logits: torch.Tensor, rows: RowSampling, positions: torch.Tensor) -> Sampled:
    """Sample a token for each row.

    Args:
        logits: [B, V], any float dtype.
        rows: parameters of the B rows.
        positions: [B] int64, number of tokens already in each completion.
    """
    kernel = gumbel_max() if logits.device.type == "cpu" else _triton_kernel(logits.device)
    return sample_with(kernel or TensorGumbelMax(), logits, rows, positions)


@cache
def _triton_kernel(device: torch.device) -> GumbelKernel | None:
    """Return the Triton kernel if it passes its self-test on a device; else None, after one warning."""
    # Only torch's builds for GPUs include Triton.
    if device.type != "cuda" or find_spec("triton") is None:
        return None
    from rollout.models.sampling.gumbel_triton import TritonGumbelMax

    kernel = TritonGumbelMax()
    reason = failure_of(lambda: _self_test(kernel, device))
    if reason is None:
        return kernel
    name = torch.cuda.get_device_name(device)
    logger.warning("The Triton sampling kernel is not used on %s, so sampling is slower: %s.", name, reason)
    return None


def _self_test(kernel: GumbelKernel, device: torch.device) -> str | None:
    """Compare the kernel's draws with those of tensor operations; return the difference, or None."""
    count, vocabulary = 24, 5000
    # Not random, so that the process's generators keep their state.
    logits = torch.arange(count * vocabulary, device=device).mul(0.37).sin().mul(4).view(count, vocabulary)
    number = torch.arange(count, device=device)
    rows = RowSampling(
        temperature=(number % 4).float() / 2,
        top_k=torch.zeros_like(number),
        top_p=torch.ones(count, device=device),
        min_p=torch.zeros(count, device=device),
        keys=torch.stack((number * 7919, 2**32 - 1 - number), 1),
        samples=number % 3,
        most_top_k=0,
        any_top_p=False,
        any_min_p=False,
    )
    positions = 5 * number
    tokens, logprobs, log_sums = kernel.draw(logits, rows.temperature, rows.keys, rows.samples, positions)
    expected = sample_with(TensorGumbelMax(), logits, rows, positions)
    if not torch.equal(tokens, expected.tokens):
        return "it draws different tokens"
    error = float((logprobs - expected.logprobs).abs().max())
    chosen = _scores(logits.gather(1, tokens[:, None])[:, 0], rows)
    error = max(error, float((chosen - log_sums - logprobs).abs().max()))
    return None if error <= _TOLERANCE else f"its log-probabilities differ by {error:.2g} (tolerance {_TOLERANCE})"


def sample_with(kernel: GumbelKernel, logits: torch.Tensor, rows: RowSampling, positions: torch.Tensor) -> Sampled:
    """Sample by a kernel, see `sample`. A row gets the same bits whatever rules and filters other rows have."""
    draws = kernel.draw(logits, rows.temperature, rows.keys, rows.samples, positions)
    sampled = Sampled(tokens=draws.tokens, logprobs=draws.logprobs, sampler_logprobs=draws.logprobs)
    if rows.filtered:
        sampled = _draw_filtered(kernel, logits, logits, rows, positions, draws.log_sums)
    for part in rows.edited:
        at = part.edits.at
        raw = logits.index_select(0, at).float()
        edited = raw.clone()
        part.edits.apply(edited, positions[at])
        redrawn = _draw_filtered(kernel, edited, raw, part.rows, positions[at], draws.log_sums[at])
        sampled = Sampled(
            tokens=sampled.tokens.index_copy(0, at, redrawn.tokens),
            logprobs=sampled.logprobs.index_copy(0, at, redrawn.logprobs),
            sampler_logprobs=sampled.sampler_logprobs.index_copy(0, at, redrawn.sampler_logprobs),
        )
    return sampled


def _draw_filtered(
    kernel: GumbelKernel,
    logits: torch.Tensor,
    raw: torch.Tensor,
    rows: RowSampling,
    positions: torch.Tensor,
    log_sums: torch.Tensor,
) -> Sampled:
    """Draw from what the filters keep of logits [B, V].

    The model's log-probabilities are those of the logits without rules, ``raw`` [B, V], with ``log_sums`` [B].
    """
    thresholds = filter_thresholds(logits, rows)
    draws = kernel.draw(logits, rows.temperature, rows.keys, rows.samples, positions, thresholds)
    chosen = _scores(raw.gather(1, draws.tokens[:, None])[:, 0], rows).double()
    return Sampled(tokens=draws.tokens, logprobs=(chosen - log_sums).float(), sampler_logprobs=draws.logprobs)


def _scores(logits: torch.Tensor, rows: RowSampling) -> torch.Tensor:
    """Return one logit of each row [B] as float32 over the temperature; unscaled where greedy."""
    return logits.float() / divisors(rows.temperature)


def filter_thresholds(logits: torch.Tensor, rows: RowSampling) -> torch.Tensor | None:
    """Return the smallest score [B] that top-k, then top-p, then min-p keep of logits [B, V]; None without filters.

    Scores are logits over the temperature. Each filter is a threshold on them, so tokens with equal scores are kept or
    dropped together.
    """
    if not rows.filtered:
        return None
    thresholds = torch.full_like(rows.temperature, -torch.inf)
    if rows.most_top_k:
        thresholds = _top_k_threshold(logits, rows)
    if rows.any_top_p:
        found = top_p_threshold(logits, rows.temperature, rows.top_p, thresholds)
        thresholds = torch.maximum(thresholds, found)
    if rows.any_min_p:
        thresholds = torch.maximum(thresholds, _min_p_threshold(logits, rows))
    return thresholds


def _top_k_threshold(logits: torch.Tensor, rows: RowSampling) -> torch.Tensor:
    """Return the k-th largest score [B]; -inf where top-k is off."""
    largest = logits.topk(min(rows.most_top_k, logits.shape[1]), dim=-1).values
    kth = largest.gather(1, (rows.top_k.clamp(1, largest.shape[1]) - 1)[:, None])[:, 0]
    return torch.where(rows.top_k > 0, _scores(kth, rows), -torch.inf)


def _min_p_threshold(logits: torch.Tensor, rows: RowSampling) -> torch.Tensor:
    """Return the score [B] of min_p times the largest probability (Nguyen et al., arXiv 2407.01082)."""
    return _scores(logits.amax(-1), rows) + rows.min_p.log()
