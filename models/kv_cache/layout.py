"""What a model stores: a site for each attention call of a forward, in call order, and recurrent states."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import nn

from rollout.models.arrays import IntArray


@dataclass(frozen=True, slots=True)
class MaskKind:
    """Which earlier tokens a query sees: all, the last ``size``, or those of its own chunk of ``size``."""

    kind: Literal["full", "window", "chunk"] = "full"
    size: int = 0

    def first_keys(self, queries: IntArray) -> IntArray:
        """The earliest position that a query at each of ``queries`` sees."""
        if self.kind == "window":
            return np.maximum(queries - self.size + 1, 0)
        if self.kind == "chunk":
            return queries // self.size * self.size
        return np.zeros_like(queries)


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """One attention call of a forward: who makes it, what it stores and what the engine's attention must see.

    Sites are told apart by call order, not by layer index: a layer that attends twice, or a module that
    serves several layers, has as many sites as it makes calls.
    """

    module: nn.Module | None
    """None where the call order alone tells."""
    kv_heads: int
    key_dim: int
    value_dim: int
    mask_kind: MaskKind
    """Full where the model masks by itself."""
    device: torch.device | None = None
    """Where its keys and values arrive, and are kept; None is the device of the pool."""

    @property
    def elements(self) -> int:
        """Numbers that it stores of a token."""
        return self.kv_heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True, slots=True)
class StateTensor:
    """A tensor of fixed shape that a recurrent layer keeps of each row."""

    layer: int
    kind: Literal["conv", "recurrent"]
    """The last inputs of a convolution, or what a recurrence has summed up."""
    number: int
    """Layers may keep several of a kind."""
    shape: tuple[int, ...]
    """Of one row."""
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class KVLayout:
    """All that a model stores: its sites, the dtype in which their keys and values are kept, and states."""

    layers: tuple[AttentionLayer, ...]
    """None in a model that keeps states alone."""
    dtype: torch.dtype
    page_size: int
    states: tuple[StateTensor, ...] = ()
    """None in a model that keeps keys and values alone."""
    boundary: int | None = None
    """What is stored of a text longer than this differs, from its first token on, from what is stored of a shorter."""

    def alike(self, tokens: int, others: int) -> bool:
        """Whether a text of ``tokens`` tokens stores the same, where they agree, as one of ``others``."""
        return self.boundary is None or (tokens > self.boundary) == (others > self.boundary)

    @property
    def bytes_per_token(self) -> int:
        return sum(site.elements for site in self.layers) * self.dtype.itemsize

    def shares(self, device: torch.device) -> dict[torch.device, float]:
        """How keys and values are spread over devices: each one's share of their bytes. ``device`` is the pool's."""
        bytes_on: dict[torch.device, int] = {}
        for site in self.layers:
            place = site.device or device
            bytes_on[place] = bytes_on.get(place, 0) + site.elements * self.dtype.itemsize
        return {place: size / self.bytes_per_token for place, size in bytes_on.items()}

    @property
    def bytes_per_page(self) -> int:
        return self.bytes_per_token * self.page_size

    @property
    def bytes_per_row(self) -> int:
        """What a row takes besides its tokens."""
        return sum(state.bytes for state in self.states)

    def pages_for(self, tokens: int) -> int:
        """Pages that so many tokens of a row take."""
        return -(-tokens // self.page_size) if self.layers else 0
