"""Fake devices: CPU tensors that report ``ipu:0`` or ``ipu:1`` as their device.

Operations run on torch's CPU operators. A call that mixes tensors of different devices fails as on two GPUs. Speed,
streams and memory are not simulated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import dispatch_model
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import PreTrainedModel

NEAR, FAR = torch.device("ipu", 0), torch.device("ipu", 1)
_CPU = torch.device("cpu")
#: Calls that copy tensors between devices.
_MOVES = {torch.Tensor.to, torch.Tensor.copy_}
#: Calls that accept indices on the CPU for tensors on any device.
_INDEXES = {torch.Tensor.__getitem__, torch.Tensor.__setitem__}


class PlacedTensor(torch.Tensor):
    """A CPU tensor and the fake device that it reports."""

    place: torch.device

    def __new__(cls, data: torch.Tensor, requires_grad: bool = False) -> Any:
        """Return ``data`` unchanged, as accelerate expects when it makes a parameter of a moved tensor."""
        return data

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return _call(func, args, kwargs or {})


class Devices(TorchFunctionMode):
    """Make `NEAR` and `FAR` usable within the block."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return _call(func, args, kwargs or {})


def spread(model: PreTrainedModel) -> PreTrainedModel:
    """Let accelerate place the first half of the layers on `NEAR` and the rest on `FAR`."""
    base = model.base_model_prefix
    device_map = {}
    for name, module in model.base_model.named_children():
        if isinstance(module, nn.ModuleList):
            device_map |= {f"{base}.{name}.{i}": str(FAR if 2 * i >= len(module) else NEAR) for i in range(len(module))}
        else:
            device_map[f"{base}.{name}"] = str(FAR if "norm" in name else NEAR)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    device_map |= {name: str(NEAR if tied else FAR) for name, _ in model.named_children() if name != base}
    dispatch_model(model, device_map, str(NEAR), skip_keys=model._skip_keys_device_placement)
    return model


def _call(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if func == torch.Tensor.device.__get__:
        return _place(args[0])
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    places = {_place(tensor) for tensor in tensors if tensor.dim()} or {_place(tensor) for tensor in tensors}
    if func in _INDEXES and isinstance(args[0], torch.Tensor):
        places = {_place(args[0])} | (places - {_CPU})
    if func is torch.Tensor.cpu:
        return _plain(args[0]).cpu().clone()
    if func is torch.Tensor.numpy and places != {_CPU}:
        raise TypeError(f"can't convert {places} device type tensor to numpy")
    if func is torch._has_compatible_shallow_copy_type:  # asked when a module moves
        return len(places) == 1
    if len(places) > 1 and func not in _MOVES:
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {sorted(map(str, places))}.")
    if func == torch.Tensor.data.__set__:
        return func(args[0], _plain(args[1]))
    place = _place(args[0]) if func is torch.Tensor.copy_ else next(iter(places), _CPU)
    if func is torch.Tensor.to:
        place, own = _place(args[0]), _plain(args[0])
        arguments, kwargs, wanted = _without_device(args[1:], kwargs)
        out = own.to(*arguments, **kwargs)
        if wanted is None or wanted == place:
            return args[0] if out is own else _placed(out, place)
        return _placed(out.clone() if out is own else out, wanted)
    if kwargs.get("device") is not None:
        place = _normal(kwargs["device"])
        kwargs = {**kwargs, "device": place if place.type != NEAR.type else _CPU}
    out = func(*tree_map_only(torch.Tensor, _plain, args), **tree_map_only(torch.Tensor, _plain, kwargs))
    return tree_map_only(torch.Tensor, lambda tensor: _placed(tensor, place), out)


def _normal(device: Any) -> torch.device:
    device = torch.device(device)
    return torch.device(device.type, device.index or 0) if device.type == NEAR.type else device


def _without_device(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], torch.device | None]:
    """Return the arguments of ``Tensor.to`` with the CPU as device, and the requested device."""
    wanted = None
    kept: list[Any] = []
    for value in args:
        if isinstance(value, torch.Tensor):
            wanted = _place(value)
            value = _plain(value)
        elif isinstance(value, str | torch.device):
            wanted = _normal(value)
            value = _CPU
        kept.append(value)
    if kwargs.get("device") is not None:
        wanted = _normal(kwargs["device"])
        kwargs = {**kwargs, "device": _CPU}
    return tuple(kept), kwargs, wanted


def _place(tensor: torch.Tensor) -> torch.device:
    if isinstance(tensor, PlacedTensor):
        return tensor.place
    return tensor.device


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_subclass(torch.Tensor) if isinstance(tensor, PlacedTensor) else tensor


def _placed(tensor: torch.Tensor, place: torch.device) -> torch.Tensor:
    if place.type != NEAR.type:
        return tensor
    placed = tensor.as_subclass(PlacedTensor)
    placed.place = place
    return placed
