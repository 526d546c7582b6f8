"""What recurrent layers ask of a transformers cache, answered from a pool of states."""

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
    """One kind of a layer's states, by number."""

    cache: StateCache
    kind: Kind
    layer: int

    def __getitem__(self, number: int) -> torch.Tensor:
        return self.cache.load(self.kind, self.layer, number)


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer of the cache, as transformers 5.17 reaches into it."""

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
    """All of them: a model asks only for those that it has."""

    cache: StateCache

    def __getitem__(self, index: int) -> _Layer:
        return _Layer(self.cache, index)


class StateCache:
    """Holds states; keys and values pass through to the attention function, which stores them itself.

    Not a subclass of transformers' cache, lest it be taken for one of known kind. Parameters have the names
    by which layers pass them.

    Args:
        fresh: the sequences are new, and have no states yet.
    """

    is_compileable = False

    def __init__(self, fresh: bool) -> None:
        self._fresh = fresh

    # -- recurrent layers ------------------------------------------------------------------------------

    @property
    def layers(self) -> _Layers:
        """What transformers before `get_conv_state` and `get_recurrent_state` asks instead of them."""
        return _Layers(self)

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:  # noqa: ARG002
        """Whether there are states to go on from."""
        return not self._fresh

    def is_recording_past(self, layer_idx: int) -> bool:  # noqa: ARG002
        """Whether states of earlier tokens are kept too: never."""
        return False

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """[b, channels, kernel]: the last inputs of a convolution. A layer may go on in place."""
        return None if self._fresh else self.load("conv", layer_idx, state_idx)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """[b, ...]: what a recurrence has summed up. A layer may go on in place."""
        return None if self._fresh else self.load("recurrent", layer_idx, state_idx)

    def update_conv_state(
        self,
        conv_states: torch.Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **_kwargs: Any,
    ) -> torch.Tensor:
        """New inputs [b, channels, t] of a convolution; returns them after those before, zeros at a beginning."""
        if self._fresh:
            kernel = conv_states.shape[-1] if conv_kernel_size is None else conv_kernel_size
            inputs = F.pad(conv_states, (max(0, kernel - conv_states.shape[-1]), 0))
        else:
            before = self.load("conv", layer_idx, state_idx)
            kernel = before.shape[-1]
            inputs = torch.cat([before, conv_states], -1)
        self.store("conv", layer_idx, state_idx, inputs[..., -kernel:])
        return inputs

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **_kwargs: Any
    ) -> torch.Tensor:
        """A new state [b, ...] of a recurrence."""
        self.store("recurrent", layer_idx, state_idx, recurrent_states)
        return recurrent_states

    def load(self, kind: Kind, layer: int, number: int) -> torch.Tensor:
        """A state of all sequences, to be changed in place or not."""
        raise NotImplementedError

    def store(self, kind: Kind, layer: int, number: int, values: torch.Tensor) -> None:
        """A new state of all sequences."""
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
        """The new keys and values alone: the attention function knows the others."""
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002
        """Tokens before: rows differ in theirs, and positions are passed."""
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:  # noqa: ARG002
        """Where the new tokens begin, for the masks of a probe, which begins at 0."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:  # noqa: ARG002
        """Columns of such a mask, and which key is the first."""
        return query_length, 0


class RecordedStates(StateCache):
    """Learns what a model keeps, from a forward of one new sequence."""

    def __init__(self) -> None:
        super().__init__(fresh=True)
        self.states: list[StateTensor] = []
        self.devices: set[torch.device] = set()
        self.updates = 0
        """Times that keys and values were stored."""

    def store(self, kind: Kind, layer: int, number: int, values: torch.Tensor) -> None:
        self.devices.add(values.device)
        self.states.append(StateTensor(layer, kind, number, tuple(values.shape[1:]), values.dtype))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.updates += 1
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


class PooledStates(StateCache):
    """States of rows of a pool.

    What a layer loaded is written back when the next one begins: it may have changed it in place.
    """

    def __init__(self, rows: StateRows, fresh: bool) -> None:
        super().__init__(fresh)
        self._rows = rows
        self._index = {(s.kind, s.layer, s.number): index for index, s in enumerate(rows.pool.layout)}
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
        """Writes back what the last layer loaded."""
        for index, values in self._loaded.items():
            self._rows.write(index, values)
        self._loaded.clear()
