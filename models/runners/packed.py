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
from rollout.models.attention.base import Steps
from rollout.models.attention.names import AUTO
from rollout.models.attention.probe import probe
from rollout.models.attention.select import chosen
from rollout.models.errors import UnsupportedModel
from rollout.models.forward_batch import Packed
from rollout.models.kv_cache.layout import KVLayout
from rollout.models.kv_cache.page_pool import PagePool
from rollout.models.module.borrow import Loan
from rollout.models.module.inspect import family_name, home, unwrap
from rollout.models.module.rope import Rotary, texts_of
from rollout.models.runners.base import Runner, Tier


class InterfaceTier(Tier):
    """Families whose modules call attention through transformers' ``AttentionInterface``."""

    name: ClassVar[str] = "interface"

    def __init__(self, model: nn.Module, choice: str = AUTO) -> None:
        super().__init__(model, choice)
        base = unwrap(model)
        if not base._can_set_attn_implementation():
            raise UnsupportedModel(
                f"{family_name(model)} computes attention on its own instead of through transformers' attention "
                "interface."
            )
        self._loan = Loan(model)

    def probe(self) -> KVLayout:
        """See `Tier.probe`."""
        with self.on_loan():
            return replace(probe(self.model), boundary=Rotary(self.model).boundary)

    def on_loan(self) -> AbstractContextManager[None]:
        """See `Tier.on_loan`."""
        return self._loan(interface.NAME)

    def runner(self, pool: PagePool) -> Runner:
        """See `Tier.runner`."""
        steps = chosen(self.choice, pool)
        eager = InterfaceRunner(self.model, pool, steps)
        # Decode steps, which Triton's kernels may serve beside a library.
        if pool.device.type == "cuda" and steps.name.endswith("triton"):
            # Triton comes with torch's builds for GPUs, and with no other.
            from rollout.models.runners.cuda_graphs import capturing

            return capturing(eager, self.model, steps, self._loan)
        return eager


class InterfaceRunner(Runner):
    """Runs a module, through whatever wraps it, with all new tokens in one row ``[1, T]``.

    Args:
        model: on loan while `forward` runs.
        pool: where keys and values lie.
        steps: how they are written and read.
    """

    def __init__(self, model: nn.Module, pool: PagePool, steps: Steps) -> None:
        self._model = model
        self._pool, self._steps = pool, steps
        self.attention = steps.name
        self._device = home(model)

    def forward(self, packed: Packed) -> torch.Tensor:
        """See `Runner.forward`."""
        last = packed.offsets + packed.lengths - 1
        texts = texts_of(np.repeat(packed.text_lengths, packed.lengths)[None])
        with interface.running(self._steps(self._pool, packed)), texts:
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
        return uploaded(last, self._device) if len(self._pool.parts) == 1 else last.tolist()
