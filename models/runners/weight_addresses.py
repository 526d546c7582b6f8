"""Where a model's weights lie, for graphs that read them at the addresses of their capture."""

from __future__ import annotations

from typing import Any

from torch import nn


class WeightAddresses:
    """Addresses of a model's parameters and buffers."""

    def __init__(self, model: nn.Module) -> None:
        self._holders: list[tuple[dict[str, Any], str]] = [
            (holder, name)
            for module in model.modules()
            for holder in (module._parameters, module._buffers)
            for name in holder
        ]
        self._addresses = self._current()

    @property
    def moved(self) -> bool:
        """Whether any lies elsewhere than at first."""
        return self._current() != self._addresses

    def _current(self) -> list[int]:
        tensors = (holder.get(name) for holder, name in self._holders)
        return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
