"""The universal tier: the model's own attention runs, over keys and values that a cache gathers from pages.

For families that compute attention on their own. The sequences of a forward are left-padded to one length, as in a
batch of ``generate``; the model builds its own masks and biases from the padding mask, and its attention
layers store and read through the cache.
"""

from __future__ import annotations

import inspect
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
from rollout.models.module.inspect import family_name, output_device, refuse_recurrent, unwrap_model, vocabulary_size
from rollout.models.module.rope import Rotary, use_sequence_lengths
from rollout.models.runners.base import Runner, RunStrategy

_PAGE_SIZE = 16
_PROBE_TOKENS = 5
#: A sequence joins a batch only while it is at least this share of its longest, in new tokens and in all.
_BATCH_FILL = 0.6
#: What the gathered keys and values of one site and batch may take; each further batch reads the weights again.
_BATCH_BYTES = 256 << 20


class PaddedStrategy(RunStrategy):
    """Families that store keys and values through the cache they are given, and mask by padding."""

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
        with self.borrow():
            _Forward(self.model)(positions % vocabulary_size(self.model), torch.ones_like(positions), positions, cache)
        return replace(cache.layout(family_name(self.model)), boundary=Rotary(self.model).boundary)

    def borrow(self) -> AbstractContextManager[None]:
        """See `RunStrategy.borrow`; the attention implementation stays the module's own."""
        return self._borrowed.borrow()

    def runner(self, pool: PagePool) -> PaddedRunner:
        """See `RunStrategy.runner`."""
        return PaddedRunner(self.model, pool)


class PaddedRunner(Runner):
    """Runs a module, through whatever wraps it, with sequences of similar length side by side ``[b, t]``."""

    attention = "own"

    def __init__(self, model: nn.Module, pool: PagePool) -> None:
        self._run = _Forward(model)
        self._pool = pool
        self._device = output_device(model)
        self._token_bytes = pool.layout.dtype.itemsize * max(
            site.kv_heads * (site.key_dim + site.value_dim) for site in pool.layout.layers
        )

    def forward(self, packed: ForwardBatch) -> torch.Tensor:
        """See `Runner.forward`."""
        outputs = []
        batches = list(self._batches(packed))
        for sequences in batches:
            batch = _Batch.of(packed, sequences, self._pool.layout.page_size)
            cache = _GatheringCache(self._pool, batch)
            sources, mask, positions = (
                uploaded(array, self._device) for array in (batch.sources, batch.mask, batch.positions)
            )
            with use_sequence_lengths(packed.full_lens[sequences, None]):
                outputs.append(self._run(packed.tokens[sources], mask, positions, cache))
        logits = outputs[0].new_empty(len(packed.query_lens), outputs[0].shape[-1])
        for sequences, output in zip(batches, outputs, strict=True):
            logits[uploaded(sequences, self._device)] = output
        return logits

    def _batches(self, packed: ForwardBatch) -> Iterator[IntArray]:
        """Sequences to be computed together, all sequences in the end."""
        order = np.lexsort((-packed.seq_lens, -packed.query_lens))
        while len(order):
            lengths, ends = packed.query_lens[order], packed.seq_lens[order]
            longest = np.maximum.accumulate(ends)
            fits = np.arange(1, len(order) + 1) * longest * self._token_bytes <= _BATCH_BYTES
            alike = (lengths >= _BATCH_FILL * lengths[0]) & (np.minimum.accumulate(ends) >= _BATCH_FILL * longest)
            count = max(1, int(np.argmin(np.append(fits & alike, False))))
            yield order[:count]
            order = order[count:]


