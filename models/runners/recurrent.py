"""The tier for recurrent and hybrid families: states come and go through a cache, attention through pages.

Sequences of a forward do not stand in one row, where a recurrence would run on from one into the next, but side
by side, ``[b, t]`` without padding: all that decode together, and contexts with those of the same length.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache

from rollout.models.arrays import IntArray, uploaded
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
from rollout.models.module.inspect import family_name, output_device, unwrap_model
from rollout.models.module.rope import Rotary, use_sequence_lengths
from rollout.models.runners.base import Runner, RunStrategy
from rollout.models.runners.state_cache import PooledStates, RecordedStates


class RecurrentStrategy(RunStrategy):
    """Families that keep recurrent states in transformers' cache, besides keys and values or instead of them."""

    name: ClassVar[str] = "recurrent"
    whole_contexts: ClassVar[bool] = True

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
            sites, dtype = attention_layers(self.model, **self._arguments(positions, recorded))
        if not recorded.states:
            raise UnsupportedModel(
                f"{family_name(self.model)} stored no recurrent state in the cache that it was given."
            )
        devices = recorded.devices | {site.device for site in sites}
        if len(devices) > 1:
            raise UnsupportedModel(
                f"{family_name(self.model)} keeps recurrent states, but lies on several devices: place it on one."
            )
        if recorded.updates != len(sites):
            raise UnsupportedModel(
                f"{family_name(self.model)} attends {len(sites)} times through transformers' attention interface, but "
                f"stores keys and values {recorded.updates} times."
            )
        dtype = dtype or unwrap_model(self.model).dtype
        return KVLayout(sites, dtype, PAGE_SIZE, tuple(recorded.states), Rotary(self.model).boundary)

    def reference_logits(self, ids: IntArray, ends: Sequence[int]) -> torch.Tensor:
        """See `RunStrategy.reference_logits`: as ``generate`` would, with transformers' cache.

        Its chunked and its step form of a recurrence differ by more than rounding in some families.
        """
        tokens = torch.from_numpy(ids[None]).to(output_device(self.model))
        positions = torch.arange(len(ids), device=tokens.device)[None]
        cache, start, own = None, 0, []
        with BorrowedModule(self.model).borrow():
            for end in ends:
                arguments = self._arguments(positions[:, start:end], cache)
                output = self.model(input_ids=tokens[:, start:end], **arguments)
                own.append(output.logits[0, -1])
                cache, start = output[self._arguments.cache], end
        return torch.stack(own)

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
    """Runs a module, through whatever wraps it, with sequences of equal length side by side ``[b, t]``.

    When a forward fails, the states of its sequences are lost: some layers may have gone on, others not.

    Args:
        model: on loan while `forward` runs.
        pool: where keys and values lie, and states.
        steps: how keys and values are written and read; None where there are none.
    """

    def __init__(self, model: nn.Module, pool: PagePool, steps: AttentionBackend | None) -> None:
        self._model = model
        self._arguments = _Arguments(model)
        self._pool, self._steps = pool, steps
        self.attention = "none" if steps is None else steps.name

    def forward(self, packed: ForwardBatch) -> torch.Tensor:
        """See `Runner.forward`.

        Raises:
            RuntimeError: a sequence that has a state goes on by several tokens.
        """
        groups = list(_groups(packed))
        outputs = [self._run(_part(packed, sequences)) for sequences in groups]
        if len(groups) == 1:
            return outputs[0]
        logits = outputs[0].new_empty(len(packed.query_lens), outputs[0].shape[-1])
        for sequences, output in zip(groups, outputs, strict=True):
            logits[uploaded(sequences, logits.device)] = output
        return logits

    def _run(self, packed: ForwardBatch) -> torch.Tensor:
        """Logits [b, V] of the last tokens of sequences that are equally long and all new, or none of them."""
        cache = PooledStates(StateRows.of(self._pool.states, packed.states), fresh=not packed.prefix_lens[0])
        tokens = packed.tokens.view(len(packed.query_lens), -1)
        positions = uploaded(packed.positions.reshape(tokens.shape), self._pool.device)
        step = nullcontext() if self._steps is None else interface.use_attention(self._steps(self._pool, packed))
        with step, use_sequence_lengths(packed.full_lens[:, None]):
            output = self._model(input_ids=tokens, **self._arguments(positions, cache))
        cache.finish()
        logits: torch.Tensor = output.logits[:, -1]
        return logits


class _Arguments:
    """What a family's forward takes besides token ids, under the names it has for it."""

    def __init__(self, model: nn.Module) -> None:
        self._named = set(inspect.signature(unwrap_model(model).forward).parameters)
        self.cache = next((name for name in ("past_key_values", "cache_params") if name in self._named), None)

    def __call__(self, positions: torch.Tensor, cache: object) -> dict[str, Any]:
        """For new tokens at ``positions`` [b, t]; the model makes a cache of its own when that is None."""
        arguments = {"position_ids": positions, "logits_to_keep": 1, "use_cache": True, self.cache: cache}
        return {name: value for name, value in arguments.items() if name in self._named}


def _has_state_layers(model: nn.Module) -> bool:
    """Whether transformers' own cache for this model has layers for recurrent states."""
    try:
        layers = DynamicCache(config=unwrap_model(model).config).layers
    except (KeyError, AttributeError, TypeError):  # layers of kinds that only the model's own cache knows
        return False
    return any(hasattr(layer, "update_conv_state") for layer in layers)


def _keeps_states_itself(model: nn.Module) -> bool:
    """Whether modules keep states as attributes of their own, which would be left behind on a live module."""
    return any(hasattr(module, "_setup_cache") for module in model.modules())


def _groups(packed: ForwardBatch) -> Iterator[IntArray]:
    """Sequences that can stand side by side, all of them in the end."""
    keys = np.where(packed.prefix_lens > 0, 0, packed.query_lens)
    if (packed.query_lens[keys == 0] > 1).any():
        raise RuntimeError("A sequence with a recurrent state goes on by one token at a time.")
    for key in np.unique(keys):
        yield np.flatnonzero(keys == key)


def _part(packed: ForwardBatch, sequences: IntArray) -> ForwardBatch:
    """Some sequences, equally long, of a forward."""
    length = packed.query_lens[sequences[0]]
    of = packed.offsets[sequences][:, None] + np.arange(length)
    pages = -(-int(packed.seq_lens[sequences].max()) // PAGE_SIZE)
    return ForwardBatch(
        packed.tokens[uploaded(of.ravel(), packed.tokens.device)],
        packed.page_tables[sequences, :pages],
        packed.prefix_lens[sequences],
        packed.query_lens[sequences],
        states=packed.states[sequences],
    )
