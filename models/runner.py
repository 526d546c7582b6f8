"""Forwards of a model over pages: the new tokens of all sequences, packed into one row ``[1, T]``."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from rollout.models import attention
from rollout.models.gather import GatherStep
from rollout.models.layout import IntArray
from rollout.models.loan import unwrap
from rollout.models.packed import Packed
from rollout.models.pages import PagePool


class Runner:
    """Runs a module, through whatever wraps it, on the pages of a pool. The module must be on loan."""

    def __init__(self, model: nn.Module, pool: PagePool) -> None:
        self._model = model
        self._pool = pool
        self._device = unwrap(model).device

    def forward(self, packed: Packed) -> torch.Tensor:
        """Computes the new tokens of all sequences, and writes their keys and values.

        Returns:
            Logits [S, V] of each sequence's last token.
        """
        last = packed.offsets + packed.lengths - 1
        with attention.running(GatherStep(self._pool, packed)):
            output = self._model(
                input_ids=self._tensor(packed.tokens[None]),
                position_ids=self._tensor(packed.positions[None]),
                use_cache=False,
                logits_to_keep=self._tensor(last) if len(last) < len(packed.tokens) else 0,
            )
        logits: torch.Tensor = output.logits[0]
        return logits

    def _tensor(self, values: IntArray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, np.int64)).to(self._device)
