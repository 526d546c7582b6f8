"""What a model stores per token and per row: an `AttentionLayer` per attention call, and recurrent states."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import nn

from rollout.models.arrays import IntArray, ceil_div


@dataclass(frozen=True, slots=True)
class MaskKind:
    """Which earlier tokens a query sees: all, the last ``size``, or those of its own chunk of ``size`` tokens."""

    kind: Literal["full", "window", "chunk"] = "full"
    size: int = 0

    def first_keys(self, queries: IntArray) -> IntArray:
        """Return the earliest position that each of the query positions ``queries`` sees."""
        if self.kind == "window":
            return np.maximum(queries - self.size + 1, 0)
        if self.kind == "chunk":
            return queries // self.size * self.size
        return np.zeros(len(queries), np.int64)


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """One attention call of a forward: the module that makes it, what it stores and its mask.

    Layers are identified by call order, not by the model's layer index: a module that attends twice per forward has
    two.
    """

    module: nn.Module | None
    """None if the call order alone identifies the layer."""
    kv_heads: int
    key_dim: int
    value_dim: int
    mask_kind: MaskKind
    """Full if the model applies its own mask."""
    device: torch.device | None = None
    """Where its keys and values are computed and stored; None means the pool's device."""
    group: int = 1
    """Query heads that share a key head; 1 if that is not known."""

    @property
    def elements(self) -> int:
        """Numbers stored per token."""
        return self.kv_heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True, slots=True)
class StateTensor:
    """A tensor of fixed shape that a recurrent layer keeps per row."""

    layer: int
    kind: Literal["conv", "recurrent"]
    """The last inputs of a convolution, or the hidden state of a recurrence."""
    number: int
    """Index among the layer's states of this kind."""
    shape: tuple[int, ...]
    """Shape for one row."""
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Bytes per row."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class KVLayout:
    """All that a model stores: attention layers, the dtype of their keys and values, and recurrent states."""

    layers: tuple[AttentionLayer, ...]
    """Empty in a model without attention."""
    dtype: torch.dtype
    page_size: int
    states: tuple[StateTensor, ...] = ()
    """Empty in a model without recurrent states."""
    boundary: int | None = None
    """Sequence length above which rotary frequencies switch for all tokens (longrope); None if they never do."""

    decodes_apart: bool = False
    """Whether tokens that a row has generated are to be computed again as they were at first, one by one, and not taken
    for those of a prompt: the bits of their keys and values differ."""

    def alike(self, tokens: int, others: int) -> bool:
        """Return whether sequences of ``tokens`` and ``others`` tokens can share the pages of a common prefix."""
        return self.boundary is None or (tokens > self.boundary) == (others > self.boundary)

    # Read in each step, and a large model has many layers.
    @cached_property
    def bytes_per_token(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        return sum(layer.elements for layer in self.layers) * self.dtype.itemsize

    def shares(self, device: torch.device) -> dict[torch.device, float]:
        """Return each device's share of the KV bytes; ``device`` is the pool's."""
        bytes_on: dict[torch.device, int] = {}
        for layer in self.layers:
            layer_device = layer.device or device
            bytes_on[layer_device] = bytes_on.get(layer_device, 0) + layer.elements * self.dtype.itemsize
        return {layer_device: size / self.bytes_per_token for layer_device, size in bytes_on.items()}

    @property
    def bytes_per_page(self) -> int:
        """Bytes of one page's keys and values in all layers."""
        return self.bytes_per_token * self.page_size

    @cached_property
    def bytes_per_row(self) -> int:
        """Bytes of one row's recurrent states."""
        return sum(state.bytes for state in self.states)

    def pages_for(self, tokens: int) -> int:
        """Return the number of pages that ``tokens`` tokens of one row take."""
        return ceil_div(tokens, self.page_size) if self.layers else 0
