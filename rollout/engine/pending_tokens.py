"""What a step draws, on its way from the device to the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rollout.batcher.types import IntArray
from rollout.engine.batch_row import Float32Array
from rollout.models.sampling.sampler import Sampled


@dataclass(frozen=True, slots=True)
class PendingTokens:
    """One token for each of B rows. Made without waiting for the device, which has yet to compute them."""

    slots: IntArray
    """[B] of the rows."""
    positions: IntArray
    """[B] the place of each token in its row's completion."""
    _sampled: Sampled
    """On the host, once the copy is done."""
    _copied: torch.cuda.Event | None

    @classmethod
    def of(cls, slots: IntArray, positions: IntArray, sampled: Sampled) -> PendingTokens:
        """Begins the copy to the host."""
        on_host = Sampled(
            *(x.to("cpu", non_blocking=True) for x in (sampled.tokens, sampled.logprobs, sampled.sampler_logprobs))
        )
        if not sampled.tokens.is_cuda:
            return cls(slots, positions, on_host, None)
        # Of the stream that copies: with several devices it need not be the thread's current one.
        with torch.cuda.device(sampled.tokens.device):
            copied = torch.cuda.Event()
            copied.record()
        return cls(slots, positions, on_host, copied)

    def read(self) -> tuple[IntArray, Float32Array, Float32Array]:
        """Waits for the device; tokens, log-probabilities and those of the sampler, [B] each."""
        if self._copied is not None:
            self._copied.synchronize()
        sampled = self._sampled
        return sampled.tokens.numpy(), sampled.logprobs.numpy(), sampled.sampler_logprobs.numpy()
