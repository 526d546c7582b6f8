"""Recurrent strategy: recurrent states pass through a cache, and attention layers use an attention backend.

For recurrent and hybrid families. Sequences are not packed into one row, where a recurrence would carry state from one
sequence into the next. They run side by side, ``[b, t]`` without padding: all decoding sequences in one batch, and
prefills of equal length in one batch each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache

from rollout.models.arrays import IntArray, ceil_div, uploaded
from rollout.models.attention import interface
from rollout.models.attention.base import AttentionBackend
from rollout.models.attention.names import AUTO
from rollout.models.attention.probe import PAGE_SIZE, PROBE_TOKENS, attention_layers
from rollout.models.attention.select import select_backend
from rollout.models.errors import UnsupportedAttention, UnsupportedModel
from rollout.models.forward_batch import ForwardBatch
from rollout.models.kv_cache.layout import KVLayout
from rollout.models.kv_cache.page_pool import PagePool
from rollout.models.kv_cache.state_pool import StateRows
from rollout.models.module.borrow import BorrowedModule
from rollout.models.module.inspect import family_name, forward_parameters, output_device, unwrap_model
from rollout.models.module.rope import Rotary, use_sequence_lengths
from rollout.models.runners.base import Runner, RunStrategy, merge_logits
from rollout.models.runners.state_cache import PooledStates, RecordedStates


class RecurrentStrategy(RunStrategy):
    """Runs families that keep recurrent states in transformers' cache, with or without keys and values."""

    name: ClassVar[str] = "recurrent"
    prefills_whole_context: ClassVar[bool] = True

    def __init__(self, model: nn.Module, choice: str = AUTO) -> None:
        super().__init__(model, choice)
        self._arguments = _Arguments(model)
        if self._arguments.cache is None or not _has_state_layers(model) or _keeps_states_itself(model):
            raise UnsupportedModel(
                f"{family_name(model)} keeps no recurrent state, or not in a cache of transformers' own kind."
            )
        self._borrowed = BorrowedModule(model)

    def kv_layout(self) -> KVLayout:
        """See `RunStrategy.kv_layout`."""
        recorded = RecordedStates()
        positions = torch.arange(PROBE_TOKENS, device=output_device(self.model))[None]
        with self.borrow():
            layers, dtype = attention_layers(self.model, **self._arguments(positions, recorded))
        if not recorded.states:
            raise UnsupportedModel(
                f"{family_name(self.model)} stored no recurrent state in the cache that it was given."
            )
        devices = recorded.devices | {layer.device for layer in layers}
        if len(devices) > 1:
            raise UnsupportedModel(
                f"{family_name(self.model)} keeps recurrent states, but lies on several devices: place it on one."
            )
        if recorded.updates != len(layers):
            raise UnsupportedModel(
                f"{family_name(self.model)} attends {len(layers)} times through transformers' attention interface, but "
                f"stores keys and values {recorded.updates} times."
            )
        return KVLayout(
            layers=layers,
            dtype=dtype or unwrap_model(self.model).dtype,
            page_size=PAGE_SIZE,
            states=tuple(recorded.states),
            boundary=Rotary(self.model).boundary,
        )

    def reference_logits(self, ids: IntArray, ends: Sequence[int]) -> torch.Tensor:
        """Return the logits [ends, V] that ``generate`` would compute with transformers' cache.

        Plain forwards will not do: in some families the chunked and the single-step form of the recurrence differ by
        more than rounding.
        """
        tokens = torch.from_numpy(ids[None]).to(output_device(self.model))
        positions = torch.arange(len(ids), device=tokens.device)[None]
        cache = None
        start = 0
        logits = []
        with BorrowedModule(self.model).borrow():
            for end in ends:
                arguments = self._arguments(positions[:, start:end], cache)
                output = self.model(input_ids=tokens[:, start:end], **arguments)
                logits.append(output.logits[0, -1])
                cache = output[self._arguments.cache]
                start = end
        return torch.stack(logits)

    def borrow(self) -> AbstractContextManager[None]:
        """See `RunStrategy.borrow`."""
        return self._borrowed.borrow(interface.NAME)

    def runner(self, pool: PagePool) -> RecurrentRunner:
        """See `RunStrategy.runner`."""
        if pool.layout.layers:
            return RecurrentRunner(self.model, pool, select_backend(self.choice, pool))
        if self.choice != AUTO:
            raise UnsupportedAttention(self.choice, f"{family_name(self.model)} does not attend at all")
        return RecurrentRunner(self.model, pool, None)


