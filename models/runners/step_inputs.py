"""Inputs of a captured step, at addresses that stay."""

from __future__ import annotations

import numpy as np
import torch

from rollout.models.arrays import upload
from rollout.models.attention.triton_metadata import TritonMetadata
from rollout.models.forward_batch import ForwardBatch
from rollout.models.runners.graph_rungs import Rung


class StepInputs:
    """What a captured step reads: tokens, positions, which logits are wanted, and the attention's metadata.

    Args:
        rung: size of the step.
        metadata: with room for the rung.
    """

    def __init__(self, rung: Rung, metadata: TritonMetadata) -> None:
        self.metadata = metadata
        device = metadata.slabs.pool.device
        self._host = np.zeros(rung.tokens + rung.logits, np.int64)
        self._host_positions, self._host_wanted = np.split(self._host, [rung.tokens])
        self._device = torch.zeros(len(self._host), dtype=torch.int64, device=device)
        self.tokens = torch.zeros((1, rung.tokens), dtype=torch.int64, device=device)
        """[1, tokens] token ids; 0 for padding."""
        self._tokens = self.tokens[0]
        self.positions = self._device[None, : rung.tokens]
        """[1, tokens] position ids; 0 for padding."""
        self.wanted = self._device[rung.tokens :]
        """[logits] index of each sequence's last token; 0 for padding."""

    @property
    def bytes_held(self) -> int:
        """Bytes on the device."""
        return self._device.nbytes + self.tokens.nbytes + self.metadata.bytes_held

    def fill(self, batch: ForwardBatch) -> None:
        """Copy in a batch that fits."""
        self.metadata.fill(batch)
        tokens, sequences = batch.tokens.shape[0], len(batch.query_lens)
        self._host_positions[:tokens] = batch.positions
        self._host_positions[tokens:] = 0
        self._host_wanted[:sequences] = batch.wanted
        self._host_wanted[sequences:] = 0
        upload(self._host, self._device)
        # A copy on the device: the host may not know the token ids yet.
        self._tokens[:tokens].copy_(batch.tokens)
        if tokens < self._tokens.shape[0]:
            self._tokens[tokens:].zero_()
