"""Forwards of a model over pages: packed prefill and one-token decode."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from rollout.models import attention
from rollout.models.gather import GatherDecode, GatherPrefill
from rollout.models.layout import IntArray
from rollout.models.loan import unwrap
from rollout.models.paged import PagedStep, Segment
from rollout.models.pages import PagePool


class Runner:
    """Runs a module, through whatever wraps it, on the pages of a pool. The module must be on loan."""

    def __init__(self, model: nn.Module, pool: PagePool) -> None:
        self._model = model
        self._pool = pool
        self._device = unwrap(model).device

    def prefill(self, tokens: Sequence[IntArray], segments: Sequence[Segment]) -> torch.Tensor:
        """Computes the segments' tokens in one packed forward.

        Args:
            tokens: the tokens of each segment, ``length`` of them.
            segments: where they stand in their sequences, and their pages.

        Returns:
            Logits [len(segments), V] of each segment's last token.
        """
        positions = np.concatenate([np.arange(s.start, s.end) for s in segments])
        ends = np.cumsum([s.length for s in segments]) - 1
        step = GatherPrefill(self._pool, segments)
        return self._forward(step, np.concatenate(tokens)[None], positions[None], self._tensor(ends))[0]

    def decode(self, tokens: IntArray, tables: IntArray, lengths: IntArray) -> torch.Tensor:
        """One forward of one token for each row.

        Args:
            tokens: [B] the rows' last tokens, not yet in their pages.
            tables: [B, pages] page ids of each row.
            lengths: [B] tokens of each row, the new one included.

        Returns:
            Logits [B, V].
        """
        step = GatherDecode(self._pool, tables, lengths)
        return self._forward(step, tokens[:, None], lengths[:, None] - 1, None)[:, 0]

    def _forward(self, step: PagedStep, ids: IntArray, positions: IntArray, keep: torch.Tensor | None) -> torch.Tensor:
        with attention.running(step):
            output = self._model(
                input_ids=self._tensor(ids),
                position_ids=self._tensor(positions),
                use_cache=False,
                logits_to_keep=0 if keep is None else keep,
            )
        logits: torch.Tensor = output.logits
        return logits

    def _tensor(self, values: IntArray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, np.int64)).to(self._device)
