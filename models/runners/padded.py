"""Padded strategy: the model's own attention code runs over keys and values gathered from pages.

For families that do not call transformers' attention interface. The sequences of a forward are left-padded to one
length, as ``generate`` pads a batch. The model builds its masks and biases from the padding mask, and its attention
layers store and read keys and values through the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from rollout.models.arrays import IntArray, uploaded
from rollout.models.attention.names import AUTO
from rollout.models.errors import UnsupportedModel
from rollout.models.forward_batch import ForwardBatch
from rollout.models.kv_cache.layout import AttentionLayer, KVLayout, MaskKind
from rollout.models.kv_cache.page_pool import PagePool, Slots
from rollout.models.module.borrow import BorrowedModule
from rollout.models.module.inspect import (
    family_name,
    forward_parameters,
    output_device,
    refuse_recurrent,
    vocabulary_size,
)
from rollout.models.module.rope import Rotary, use_sequence_lengths
from rollout.models.runners.base import Runner, RunStrategy, merge_logits

_PAGE_SIZE = 16
_PROBE_TOKENS = 5
#: A sequence joins a batch only if its query and its whole length are at least this share of the batch's longest.
_BATCH_FILL = 0.6
#: A batch computes logits for at most so many times the tokens of which they are wanted.
_LOGITS_FILL = 2
#: Limit on the gathered keys and values of one layer and batch; every further batch reads the weights again.
_BATCH_BYTES = 256 << 20


class PaddedStrategy(RunStrategy):
    """Runs families that store keys and values through the cache argument and mask by padding."""

    name: ClassVar[str] = "padded"
    chooses_attention: ClassVar[bool] = False

    def __init__(self, model: nn.Module, choice: str = AUTO) -> None:
        super().__init__(model, choice)
        refuse_recurrent(model)
        self._borrowed = BorrowedModule(model)

    def kv_layout(self) -> KVLayout:
        """See `RunStrategy.kv_layout`."""
        cache = _RecordingCache(_PROBE_TOKENS)
        positions = torch.arange(_PROBE_TOKENS, device=output_device(self.model))[None]
        ids = positions % vocabulary_size(self.model)
        with self.borrow():
            _Forward(self.model)(ids=ids, mask=torch.ones_like(positions), positions=positions, cache=cache)
        return replace(cache.layout(family_name(self.model)), boundary=Rotary(self.model).boundary)

    def borrow(self) -> AbstractContextManager[None]:
        """See `RunStrategy.borrow`; the model keeps its attention implementation."""
        return self._borrowed.borrow()

    def runner(self, pool: PagePool) -> PaddedRunner:
        """See `RunStrategy.runner`."""
        return PaddedRunner(self.model, pool)


class PaddedRunner(Runner):
    """Runs a module, wrapped or not, with sequences of similar length side by side ``[b, t]``."""

    attention = "own"

    def __init__(self, model: nn.Module, pool: PagePool) -> None:
        self._run = _Forward(model)
        self._pool = pool
        self._device = output_device(model)
        self._token_bytes = pool.layout.dtype.itemsize * max(layer.elements for layer in pool.layout.layers)

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """See `Runner.forward`."""
        outputs = []
        groups = list(self._batches(batch))
        wanted_lens = batch.wanted_lens
        for sequences in groups:
            padded = _PaddedBatch.of(batch, sequences, self._pool.layout.page_size)
            sources = uploaded(padded.sources, self._device)
            with use_sequence_lengths(batch.full_lens[sequences, None]):
                logits = self._run(
                    ids=batch.tokens[sources],
                    mask=uploaded(padded.mask, self._device),
                    positions=uploaded(padded.positions, self._device),
                    cache=_GatheringCache(self._pool, padded),
                    wanted=int(wanted_lens[sequences].max()),
                )
            outputs.append(logits)
        return merge_logits(outputs, groups, wanted_lens)

    def _batches(self, batch: ForwardBatch) -> Iterator[IntArray]:
        """Group the sequences into padded batches; yield the indices of each group."""
        wanted_lens = batch.wanted_lens
        order = np.lexsort((-batch.seq_lens, -wanted_lens, -batch.query_lens))
        while len(order):
            queries, keys = batch.query_lens[order], batch.seq_lens[order]
            longest = np.maximum.accumulate(keys)
            fits = np.arange(1, len(order) + 1) * longest * self._token_bytes <= _BATCH_BYTES
            similar = (queries >= _BATCH_FILL * queries[0]) & (np.minimum.accumulate(keys) >= _BATCH_FILL * longest)
            # Logits are computed for as many tokens of each sequence as are wanted of one of them.
            wanted = wanted_lens[order]
            computed = np.arange(1, len(order) + 1) * np.maximum.accumulate(wanted)
            similar &= computed <= _LOGITS_FILL * np.maximum(np.cumsum(wanted), np.arange(1, len(order) + 1))
            count = max(1, int(np.argmin(np.append(fits & similar, False))))
            yield order[:count]
            order = order[count:]


@dataclass(frozen=True, slots=True)
class _PaddedBatch:
    """Sequences left-padded to the longest: b of them, with t queries and n keys each."""

    sources: IntArray
    """[b, t] index into the forward's new tokens; arbitrary in the padding."""
    positions: IntArray
    """[b, t] position of each query; 0 in the padding."""
    mask: IntArray
    """[b, n] 1 for a token, 0 for padding."""
    new: IntArray
    """[new tokens] indices of the b * t queries that are not padding."""
    writes: IntArray
    """[new tokens] slots to write keys and values to."""
    reads: IntArray
    """[b * n] slots to gather. Padding reads the sequence's first slot, whose values are as finite as the others."""

    @classmethod
    def of(cls, batch: ForwardBatch, sequences: IntArray, page_size: int) -> _PaddedBatch:
        """Pad some sequences of a forward."""
        tables = batch.page_tables[sequences]
        query_lens, seq_lens = batch.query_lens[sequences], batch.seq_lens[sequences]
        max_queries, max_keys = int(query_lens.max()), int(seq_lens.max())
        keys = np.arange(max_keys) - (max_keys - seq_lens)[:, None]
        held = np.maximum(keys, 0)
        slots = tables[np.arange(len(sequences))[:, None], held // page_size] * page_size + held % page_size
        columns = np.arange(max_queries) - (max_queries - query_lens)[:, None]
        is_token = columns >= 0
        return cls(
            sources=batch.offsets[sequences, None] + np.maximum(columns, 0),
            positions=np.maximum(keys[:, -max_queries:], 0),
            mask=(keys >= 0).astype(np.int64),
            new=np.flatnonzero(is_token),
            writes=slots[:, -max_queries:][is_token],
            reads=slots.ravel(),
        )


class _Forward:
    """Calls a model with the arguments that its forward accepts."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._accepted = forward_parameters(model)

    def __call__(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: _Cache, wanted: int = 1
    ) -> torch.Tensor:
        """Return logits [b, k, V] of the last new tokens, ``wanted`` of each sequence but at least one.

        ids and positions are [b, t], mask is [b, n].
        """
        wanted = max(1, wanted)  # 0 would mean all
        optional = {"position_ids": positions, "logits_to_keep": wanted}
        output = self._model(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            **{name: value for name, value in optional.items() if name in self._accepted},
        )
        cache.finish()
        logits: torch.Tensor = output.logits[:, -wanted:]
        return logits


class _Cache:
    """The parts of transformers' cache interface that attention layers call.

    Not a subclass of transformers' cache, so that no model mistakes it for a known kind.

    Args:
        queries: new tokens of each sequence in this forward, padding included.
        keys: all tokens of each sequence, padding included.
    """

    is_compileable = False

    def __init__(self, queries: int, keys: int) -> None:
        self._queries = queries
        self._keys = keys
        self._updated: list[int] = []

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the tokens stored by a layer, padding included; counts this forward's once they are stored."""
        return self._keys if layer_idx in self._updated else self._keys - self._queries

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Return the index of the first new token among the keys."""
        return self.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:  # noqa: ARG002
        """Return the number of mask columns and the index of the first key."""
        return self._keys, 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store [b, kv_heads, t, dim]; return all keys and values [b, kv_heads, n, dim], contiguous."""
        self._updated.append(layer_idx)
        return self.exchange(len(self._updated) - 1, key_states, value_states)

    def exchange(self, call: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Implement `update` for the attention layer with this number in call order."""
        raise NotImplementedError

    def finish(self) -> None:
        """Check the calls after the forward."""


class _RecordingCache(_Cache):
    """Records what a model stores in one forward of one new sequence."""

    def __init__(self, tokens: int) -> None:
        super().__init__(queries=tokens, keys=tokens)
        self._layers: list[AttentionLayer] = []
        self._dtypes: set[torch.dtype] = set()
        self._unknown_shapes: list[str] = []

    def exchange(self, call: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ARG002
        for states in (keys, values):
            if states.ndim != 4 or states.shape[0] != 1 or states.shape[1:3] != (keys.shape[1], self._queries):
                self._unknown_shapes.append(str(tuple(states.shape)))
        self._layers.append(
            AttentionLayer(
                module=None,
                kv_heads=keys.shape[1],
                key_dim=keys.shape[-1],
                value_dim=values.shape[-1],
                mask_kind=MaskKind(),
                device=values.device,
            )
        )
        self._dtypes.add(values.dtype)
        return keys.contiguous(), values.contiguous()

    def layout(self, family: str) -> KVLayout:
        """Return the recorded layout.

        Raises:
            UnsupportedModel: the model stored nothing, or shapes or dtypes that pages cannot hold.
        """
        if not self._layers:
            raise UnsupportedModel(f"{family} stores no keys and values in the cache that it is given.")
        if self._unknown_shapes:
            raise UnsupportedModel(f"{family} stores keys and values of unknown shape: {self._unknown_shapes[0]}.")
        if len(self._dtypes) != 1:
            raise UnsupportedModel(f"{family} has values of several dtypes: {sorted(map(str, self._dtypes))}.")
        return KVLayout(layers=tuple(self._layers), dtype=next(iter(self._dtypes)), page_size=_PAGE_SIZE)


class _GatheringCache(_Cache):
    """Writes new keys and values to pages and gathers all of them from pages."""

    def __init__(self, pool: PagePool, batch: _PaddedBatch) -> None:
        super().__init__(queries=batch.sources.shape[1], keys=batch.mask.shape[1])
        self._slots = [(Slots.of(part, batch.writes), Slots.of(part, batch.reads)) for part in pool.device_pools]
        # None if no query is padding, as in most forwards.
        has_padding = len(batch.new) < batch.sources.size
        self._new = [uploaded(batch.new, part.device) if has_padding else None for part in pool.device_pools]
        self._layer_locations = pool.layer_locations

    def exchange(self, call: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if call >= len(self._layer_locations):
            raise RuntimeError(
                f"The model stored keys and values more often than the {len(self._layer_locations)} times that the "
                "probe saw."
            )
        part, index = self._layer_locations[call]
        writes, reads = self._slots[part]
        writes.write(index, self._new_tokens(keys, part), self._new_tokens(values, part))
        stored_keys, stored_values = reads.read(index)
        return self._side_by_side(stored_keys, keys), self._side_by_side(stored_values, values)

    def _new_tokens(self, states: torch.Tensor, part: int) -> torch.Tensor:
        """Reorder [b, kv_heads, t, dim] to [new tokens, kv_heads, dim]."""
        tokens = states.transpose(1, 2).flatten(0, 1)
        new = self._new[part]
        return tokens if new is None else tokens.index_select(0, new)

    def _side_by_side(self, stored: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Reorder [b * n, kv_heads, dim] to [b, kv_heads, n, dim] in the dtype of ``states``.

        Under autocast the model's keys may be wider than the stored ones.
        """
        sequences = stored.view(len(states), self._keys, *stored.shape[1:])
        return sequences.transpose(1, 2).to(states.dtype).contiguous()

    def finish(self) -> None:
        if len(self._updated) != len(self._layer_locations):
            raise RuntimeError(
                f"The model stored keys and values {len(self._updated)} times, not {len(self._layer_locations)} times "
                "as the probe saw."
            )
