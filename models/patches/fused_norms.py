"""Norms whose forward a kernel computes, if it matches the norm's own on a test input."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from copy import copy
from typing import NamedTuple

import torch
from torch import nn

from rollout.models.arrays import version
from rollout.models.patches.pointwise import PointwiseKernel

_EPSILONS = ("variance_epsilon", "eps")
#: Share of a test's numbers that must be equal in half precision; the others may differ by rounding.
_MIN_EQUAL = 0.98


class NormKind(NamedTuple):
    """What decides how a possible norm computes; modules of one kind differ only in their weights."""

    own: type[nn.Module]
    eps: float
    width: int
    dtype: torch.dtype

    @classmethod
    def of(cls, module: nn.Module, device: torch.device) -> NormKind | None:
        """Return the kind of a module, None if it is no norm or may change its weight by itself."""
        if "RMSNorm" not in type(module).__name__ or "forward" in vars(module) or module._forward_pre_hooks:
            return None
        tensors = [*module.named_parameters(), *module.named_buffers()]
        if len(tensors) != 1 or tensors[0][0] != "weight":
            return None
        weight = tensors[0][1]
        plain = type(weight.data) is torch.Tensor and weight.dim() == 1 and weight.device == device
        # Other norms also take a gate or a residual.
        takes_one = len(inspect.signature(module.forward).parameters) == 1
        eps = next((getattr(module, name) for name in _EPSILONS if hasattr(module, name)), None)
        if not plain or not takes_one or not isinstance(eps, float):
            return None
        return cls(own=type(module), eps=eps, width=len(weight), dtype=weight.dtype)


class NormForm(NamedTuple):
    """How a norm uses its weight."""

    plus: float
    """Constant to add: some families store the factor minus 1."""
    late: bool
    """See `PointwiseKernel.rms_norm`."""


def norm_form(module: nn.Module, kind: NormKind, kernel: PointwiseKernel, device: torch.device) -> NormForm | None:
    """Return how a norm uses its weight, None if the kernel does not match it on a test input."""
    if kind.dtype not in kernel.dtypes:
        return None
    x = probe_input(3, kind.width).mul(torch.tensor([[1.0], [1e-3], [30.0]])).to(device, kind.dtype)
    # Weights of their own: those of an untrained norm are all equal and do not show when it rounds.
    weight = probe_input(1, kind.width)[0].to(device, kind.dtype)
    norm = copy(module)
    vars(norm)["_parameters"] = {"weight": weight}
    with torch.no_grad():
        expected = norm.forward(x)  # not norm(x), so that the caller's hooks do not run
    for form in (NormForm(plus, late) for plus in (0.0, 1.0) for late in (False, True)):
        factors = kernel.norm_factors(weight, kind.dtype, form.plus)
        if equal_up_to_rounding(kernel.rms_norm(x, factors, kind.eps, form.late), expected):
            return form
    return None


class FusedNorm:
    """A forward of a norm that calls the kernel, or the norm's own forward for rows of another dtype or width."""

    def __init__(self, module: nn.Module, eps: float, kernel: PointwiseKernel, form: NormForm) -> None:
        self.module = module
        self._own: Callable[..., torch.Tensor] = module.forward
        self.eps = eps
        self._kernel = kernel
        self._form = form
        self._kept: _KeptNorm | None = None
        self.refresh()

    @property
    def late(self) -> bool:
        """See `PointwiseKernel.rms_norm`."""
        return self._form.late

    def refresh(self) -> None:
        """Read the norm's weight anew."""
        weight: torch.Tensor = self.module.weight  # type: ignore[assignment]
        self.factors = self._kernel.norm_factors(weight, weight.dtype, self._form.plus)
        """What the rows are multiplied by; another object after each refresh."""
        self._width = len(self.factors.values)

    def keep(self, x: torch.Tensor, normed: torch.Tensor) -> None:
        """Keep the normed rows of x for the next call, if that gets x as it is now."""
        if not x.is_inference():  # such tensors count no changes
            self._kept = _KeptNorm(x, version(x), normed)

    def drop_kept(self) -> None:
        """Drop rows that were normed ahead."""
        self._kept = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the normed rows of x [..., width]."""
        kept, self._kept = self._kept, None
        if kept is not None and kept.x is x and kept.version == version(x):
            return kept.normed
        if x.dtype != self.factors.dtype or x.shape[-1] != self._width:
            return self._own(x)
        return self._kernel.rms_norm(x, self.factors, self.eps, self.late)


class _KeptNorm(NamedTuple):
    """Rows that were normed ahead."""

    x: torch.Tensor
    version: int
    """Of x when it was normed; a hook may change x in place."""
    normed: torch.Tensor


def probe_input(rows: int, width: int) -> torch.Tensor:
    """Return [rows, width] distinct numbers without using the process's random generators."""
    return torch.arange(rows * width).mul(0.7368).sin().mul(2.0).view(rows, width)


def equal_up_to_rounding(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Return whether two results are equal up to rounding."""
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return False
    if ours.dtype == torch.float32:
        return torch.allclose(ours, theirs, rtol=2e-6, atol=0.0)
    near = torch.allclose(ours.float(), theirs.float(), rtol=2**-7, atol=0.0)
    return near and float((ours == theirs).float().mean()) >= _MIN_EQUAL
