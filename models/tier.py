"""A tier: one way to run a family's modules over pages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import ClassVar, Protocol

import torch
from torch import nn

from rollout.models.layout import KVLayout
from rollout.models.packed import Packed
from rollout.models.pages import PagePool


class Runner(Protocol):
    """Forwards of a model over the pages of a pool; the model must be on loan."""

    def forward(self, packed: Packed) -> torch.Tensor:
        """Computes the new tokens of all sequences, and writes their keys and values.

        Returns logits [S, V] of each sequence's last token.
        """
        ...


class Tier(ABC):
    """Serves one model.

    Raises:
        UnsupportedModel: the model is not of this tier.
    """

    name: ClassVar[str]

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @abstractmethod
    def probe(self) -> KVLayout:
        """What the model stores. Dtypes depend on the caller's autocast, so each call of the engine asks anew.

        Raises:
            UnsupportedModel: the model does what this tier does not know.
        """

    @abstractmethod
    def on_loan(self) -> AbstractContextManager[None]:
        """The model is the engine's inside this block, and its owner's, as it was, after it."""

    @abstractmethod
    def runner(self, pool: PagePool) -> Runner:
        """Runs the model on ``pool``."""
