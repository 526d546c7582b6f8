"""Linear layers that are given the same input, one after another: their products can be computed as one."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack

import torch
from torch import nn

from rollout.models.module.borrow import BorrowedModule
from rollout.models.module.inspect import output_device

LinearGroup = tuple[nn.Linear, ...]

#: What is looked at is a forward of so many tokens; what flows does not matter.
_TOKENS = 4


def layers_with_shared_inputs(model: nn.Module) -> list[LinearGroup]:
    """Groups of linear layers, each in the order of calls, as one forward of the model's own shows them.

    Those of a group have inputs and dtype in common and are called once a forward. On a GPU none are looked for.
    """
    if output_device(model).type != "cpu":
        return []
    calls: list[tuple[nn.Linear, torch.Tensor, int]] = []

    def saw(layer: nn.Module, given: tuple[object, ...]) -> None:
        assert isinstance(layer, nn.Linear)
        if given and isinstance(given[0], torch.Tensor):
            # Held, so that no other tensor takes its place in memory.
            calls.append((layer, given[0], version(given[0])))

    with ExitStack() as stack:
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                stack.callback(layer.register_forward_pre_hook(saw).remove)
        # Also where the caller's is an inference mode, since its tensors do not tell changes in place.
        with torch.inference_mode(False), BorrowedModule(model).borrow():
            ids = torch.arange(_TOKENS, device=output_device(model))[None]
            model(input_ids=ids, use_cache=False)
    groups: list[list[nn.Linear]] = []
    before: tuple[torch.Tensor, int] | None = None
    for layer, given, changes in calls:
        same = before is not None and given is before[0] and changes == before[1]
        if same and layer.weight.dtype == groups[-1][0].weight.dtype:
            groups[-1].append(layer)
        else:
            groups.append([layer])
        before = given, changes
    called = Counter(id(layer) for layer, _, _ in calls)
    return [tuple(group) for group in groups if len(group) > 1 and all(called[id(layer)] == 1 for layer in group)]


def version(x: torch.Tensor) -> int:
    """Changes in place to a tensor until now. Those of inference mode do not count them: always 0."""
    return 0 if x.is_inference() else x._version
