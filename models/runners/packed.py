"""The first tier: attention goes through transformers' interface, and all new tokens are packed into one row."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from rollout.models.arrays import IntArray, uploaded
from rollout.models.attention import interface
from rollout.models.attention.base import AttentionBackend
from rollout.models.attention.names import AUTO
from rollout.models.attention.probe import probe
from rollout.models.attention.select import select_backend
from rollout.models.errors import UnsupportedModel
from rollout.models.forward_batch import ForwardBatch
from rollout.models.kv_cache.layout import KVLayout
from rollout.models.kv_cache.page_pool import PagePool
from rollout.models.module.borrow import BorrowedModule
from rollout.models.module.inspect import family_name, output_device, unwrap_model
from rollout.models.module.rope import Rotary, use_sequence_lengths
from rollout.models.runners.base import Runner, RunStrategy


class PackedStrategy(RunStrategy):
    """Families whose modules call attention through transformers' ``AttentionInterface``."""

    name: ClassVar[str] = "packed"

    def __init__(self, model: nn.Module, choice: str = AUTO) -> None:
        super().__init__(model, choice)
        base = unwrap_model(model)
        if not base._can_set_attn_implementation():
            raise UnsupportedModel(
                f"{family_name(model)} computes attention on its own instead of through transformers' attention "
                "interface."
            )
        self._borrowed = BorrowedModule(model)

    def kv_layout(self) -> KVLayout:
        """See `RunStrategy.kv_layout`."""
        with self.borrow():
            return replace(probe(self.model), boundary=Rotary(self.model).boundary)

    def borrow(self) -> AbstractContextManager[None]:
        """See `RunStrategy.borrow`."""
        return self._borrowed.borrow(interface.NAME)

    def runner(self, pool: PagePool) -> Runner:
        """See `RunStrategy.runner`."""
        steps = select_backend(self.choice, pool)
        eager = PackedRunner(self.model, pool, steps)
        # Decode steps, which Triton's kernels may serve beside a library.
        if pool.device.type == "cuda" and steps.name.endswith("triton"):
            # Triton comes with torch's builds for GPUs, and with no other.
            from rollout.models.runners.cuda_graphs import with_cuda_graphs

            return with_cuda_graphs(eager, self.model, steps, self._borrowed)
        return eager


class PackedRunner(Runner):
    """Runs a module, through whatever wraps it, with all new tokens in one row ``[1, T]``.

    Args:
        model: on loan while `forward` runs.
        pool: where keys and values lie.
        steps: how they are written and read.
    """

    def __init__(self, model: nn.Module, pool: PagePool, steps: AttentionBackend) -> None:
        self._model = model
        self._pool, self._steps = pool, steps
        self.attention = steps.name
        self._device = output_device(model)

    def forward(self, packed: ForwardBatch) -> torch.Tensor:
        """See `Runner.forward`."""
        last = packed.offsets + packed.query_lens - 1
        texts = use_sequence_lengths(np.repeat(packed.full_lens, packed.query_lens)[None])
        with interface.use_attention(self._steps(self._pool, packed)), texts:
            output = self._model(
                input_ids=packed.tokens[None],
                position_ids=uploaded(packed.positions[None], self._device),
                use_cache=False,
                logits_to_keep=self._kept(last) if len(last) < len(packed.tokens) else 0,
            )
        logits: torch.Tensor = output.logits[0]
        return logits

    def _kept(self, last: IntArray) -> torch.Tensor | list[int]:
        """Indices among the last layer's tokens: a tensor would be taken to the first layer's device, a list is not."""
        return uploaded(last, self._device) if len(self._pool.device_pools) == 1 else last.tolist()
