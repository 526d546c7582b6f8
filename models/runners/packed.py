"""Packed strategy: the new tokens of all sequences form one row; attention runs in an attention backend."""

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
    """Runs families whose modules call attention through transformers' ``AttentionInterface``."""

    name: ClassVar[str] = "packed"
    runs_layers_together: ClassVar[bool] = True

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
        backend = select_backend(self.choice, pool)
        eager = PackedRunner(self.model, pool, backend)
        # Triton's kernels serve decode steps, also where a library prefills.
        if pool.device.type == "cuda" and backend.name.endswith("triton"):
            # Only torch's GPU builds ship Triton.
            from rollout.models.runners.cuda_graphs import with_cuda_graphs

            return with_cuda_graphs(eager=eager, model=self.model, backend=backend, borrowed=self._borrowed)
        return eager


class PackedRunner(Runner):
    """Runs a module, wrapped or not, with all new tokens in one row ``[1, T]``.

    Args:
        model: borrowed while `forward` runs.
        pool: holds keys and values.
        backend: writes keys and values, and attends to them.
    """

    def __init__(self, model: nn.Module, pool: PagePool, backend: AttentionBackend) -> None:
        self._model = model
        self._pool = pool
        self._backend = backend
        self.attention = backend.name
        self._device = output_device(model)

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """See `Runner.forward`."""
        # Some heads take no empty input: the last token's logits are computed where none are wanted.
        wanted = batch.wanted if batch.wanted_lens.any() else np.array([len(batch.tokens) - 1])
        lengths = use_sequence_lengths(np.repeat(batch.full_lens, batch.query_lens)[None])
        with interface.use_attention(self._backend(self._pool, batch)), lengths:
            output = self._model(
                input_ids=batch.tokens[None],
                position_ids=uploaded(batch.positions[None], self._device),
                use_cache=False,
                logits_to_keep=self._logits_to_keep(wanted) if len(wanted) < len(batch.tokens) else 0,
            )
        logits: torch.Tensor = output.logits[0]
        return logits if batch.wanted_lens.any() else logits[:0]

    def _logits_to_keep(self, wanted: IntArray) -> torch.Tensor | list[int]:
        """Return the token indices to compute logits for: a list if the model spans several devices.

        accelerate would move a tensor to the device of the first layer, while logits are on that of the last.
        """
        return uploaded(wanted, self._device) if len(self._pool.device_pools) == 1 else wanted.tolist()
