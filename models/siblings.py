"""Linear layers that are given the same input, one after another: their products can be computed as one."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import nn

from rollout.models.loan import Loan, unwrap

Siblings = tuple[nn.Linear, ...]

#: What is looked at is a forward of so many tokens; what flows does not matter.
_TOKENS = 4


def siblings(model: nn.Module) -> list[Siblings]:
    """Groups of linear layers, each in the order of calls, as one forward of the model's own shows them.

    Those of a group have inputs and dtype in common and are called once a forward. On a GPU none are looked for.
    """
    if unwrap(model).device.type != "cpu":
        return []
    calls: list[tuple[nn.Linear, torch.Tensor]] = []

    def saw(layer: nn.Module, given: tuple[object, ...]) -> None:
        assert isinstance(layer, nn.Linear)
        if given and isinstance(given[0], torch.Tensor):
            calls.append((layer, given[0]))  # held, so that no other tensor takes its place in memory

    with ExitStack() as stack:
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                stack.callback(layer.register_forward_pre_hook(saw).remove)
        with Loan(model)():
            ids = torch.arange(_TOKENS, device=unwrap(model).device)[None]
            model(input_ids=ids, use_cache=False)
    groups: list[list[nn.Linear]] = []
    before: torch.Tensor | None = None
    for layer, given in calls:
        if given is before and layer.weight.dtype == groups[-1][0].weight.dtype:
            groups[-1].append(layer)
        else:
            groups.append([layer])
        before = given
    called = [id(layer) for layer, _ in calls]
    once = {layer for layer in called if called.count(layer) == 1}
    return [tuple(group) for group in groups if len(group) > 1 and all(id(layer) in once for layer in group)]
