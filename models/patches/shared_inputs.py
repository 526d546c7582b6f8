"""Find linear layers that receive the same input in succession, so that their products can run as one."""

from __future__ import annotations

import threading
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn

from rollout.models.arrays import version
from rollout.models.module.borrow import BorrowedModule
from rollout.models.module.inspect import output_device, vocabulary_size

LinearGroup = tuple[nn.Linear, ...]

#: Tokens of the observed forward; their values do not matter.
_TOKENS = 4


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


def layers_with_shared_inputs(model: nn.Module) -> list[LinearGroup]:
    """Return groups of linear layers, each in call order, observed in one forward of the model.

    The layers of a group share input and dtype and are called once per forward. Returns no groups on a GPU.
    """
    if output_device(model).type != "cpu":
        return []
    calls = _calls_in_forward(model)
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


def _calls_in_forward(model: nn.Module) -> list[_Call]:
    """Return the calls of linear layers in one forward of the model."""
    calls: list[_Call] = []
    thread = threading.get_ident()  # others may call the layers meanwhile

    def record(layer: nn.Module, inputs: tuple[object, ...]) -> None:
        assert isinstance(layer, nn.Linear)
        if threading.get_ident() == thread and inputs and isinstance(inputs[0], torch.Tensor):
            calls.append(_Call(layer=layer, x=inputs[0], version=version(inputs[0])))

    # Tensors of a caller's inference mode would not count changes in place.
    with torch.inference_mode(False), BorrowedModule(model).borrow(), ExitStack() as stack:
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                stack.callback(layer.register_forward_pre_hook(record).remove)
        ids = torch.arange(_TOKENS, device=output_device(model))[None] % vocabulary_size(model)
        model(input_ids=ids, use_cache=False)
    return calls