class RecurrentRunner(Runner):
    """Runs a module, wrapped or not, with sequences of equal length side by side ``[b, t]``.

    After a failed forward the states of its sequences are lost: some layers may have updated theirs, others not.

    Args:
        model: borrowed while `forward` runs.
        pool: holds states, keys and values.
        backend: writes keys and values, and attends to them; None for models without attention layers.
    """

    def __init__(self, model: nn.Module, pool: PagePool, backend: AttentionBackend | None) -> None:
        self._model = model
        self._arguments = _Arguments(model)
        self._pool = pool
        self._backend = backend
        self.attention = "none" if backend is None else backend.name

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """See `Runner.forward`.

        Raises:
            RuntimeError: a sequence that already has a state has more than one new token.
        """
        groups = list(_groups(batch))
        wanted_lens = batch.wanted_lens
        outputs = [self._run(_select(batch, sequences), int(wanted_lens[sequences].max())) for sequences in groups]
        if len(groups) == 1 and not len(batch.logits_lens):
            return outputs[0][:, -1]  # a single group holds all sequences in order
        return merge_logits(outputs, groups, wanted_lens)

    def _run(self, batch: ForwardBatch, wanted: int) -> torch.Tensor:
        """Return logits [b, wanted, V] of the last tokens of sequences that prefill at equal length or all decode."""
        fresh = not batch.prefix_lens[0]
        cache = PooledStates(StateRows.of(self._pool.states, batch.states), fresh=fresh)
        tokens = batch.tokens.view(len(batch.query_lens), -1)
        positions = uploaded(batch.positions.reshape(tokens.shape), self._pool.device)
        if self._backend is None:
            attention: AbstractContextManager[None] = nullcontext()
        else:
            attention = interface.use_attention(self._backend(self._pool, batch))
        with attention, use_sequence_lengths(batch.full_lens[:, None]):
            output = self._model(input_ids=tokens, **self._arguments(positions, cache, wanted))
        cache.finish()
        logits: torch.Tensor = output.logits[:, -wanted:]
        return logits


class _Arguments:
    """Builds the keyword arguments of a family's forward, under the names that the family uses."""

    def __init__(self, model: nn.Module) -> None:
        self._accepted = forward_parameters(model)
        self.cache = next((name for name in ("past_key_values", "cache_params") if name in self._accepted), None)

    def __call__(self, positions: torch.Tensor, cache: object, wanted: int = 1) -> dict[str, Any]:
        """Return the arguments for new tokens at ``positions`` [b, t]; without a cache the model creates its own.

        Logits are computed for the last ``wanted`` tokens.
        """
        arguments = {"position_ids": positions, "logits_to_keep": wanted, "use_cache": True, self.cache: cache}
        return {name: value for name, value in arguments.items() if name in self._accepted}


def _has_state_layers(model: nn.Module) -> bool:
    """Return whether transformers' own cache for this model has layers for recurrent states."""
    try:
        layers = DynamicCache(config=unwrap_model(model).config).layers
    except (KeyError, AttributeError, TypeError):  # layer kinds that only the model's own cache class supports
        return False
    return any(hasattr(layer, "update_conv_state") for layer in layers)


def _keeps_states_itself(model: nn.Module) -> bool:
    """Return whether modules keep states in their own attributes, which would leak into the caller's module."""
    return any(hasattr(module, "_setup_cache") for module in model.modules())


def _groups(batch: ForwardBatch) -> Iterator[IntArray]:
    """Yield the indices of sequences that can run side by side: all decodes, then prefills by length."""
    keys = np.where(batch.prefix_lens > 0, 0, batch.query_lens)
    if (batch.query_lens[keys == 0] > 1).any():
        raise RuntimeError("A sequence with a recurrent state must decode one token at a time.")
    for key in np.unique(keys):
        yield np.flatnonzero(keys == key)


def _select(batch: ForwardBatch, sequences: IntArray) -> ForwardBatch:
    """Return the forward batch of some sequences of equal query length."""
    length = batch.query_lens[sequences[0]]
    tokens = batch.offsets[sequences][:, None] + np.arange(length)
    pages = ceil_div(int(batch.seq_lens[sequences].max()), PAGE_SIZE)
    return ForwardBatch(
        tokens=batch.tokens[uploaded(tokens.ravel(), batch.tokens.device)],
        page_tables=batch.page_tables[sequences, :pages],
        prefix_lens=batch.prefix_lens[sequences],
        query_lens=batch.query_lens[sequences],
        known_lens=batch.full_lens[sequences],
        states=batch.states[sequences],
    )
