"""What a model stores in KV memory: one site for each attention call of a forward, in call order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Span:
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
class Site:
    """One attention call of a forward: who makes it, what it stores and what it sees.

    Sites are told apart by call order, not by layer index: a layer that attends twice, or a module that
    serves several layers, has as many sites as it makes calls.
    """

    module: nn.Module
    kv_heads: int
    key_dim: int
    value_dim: int
    span: Span


@dataclass(frozen=True, slots=True)
class KVLayout:
    """All sites of a model, and the dtype in which their keys and values are kept."""

    sites: tuple[Site, ...]
    dtype: torch.dtype
    page_size: int

    @property
    def bytes_per_token(self) -> int:
        elements = sum(site.kv_heads * (site.key_dim + site.value_dim) for site in self.sites)
        return elements * self.dtype.itemsize

    @property
    def bytes_per_page(self) -> int:
        return self.bytes_per_token * self.page_size
