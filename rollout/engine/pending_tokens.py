"""Sampled tokens of a step, being copied from the device to the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from rollout.batcher.types import IntArray
from rollout.engine.batch_row import Float32Array
from rollout.models.sampling.sampler import Sampled


class ReadTokens(NamedTuple):
    """Tokens on the host, all of shape [B]."""

    tokens: IntArray
    logprobs: Float32Array
    sampler_logprobs: Float32Array


@dataclass(frozen=True, slots=True)
class PendingTokens:
    """One token for each of B rows, which the device may still be computing."""

    slots: IntArray
    """[B] slots of the rows."""
    positions: IntArray
    """[B] index of each token in its row's completion."""
    _sampled: Sampled
    """Host tensors, valid once the copy has finished."""
    _copied: torch.cuda.Event | None

    @classmethod
    def of(cls, slots: IntArray, positions: IntArray, sampled: Sampled) -> PendingTokens:
        """Start the copy to the host, without waiting for the device."""
        logprobs = sampled.logprobs.to("cpu", non_blocking=True)
        # Without filters and rules they are the same tensor.
        same = sampled.sampler_logprobs is sampled.logprobs
        on_host = Sampled(
            tokens=sampled.tokens.to("cpu", non_blocking=True),
            logprobs=logprobs,
            sampler_logprobs=logprobs if same else sampled.sampler_logprobs.to("cpu", non_blocking=True),
        )
        if not sampled.tokens.is_cuda:
            return cls(slots=slots, positions=positions, _sampled=on_host, _copied=None)
        # Record on the device that copies: with several devices, the current one may be another.
        with torch.cuda.device(sampled.tokens.device):
            copied = torch.cuda.Event()
            copied.record()
        return cls(slots=slots, positions=positions, _sampled=on_host, _copied=copied)

    def read(self) -> ReadTokens:
        """Wait for the device and return the tokens."""
        if self._copied is not None:
            self._copied.synchronize()
        sampled = self._sampled
        return ReadTokens(
            tokens=sampled.tokens.numpy(),
            logprobs=sampled.logprobs.numpy(),
            sampler_logprobs=sampled.sampler_logprobs.numpy(),
        )
