"""One forward over pages: checks who attends, and lets a backend write and read what the pages hold."""

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
    """Answers the attention calls of one packed forward, site by site in the order that the probe saw.

    Args:
        pool: where keys and values lie.
        packed: what the forward computes.
    """

    name: ClassVar[str]
    """Of this way to attend, as the log and a run's folder have it."""

    def __init__(self, pool: PagePool, packed: ForwardBatch) -> None:
        self.pool = pool
        self.packed = packed
        self.layout: KVLayout = pool.layout
        self._calls = 0

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,  # noqa: ARG002 - none is built for this implementation
        scores: ScoreParams,
    ) -> torch.Tensor:
        """See `ForwardAttention.attend`; the b * t queries, by row, are the tokens of ``packed``."""
        # [b, heads, t, dim] -> [T, heads, dim]
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        output = self.attend_tokens(module, q, k, v, scores)
        return output.view(query.shape[0], query.shape[2], *output.shape[1:])

    def attend_tokens(
        self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scores: ScoreParams
    ) -> torch.Tensor:
        """The same for query [T, heads, key_dim], key and value [T, kv_heads, dim], the tokens of ``packed``.

        Returns [T, heads, value_dim].

        Raises:
            RuntimeError: the model's calls are not those that the probe saw.
        """
        index, self._calls = self._calls, self._calls + 1
        if index >= len(self.layout.layers) or self.layout.layers[index].module is not module:
            raise RuntimeError(f"{type(module).__name__} attends out of the order that the probe saw.")
        dtype = self.layout.dtype
        if not query.dtype == key.dtype == value.dtype == dtype:
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        return self.compute(index, query, key, value, scores)

    @abstractmethod
    def compute(
        self, index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: ScoreParams
    ) -> torch.Tensor:
        """Writes k, v [T, kv_heads, dim] of site ``index`` and attends with q [T, heads, key_dim].

        Returns [T, heads, value_dim], in any dtype that the model goes on with.
        """


class AttentionBackend(Protocol):
    """Makes the step that answers the attention calls of one forward."""

    @property
    def name(self) -> str:
        """See `PagedAttention.name`."""
        ...

    def __call__(self, pool: PagePool, packed: ForwardBatch) -> PagedAttention: ...
