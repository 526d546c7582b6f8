"""Interface of paged attention: a backend creates one `PagedAttention` per forward."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Protocol

import torch
from torch import nn

from rollout.models.attention.interface import ScoreParams
from rollout.models.forward_batch import ForwardBatch
from rollout.models.kv_cache.layout import KVLayout
from rollout.models.kv_cache.page_pool import PagePool


class PagedAttention(ABC):
    """Serves the attention calls of one forward, layer by layer in the order that the probe recorded.

    Args:
        pool: holds keys and values.
        batch: the sequences of the forward.
    """

    name: ClassVar[str]
    """Name of the backend, as in the log and in the run directory."""

    def __init__(self, pool: PagePool, batch: ForwardBatch) -> None:
        self.pool = pool
        self.batch = batch
        self.layout: KVLayout = pool.layout
        self._calls = 0

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,  # noqa: ARG002 - transformers builds none for this implementation
        scores: ScoreParams,
    ) -> torch.Tensor:
        """Implement `ForwardAttention.attend`; the b * t queries are the tokens of ``batch``, in order."""
        # [b, heads, t, dim] -> [T, heads, dim]
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        output = self.attend_tokens(module, q, k, v, scores)
        return output.view(query.shape[0], query.shape[2], *output.shape[1:])

    def attend_tokens(
        self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scores: ScoreParams
    ) -> torch.Tensor:
        """Attend with query [T, heads, key_dim] and new key, value [T, kv_heads, dim] of the tokens of ``batch``.

        Returns [T, heads, value_dim].

        Raises:
            RuntimeError: the model's attention calls differ from those that the probe recorded.
        """
        index = self._next_layer(module)
        dtype = self.layout.dtype
        if not query.dtype == key.dtype == value.dtype == dtype:
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        return self.compute(index, query, key, value, scores)

    def _next_layer(self, module: nn.Module) -> int:
        """Count a call; return the layer's index in the layout, see `attend_tokens`."""
        index, self._calls = self._calls, self._calls + 1
        if index >= len(self.layout.layers) or self.layout.layers[index].module is not module:
            raise RuntimeError(
                f"Attention call {index} of this forward came from {type(module).__name__}, out of the order that the "
                "probe recorded."
            )
        return index

    @abstractmethod
    def compute(
        self, index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: ScoreParams
    ) -> torch.Tensor:
        """Write k, v [T, kv_heads, dim] of layer ``index`` to their pages and attend with q [T, heads, key_dim].

        Returns [T, heads, value_dim], in any dtype that the model accepts.
        """


class RotatingAttention(PagedAttention):
    """Paged attention that can rotate queries and keys by itself, in the launch that writes the keys to their pages."""

    @property
    @abstractmethod
    def rotates(self) -> bool:
        """Whether it can in this forward."""

    def attend_rotating(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        scores: ScoreParams,
    ) -> torch.Tensor:
        """Attend like `attend_tokens` after rotating the halves of heads, as `PointwiseKernel.rotate` does.

        Args:
            module, query, key, value, scores: as for `attend_tokens`, all in the layout's dtype.
            angles: cosines and sines [T, key_dim] in that dtype, contiguous.
        """
        return self.compute_rotating(self._next_layer(module), query, key, value, angles, scores)

    @abstractmethod
    def compute_rotating(
        self,
        index: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        scores: ScoreParams,
    ) -> torch.Tensor:
        """Implement `attend_rotating` in layer ``index``, like `compute`."""


class AttentionBackend(Protocol):
    """Creates the `PagedAttention` of each forward."""

    @property
    def name(self) -> str:
        """See `PagedAttention.name`."""
        ...

    def __call__(self, pool: PagePool, batch: ForwardBatch) -> PagedAttention:
        """Create the attention of one forward over the pages of ``pool``."""
        ...
