"""A cache for recurrent layers, in transformers' cache interface, backed by a pool of states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F

from rollout.models.kv_cache.layout import StateTensor
from rollout.models.kv_cache.state_pool import StateRows

Kind = Literal["conv", "recurrent"]


@dataclass(frozen=True, slots=True)
class _States:
    """The states of one kind in a layer, indexed by number."""

    cache: StateCache
    kind: Kind
    layer: int

    def __getitem__(self, number: int) -> torch.Tensor:
        return self.cache.load(self.kind, self.layer, number)


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer of the cache, with the attributes that transformers 5.17 reads."""

    cache: StateCache
    index: int

    @property
    def record_past(self) -> bool:
        return self.cache.is_recording_past(self.index)

    @property
    def conv_states(self) -> _States:
        return _States(self.cache, "conv", self.index)

    @property
    def recurrent_states(self) -> _States:
        return _States(self.cache, "recurrent", self.index)


@dataclass(frozen=True, slots=True)
class _Layers:
    """All layers, by index; a model reads only those that it has."""

    cache: StateCache

    def __getitem__(self, index: int) -> _Layer:
        return _Layer(self.cache, index)


class StateCache:
    """Holds recurrent states; keys and values pass through to the attention function, which stores them itself.

    Not a subclass of transformers' cache, so that no model mistakes it for a known kind. Layers pass arguments by
    keyword, so parameters keep transformers' names.

    Args:
        fresh: the sequences are new and have no states yet.
    """

    is_compileable = False

    def __init__(self, fresh: bool) -> None:
        self._fresh = fresh

    # -- recurrent layers ------------------------------------------------------------------------------

    @property
    def layers(self) -> _Layers:
        """The states by layer, for transformers versions without `get_conv_state` and `get_recurrent_state`."""
        return _Layers(self)

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:  # noqa: ARG002
        """Return whether the sequences already have states."""
        return not self._fresh

    def is_recording_past(self, layer_idx: int) -> bool:  # noqa: ARG002
        """Return False: states of earlier tokens are never kept."""
        return False

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """Return the last inputs of a convolution [b, channels, kernel]; a layer may update them in place."""
        return None if self._fresh else self.load("conv", layer_idx, state_idx)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """Return the state of a recurrence [b, ...]; a layer may update it in place."""
        return None if self._fresh else self.load("recurrent", layer_idx, state_idx)

    def update_conv_state(
        self,
        conv_states: torch.Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **_kwargs: Any,
    ) -> torch.Tensor:
        """Store new inputs [b, channels, t] of a convolution; return them behind the earlier inputs or zeros."""
        if self._fresh:
            kernel = conv_states.shape[-1] if conv_kernel_size is None else conv_kernel_size
            inputs = F.pad(conv_states, (max(0, kernel - conv_states.shape[-1]), 0))
        else:
            earlier = self.load("conv", layer_idx, state_idx)
            kernel = earlier.shape[-1]
            inputs = torch.cat([earlier, conv_states], -1)
        self.store("conv", layer_idx, state_idx, inputs[..., -kernel:])
        return inputs

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **_kwargs: Any
    ) -> torch.Tensor:
        """Store and return the new state [b, ...] of a recurrence."""
        self.store("recurrent", layer_idx, state_idx, recurrent_states)
        return recurrent_states

    def load(self, kind: Kind, layer: int, number: int) -> torch.Tensor:
        """Return a state of all sequences, which the caller may change in place."""
        raise NotImplementedError

    def store(self, kind: Kind, layer: int, number: int, values: torch.Tensor) -> None:
        """Store a new state of all sequences."""
        raise NotImplementedError

    # -- attention layers and masks --------------------------------------------------------------------

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,  # noqa: ARG002 - part of the interface
        *_args: Any,
        **_kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return only the new keys and values; the attention function reads the others from pages."""
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002
        """Return 0: prefix lengths differ by sequence, and positions are passed explicitly."""
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:  # noqa: ARG002
        """Return 0: only the probe builds masks, and its tokens start at position 0."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:  # noqa: ARG002
        """Return the number of mask columns and the index of the first key."""
        return query_length, 0


class RecordedStates(StateCache):
    """Records which states a model keeps in one forward of one new sequence."""

    def __init__(self) -> None:
        super().__init__(fresh=True)
        self.states: list[StateTensor] = []
        self.devices: set[torch.device] = set()
        self.updates = 0
        """How often layers stored keys and values."""

    def store(self, kind: Kind, layer: int, number: int, values: torch.Tensor) -> None:
        self.devices.add(values.device)
        self.states.append(
            StateTensor(layer=layer, kind=kind, number=number, shape=tuple(values.shape[1:]), dtype=values.dtype)
        )

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.updates += 1
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


class PooledStates(StateCache):
    """Reads and writes the states of some rows in a pool.

    A layer may change loaded states in place, so they are written back when the next layer loads its own.
    """

    def __init__(self, rows: StateRows, fresh: bool) -> None:
        super().__init__(fresh)
        self._rows = rows
        self._index = {(state.kind, state.layer, state.number): index for index, state in enumerate(rows.pool.layout)}
        self._layer = -1
        self._loaded: dict[int, torch.Tensor] = {}

    def load(self, kind: Kind, layer: int, number: int) -> torch.Tensor:
        if layer != self._layer:
            self.finish()
            self._layer = layer
        index = self._index[kind, layer, number]
        if index not in self._loaded:
            self._loaded[index] = self._rows.read(index)
        return self._loaded[index]

    def store(self, kind: Kind, layer: int, number: int, values: torch.Tensor) -> None:
        index = self._index[kind, layer, number]
        self._rows.write(index, values)
        self._loaded.pop(index, None)

    def finish(self) -> None:
        """Write back the states that the last layer loaded."""
        for index, values in self._loaded.items():
            self._rows.write(index, values)
        self._loaded.clear()
