"""Half-precision linear layers on CPUs that have no instructions for them: computed from float32 copies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from rollout.models.precision import cpu_multiplies


class WideLinears:
    """Float32 copies of a module's half-precision linear layers, used in place of them while `in_place`.

    A product is computed in float32 and rounded to the layer's dtype, which is what hardware with bf16
    instructions does too. Copies are taken when this is made, so it is made anew after weights change; they
    take 4 bytes a parameter and go with it. Nothing is copied on a GPU, for float32 models, or where the
    CPU multiplies the dtype itself.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers: list[tuple[nn.Linear, Callable[[torch.Tensor], torch.Tensor]]] = [
            (layer, _wide(layer)) for layer in model.modules() if isinstance(layer, nn.Linear) and _is_slow(layer)
        ]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The layers compute from their copies inside this block."""
        try:
            for layer, forward in self._layers:
                layer.forward = forward  # type: ignore[method-assign, assignment]
            yield
        finally:
            for layer, _ in self._layers:
                vars(layer).pop("forward", None)


def _is_slow(layer: nn.Linear) -> bool:
    """Whether ``layer`` is a plain linear, which nobody has patched, in a dtype that its CPU cannot multiply."""
    return (
        type(layer) is nn.Linear
        and "forward" not in vars(layer)
        and layer.weight.device.type == "cpu"
        and not cpu_multiplies(layer.weight.dtype)
    )


def _wide(layer: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    weight = layer.weight.detach().float()
    bias = None if layer.bias is None else layer.bias.detach().float()

    def forward(x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.float(), weight, bias).to(x.dtype)

    return forward