@dataclass(frozen=True, slots=True)
class _Batch:
    """Sequences left-padded to the longest: b of them, t queries and n keys each."""

    sources: IntArray
    """[b, t] which of the forward's new tokens stand there; what stands in the padding does not matter."""
    positions: IntArray
    """[b, t], 0 in the padding."""
    mask: IntArray
    """[b, n], 1 where there is a token and 0 in the padding."""
    new: IntArray
    """[new tokens] which of the b * t queries are no padding."""
    writes: IntArray
    """[new tokens] slots where their keys and values go."""
    reads: IntArray
    """[b * n] slots to gather. In the padding, the sequence's first: its values are finite where the others are."""

    @classmethod
    def of(cls, packed: ForwardBatch, sequences: IntArray, page_size: int) -> _Batch:
        tables, lengths, ends = packed.page_tables[sequences], packed.query_lens[sequences], packed.seq_lens[sequences]
        most_queries, most_keys = int(lengths.max()), int(ends.max())
        keys = np.arange(most_keys) - (most_keys - ends)[:, None]
        held = np.maximum(keys, 0)
        slots = tables[np.arange(len(sequences))[:, None], held // page_size] * page_size + held % page_size
        columns = np.arange(most_queries) - (most_queries - lengths)[:, None]
        real = columns >= 0
        return cls(
            sources=packed.offsets[sequences, None] + np.maximum(columns, 0),
            positions=np.maximum(keys[:, -most_queries:], 0),
            mask=(keys >= 0).astype(np.int64),
            new=np.flatnonzero(real),
            writes=slots[:, -most_queries:][real],
            reads=slots.ravel(),
        )


class _Forward:
    """Calls a model with the arguments that its family takes."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._named = set(inspect.signature(unwrap_model(model).forward).parameters)

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: _Cache) -> torch.Tensor:
        """Logits [b, V] of the last of the new tokens ids [b, t] at positions [b, t], under mask [b, n]."""
        arguments = {"position_ids": positions, "logits_to_keep": 1}
        output = self._model(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            **{name: value for name, value in arguments.items() if name in self._named},
        )
        cache.finish()
        logits: torch.Tensor = output.logits[:, -1]
        return logits


class _Cache:
    """What attention layers ask of a transformers cache; not one itself, lest it be taken for one of known kind.

    Args:
        queries, keys: new tokens of each sequence in this forward, and all its tokens, padding included.
    """

    is_compileable = False

    def __init__(self, queries: int, keys: int) -> None:
        self._queries, self._keys = queries, keys
        self._updated: list[int] = []

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens stored by a layer, padding included: it counts those of this forward as soon as it has them."""
        return self._keys if layer_idx in self._updated else self._keys - self._queries

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Where the new tokens begin among the keys."""
        return self.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:  # noqa: ARG002
        """Columns of the mask, and which key is the first."""
        return self._keys, 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores [b, kv_heads, t, dim]; returns all, [b, kv_heads, n, dim], contiguous as families expect it."""
        self._updated.append(layer_idx)
        return self.exchange(len(self._updated) - 1, key_states, value_states)

    def exchange(self, site: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores and returns what `update` says, for the call number ``site``."""
        raise NotImplementedError

    def finish(self) -> None:
        """The forward is over."""


class _RecordingCache(_Cache):
    """Learns what is stored, from a forward of one sequence that has nothing stored."""

    def __init__(self, tokens: int) -> None:
        super().__init__(tokens, tokens)
        self._sites: list[AttentionLayer] = []
        self._dtypes: set[torch.dtype] = set()
        self._odd: list[str] = []

    def exchange(self, site: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ARG002
        for stored in (keys, values):
            if stored.ndim != 4 or stored.shape[0] != 1 or stored.shape[1:3] != (keys.shape[1], self._queries):
                self._odd.append(str(tuple(stored.shape)))
        self._sites.append(
            AttentionLayer(None, keys.shape[1], keys.shape[-1], values.shape[-1], MaskKind(), values.device)
        )
        self._dtypes.add(values.dtype)
        return keys.contiguous(), values.contiguous()

    def layout(self, family: str) -> KVLayout:
        """What was learnt.

        Raises:
            UnsupportedModel: nothing was stored, or in shapes that have no place in pages.
        """
        if not self._sites:
            raise UnsupportedModel(f"{family} stores no keys and values in the cache that it is given.")
        if self._odd:
            raise UnsupportedModel(f"{family} stores keys and values of unknown shape: {self._odd[0]}.")
        if len(self._dtypes) != 1:
            raise UnsupportedModel(f"{family} has values of several dtypes: {sorted(map(str, self._dtypes))}.")
        return KVLayout(tuple(self._sites), next(iter(self._dtypes)), _PAGE_SIZE)


class _GatheringCache(_Cache):
    """Stores to pages, and gathers from them."""

    def __init__(self, pool: PagePool, batch: _Batch) -> None:
        super().__init__(batch.sources.shape[1], batch.mask.shape[1])
        self._slots = [(Slots.of(part, batch.writes), Slots.of(part, batch.reads)) for part in pool.device_pools]
        # The queries that are no padding; all of them in most forwards, and then None.
        some = len(batch.new) < batch.sources.size
        self._new = [uploaded(batch.new, part.device) if some else None for part in pool.device_pools]
        self._layer_locations = pool.layer_locations

    def exchange(self, site: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if site >= len(self._layer_locations):
            raise RuntimeError("The model stores more often than the probe saw.")
        part, index = self._layer_locations[site]
        writes, reads = self._slots[part]
        writes.write(index, *(self._rows(states, self._new[part]) for states in (keys, values)))
        stored = zip(reads.read(index), (keys, values), strict=True)
        # The model goes on in its own dtypes: under autocast keys may be wider than what is kept.
        gathered = [
            rows.view(len(new), self._keys, *rows.shape[1:]).transpose(1, 2).to(new.dtype).contiguous()
            for rows, new in stored
        ]
        return gathered[0], gathered[1]

    @staticmethod
    def _rows(states: torch.Tensor, new: torch.Tensor | None) -> torch.Tensor:
        """[b, kv_heads, t, dim] to [new tokens, kv_heads, dim]."""
        rows = states.transpose(1, 2).flatten(0, 1)
        return rows if new is None else rows.index_select(0, new)

    def finish(self) -> None:
        if len(self._updated) != len(self._layer_locations):
            raise RuntimeError(
                f"The model stored {len(self._updated)} times, not {len(self._layer_locations)} as the probe saw."
            )
