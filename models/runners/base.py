"""A tier: one way to run a family's modules over pages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import ClassVar, Protocol

import torch
from torch import nn

from rollout.models.arrays import IntArray
from rollout.models.attention.names import AUTO
from rollout.models.forward_batch import ForwardBatch
from rollout.models.kv_cache.layout import KVLayout
from rollout.models.kv_cache.page_pool import PagePool
from rollout.models.module.borrow import BorrowedModule
from rollout.models.module.inspect import output_device


class Runner(Protocol):
    """Forwards of a model over the pages of a pool; the model must be on loan."""

    attention: str
    """What attends, by the name that the log and a run's folder have for it."""

    @property
    def bytes_kept(self) -> int:
        """Memory of the device that it keeps to itself although torch's allocator does not count it as allocated."""
        return 0

    def forward(self, packed: ForwardBatch) -> torch.Tensor:
        """Computes the new tokens of all sequences, and writes their keys and values.

        Returns logits [S, V] of each sequence's last token, which may be overwritten by the next call.
        """
        ...

    def shed(self) -> bool:
        """Gives back, as memory is short, what it can make again, and goes without for a while, more slowly.

        Returns whether there was any.
        """
        return False

    def close(self) -> None:
        """Gives all memory back that it has taken besides the pool's; a further forward takes it anew."""
        return


class RunStrategy(ABC):
    """Serves one model.

    Args:
        model: a transformers causal LM, wrapped or not.
        choice: of attention, a name of `rollout.models.attention.names`.

    Raises:
        UnsupportedModel: the model is not of this tier.
    """

    name: ClassVar[str]
    whole_contexts: ClassVar[bool] = False
    """Whether a sequence's first forward must have its whole context, and each further one a single token."""

    chooses_attention: ClassVar[bool] = True
    """Whether it is the engine that attends, and not the model's own code."""

    def __init__(self, model: nn.Module, choice: str = AUTO) -> None:
        self.model, self.choice = model, choice

    @abstractmethod
    def kv_layout(self) -> KVLayout:
        """What the model stores. Dtypes depend on the caller's autocast, so each call of the engine asks anew.

        Raises:
            UnsupportedModel: the model does what this tier does not know.
        """

    def reference_logits(self, ids: IntArray, ends: Sequence[int]) -> torch.Tensor:
        """What the model itself gives, with no tier: logits [ends, V] after so many of the tokens ids [n] each."""
        tokens = torch.from_numpy(ids[None]).to(output_device(self.model))
        with BorrowedModule(self.model).borrow():
            logits: torch.Tensor = self.model(input_ids=tokens, use_cache=False).logits[0]
        return logits[[end - 1 for end in ends]]

    @abstractmethod
    def borrow(self) -> AbstractContextManager[None]:
        """The model is the engine's inside this block, and its owner's, as it was, after it."""

    @abstractmethod
    def runner(self, pool: PagePool) -> Runner:
        """Runs the model on ``pool``."""

    def attention(self) -> str:
        """See `Runner.attention`."""
        return self.runner(PagePool(self.kv_layout(), 1, output_device(self.model))).attention
