"""Find linear layers that receive the same input in succession, so that their products can run as one."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from rollout.models.arrays import version
from rollout.models.module.inspect import output_device
from rollout.models.patches.patching import PatchedForward, patched

Product = Callable[[torch.Tensor], torch.Tensor]
LinearGroup = tuple[nn.Linear, ...]


@dataclass(frozen=True, slots=True)
class _Call:
    """One observed call of a linear layer."""

    layer: nn.Linear
    x: torch.Tensor
    """The input; held, so that no other tensor reuses its memory."""
    version: int

    def shares_input(self, other: _Call) -> bool:
        """Return whether both calls received the same unchanged tensor."""
        return self.x is other.x and self.version == other.version


@contextmanager
def shared_inputs(model: nn.Module, *, on_gpu: bool = False) -> Iterator[list[LinearGroup]]:
    """Observe the forward that runs inside the block, which may be another probe's.

    After the block the list has the groups of linear layers, each in call order. The layers of a group share input and
    dtype and are called once per forward; the values of the forward do not matter. On a GPU, finds no groups unless
    asked to.
    """
    groups: list[LinearGroup] = []
    if output_device(model).type != "cpu" and not on_gpu:
        yield groups
        return
    with _recorded_calls(model) as calls:
        yield groups
    groups += _grouped(calls)


class MergedProduct:
    """Computes the products of several layers at once, when the first of them is called.

    Args:
        products: returns the outputs of all layers for one input.
    """

    def __init__(self, products: Callable[[torch.Tensor], Sequence[torch.Tensor]]) -> None:
        self._products = products
        self.clear()

    def clear(self) -> None:
        """Drop the input and the parts of layers that were not called."""
        self._input: torch.Tensor | None = None
        self._version = 0
        self._parts: dict[int, torch.Tensor] = {}

    def part(self, index: int) -> Product:
        """Return the product of one layer."""

        def forward(x: torch.Tensor) -> torch.Tensor:
            # Each part is handed out once: the caller may change it in place.
            if x is not self._input or version(x) != self._version or index not in self._parts:
                self._parts = dict(enumerate(self._products(x)))
                self._input = x
                self._version = version(x)
            part = self._parts.pop(index)
            if not self._parts:
                self.clear()
            return part

        return forward


class LayerProducts:
    """Products that replace the forwards of linear layers inside `applied`.

    Args:
        products: layers, and what computes them.
    """

    def __init__(self, products: Iterable[tuple[nn.Linear, Product]]) -> None:
        self._forwards = [_WhileWeightStays(layer, product) for layer, product in products]
        self._patches = [PatchedForward.of(forward.layer, forward) for forward in self._forwards]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the products compute the layers inside the block, with the weights that the layers have now."""
        before = [forward.weight for forward in self._forwards]  # a callback inside a step may generate
        try:
            for forward in self._forwards:
                forward.weight = forward.parameters.get("weight")
            with patched(self._patches):
                yield
        finally:
            for forward, weight in zip(self._forwards, before, strict=True):
                forward.weight = weight


class _WhileWeightStays:
    """A forward that calls the layer's own forward instead of the product if the layer has another weight.

    PEFT parametrizes the layers of its ``target_parameters`` only while it calls them, so no product can know it then.
    """

    def __init__(self, layer: nn.Linear, product: Product) -> None:
        self.layer = layer
        self.parameters = layer._parameters
        self._product = product
        self.weight: torch.Tensor | None = None
        """What the product computes with; None outside of the block, so that a replaced weight can be freed."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.parameters.get("weight")
        if weight is None or weight is not self.weight:
            out: torch.Tensor = type(self.layer).forward(self.layer, x)
            return out
        return self._product(x)


@contextmanager
def _recorded_calls(model: nn.Module) -> Iterator[list[_Call]]:
    """Record this thread's calls of linear layers inside the block."""
    calls: list[_Call] = []
    thread = threading.get_ident()  # others may call the layers meanwhile

    def record(layer: nn.Module, inputs: tuple[object, ...]) -> None:
        assert isinstance(layer, nn.Linear)
        if threading.get_ident() == thread and inputs and isinstance(inputs[0], torch.Tensor):
            calls.append(_Call(layer=layer, x=inputs[0], version=version(inputs[0])))

    # Tensors of a caller's inference mode would not count changes in place.
    with torch.inference_mode(False), ExitStack() as stack:
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                stack.callback(layer.register_forward_pre_hook(record).remove)
        yield calls


def _grouped(calls: Sequence[_Call]) -> list[LinearGroup]:
    """Group successive calls with the same input."""
    groups: list[list[nn.Linear]] = []
    previous: _Call | None = None
    for call in calls:
        shared = previous is not None and call.shares_input(previous)
        if shared and call.layer.weight.dtype == groups[-1][0].weight.dtype:
            groups[-1].append(call.layer)
        else:
            groups.append([call.layer])
        previous = call
    counts = Counter(id(call.layer) for call in calls)
    return [tuple(group) for group in groups if len(group) > 1 and all(counts[id(layer)] == 1 for layer in group)]
