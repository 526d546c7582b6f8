"""Samples of a module's parameters and buffers, to notice that weights have changed, whoever changed them and however.

Neither ``data_ptr`` nor ``_version`` tells: fused optimizers, writes to ``p.data`` and PEFT's merges leave both as they
were. So some pieces of every tensor are compared, bit by bit, with what they were. A parameter that was written in
place counts as changed even if its pieces are the same, since ``weight[row] = ...`` changes few elements; made through
``p.data``, such a change of a large tensor may be missed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from rollout.models.arrays import version

#: Pieces of a tensor, spread evenly over it, and the bytes of each: a cache line, which costs as much as one element.
#: A fused AdamW step at a learning rate of 1e-6 changes all float32 weights of SmolLM2, but only 0.2 % of the bfloat16
#: ones of a matrix: 1 matrix of 9 then seems unchanged, of 210 matrices none.
_PIECES = 64
_PIECE_BYTES = 64
#: Tensors of up to this many elements, such as the factors of a LoRA, have fewer pieces.
_SMALL = 1 << 16
_PIECES_OF_SMALL = 16
#: Tensors of up to this many elements are compared whole.
_WHOLE = 1024
_PLAIN = (torch.Tensor, nn.Parameter, nn.Buffer)

Name = tuple[int, str]
"""A parameter or buffer: the id of the module that owns it, and its name there."""
_Place = tuple[int, torch.Size, tuple[int, ...], torch.dtype]
_Form = tuple[Name, torch.Size, tuple[int, ...], torch.dtype, torch.device]


@dataclass(frozen=True, slots=True)
class SampledChange:
    """What has changed between two looks at the tensors of a module."""

    values: frozenset[Name] = frozenset()
    """Those with other values. With a parameter that is trained, all that are trained count, since a step changes them
    together; with one that is not, all of those, since moving averages and merges do so too."""
    moved: bool = False
    """Whether any is stored elsewhere."""
    reformatted: bool = False
    """Whether there are others, or any has another shape, dtype or device; values were then not compared."""


class _Tensor(NamedTuple):
    """One plain tensor of a parameter or buffer."""

    name: Name
    values: torch.Tensor

    @property
    def form(self) -> _Form:
        values = self.values
        return self.name, values.shape, values.stride(), values.dtype, values.device


class WeightSamples:
    """Compares the parameters and buffers of a module with what they were at the last comparison.

    Args:
        model: the module; make new samples once it has other submodules, parameters or buffers.
    """

    def __init__(self, model: nn.Module) -> None:
        self._slots: list[tuple[Name, dict[str, Any], str]] = [
            ((id(module), name), held, name)
            for module in model.modules()
            for held in (module._parameters, module._buffers)
            for name in held
        ]
        self._samples: list[torch.Tensor] = []
        self._writes: list[int] = []
        self._forms: list[_Form] = []
        self._read(self._tensors())

    @property
    def names(self) -> frozenset[Name]:
        """All parameters and buffers."""
        return frozenset(name for name, _, _ in self._slots)

    def compare(self) -> SampledChange:
        """Return what has changed since the last comparison."""
        tensors = self._tensors()
        if _places(tensors) == self._places:
            before, writes = self._samples, self._writes
            self._samples, self._writes = self._sampled(tensors), _writes(tensors)
            return SampledChange(values=self._with_others(self._differing(before) | self._written(tensors, writes)))
        samples, forms = self._samples_by_name(), self._forms
        self._read(tensors)
        if forms != self._forms:
            return SampledChange(moved=True, reformatted=True)
        now = self._samples_by_name()
        values = {name for name, sample in samples.items() if not torch.equal(sample, now[name])}
        return SampledChange(values=self._with_others(values), moved=True)

    def _tensors(self) -> list[_Tensor]:
        """Return the plain tensors of all parameters and buffers that have values."""
        tensors = []
        for name, held, key in self._slots:
            tensor: torch.Tensor | None = held.get(key)
            if tensor is None:
                continue
            if type(tensor) in _PLAIN:  # nearly all
                if _has_values(tensor):
                    tensors.append(_Tensor(name, tensor))
            else:
                tensors += [_Tensor(name, plain) for plain in _plain_parts(tensor)]
        return tensors

    def _read(self, tensors: list[_Tensor]) -> None:
        """Choose the pieces of tensors and sample them."""
        self._places = _places(tensors)
        self._writes = _writes(tensors)
        self._forms = [tensor.form for tensor in tensors]
        self._pieces = [_pieces(tensor.values) for tensor in tensors]
        groups: dict[tuple[torch.device, torch.dtype, int], list[int]] = {}
        seen = set()
        for index, (tensor, place, (size, _)) in enumerate(zip(tensors, self._places, self._pieces, strict=True)):
            if place not in seen:  # tied weights are sampled once
                groups.setdefault((tensor.values.device, tensor.values.dtype, size[1]), []).append(index)
            seen.add(place)
        self._groups = list(groups.values())
        """Indices of tensors that are sampled together."""
        self._names: dict[_Place, list[Name]] = {}
        for tensor, place in zip(tensors, self._places, strict=True):
            self._names.setdefault(place, []).append(tensor.name)
        self._samples = self._sampled(tensors)

    def _sampled(self, tensors: list[_Tensor]) -> list[torch.Tensor]:
        """Return the pieces of the tensors of each group as [pieces, bytes]."""
        pieces, samples = self._pieces, []
        with torch.no_grad():
            for group in self._groups:
                values = _numbers([tensors[index].values for index in group])
                parts = [tensor.as_strided(*pieces[index]) for tensor, index in zip(values, group, strict=True)]
                samples.append(torch.cat(parts).view(torch.uint8))
        return samples

    def _differing(self, before: list[torch.Tensor]) -> set[Name]:
        """Return the parameters and buffers whose samples are not those of ``before``."""
        differing: set[Name] = set()
        for group, old, new in zip(self._groups, before, self._samples, strict=True):
            if torch.equal(_words(old), _words(new)):
                continue
            changed = (old != new).any(dim=1).cpu().numpy()
            starts = np.cumsum([0, *(self._pieces[index][0][0] for index in group[:-1])])
            for index in np.array(group)[np.logical_or.reduceat(changed, starts)].tolist():
                differing.update(self._names[self._places[index]])
        return differing

    def _samples_by_name(self) -> dict[Name, torch.Tensor]:
        """Return the sampled pieces of each parameter and buffer."""
        samples: dict[Name, torch.Tensor] = {}
        for group, sample in zip(self._groups, self._samples, strict=True):
            for index, part in zip(group, sample.split([self._pieces[index][0][0] for index in group]), strict=True):
                samples.update(dict.fromkeys(self._names[self._places[index]], part))
        return samples

    def _written(self, tensors: list[_Tensor], before: list[int]) -> set[Name]:
        """Return the parameters whose counts of writes are not those of ``before``: buffers are written for nothing."""
        if before == self._writes:
            return set()
        return {
            tensor.name
            for tensor, old, new in zip(tensors, before, self._writes, strict=True)
            if old != new and isinstance(tensor.values, nn.Parameter)
        }

    def _with_others(self, values: set[Name]) -> frozenset[Name]:
        """Return the names, and with a parameter all others that are trained as well, or not trained either."""
        if not values:
            return frozenset()
        parameters = {
            name: parameter.requires_grad
            for name, held, key in self._slots
            if isinstance(parameter := held.get(key), nn.Parameter)
        }
        kinds = {parameters[name] for name in values if name in parameters}
        return frozenset(values | {name for name, trained in parameters.items() if trained in kinds})


def _places(tensors: list[_Tensor]) -> list[_Place]:
    """Return where tensors are stored, and how."""
    return [(values.data_ptr(), values.shape, values.stride(), values.dtype) for _, values in tensors]


def _writes(tensors: list[_Tensor]) -> list[int]:
    """Return how often each tensor was written in place, as far as torch counts it."""
    return [version(values) for _, values in tensors]


def _plain_parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the plain tensors that a tensor of another class is made of, e.g. a DTensor's local one."""
    wrapper: Any = tensor
    if type(tensor) in _PLAIN:
        if _has_values(tensor):
            yield tensor
    elif is_traceable_wrapper_subclass(wrapper):
        for name in wrapper.__tensor_flatten__()[0]:
            part = getattr(wrapper, name)
            if isinstance(part, torch.Tensor):  # a DTensor also names its mesh
                yield from _plain_parts(part)
    elif type(tensor.data) is torch.Tensor:
        yield from _plain_parts(tensor.data)


def _has_values(tensor: torch.Tensor) -> bool:
    """Return whether a plain tensor has elements in memory."""
    return tensor.numel() > 0 and not tensor.is_meta and tensor.layout is torch.strided


def _pieces(tensor: torch.Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return size and strides of the sampled elements, as pieces of the memory that the tensor spans."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if span <= _WHOLE:
        return (span, 1), (1, 1)
    width = max(1, _PIECE_BYTES // tensor.element_size())
    count = _PIECES if span > _SMALL else _PIECES_OF_SMALL
    # An odd distance meets all columns of a matrix; an even one may meet the same ones in every row.
    distance = ((span - width) // (count - 1) - 1) | 1
    return (count, width), (distance, 1)


def _numbers(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return tensors of one dtype in a dtype that torch can concatenate: 8-bit floats are none."""
    first = tensors[0]
    if first.element_size() > 1 or first.dtype == torch.uint8:
        return tensors
    return [tensor.view(torch.uint8) for tensor in tensors]


def _words(sample: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a whole sample as longer numbers if there are enough: those are compared faster."""
    return sample.view(-1).view(torch.int64) if sample.numel() % 8 == 0 else sample
