"""Fuse norms and rotary embeddings, and on a CPU attention and MLP modules, in place of many small operations.

Names alone do not decide: a norm or a family's rotary function is replaced only if it matches the kernel on a test
input, an attention or MLP module only if its bytecode is known. Everything else stays as it is.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

from rollout.models.patches.llama_blocks import fast_attention, fast_mlp
from rollout.models.patches.patching import patched
from rollout.models.patches.pointwise import NormFactors, PointwiseKernel
from rollout.models.patches.pointwise_cpu import Pointwise, pointwise

_ROTARY = "apply_rotary_pos_emb"
_EPSILONS = ("variance_epsilon", "eps")
#: Share of a test's numbers that must be equal in half precision; the others may differ by rounding.
_MIN_EQUAL = 0.98

_applied: ContextVar[bool] = ContextVar("rollout_fused_modules", default=False)


class _RotaryPatch(NamedTuple):
    """A rotary function of a family's Python module and its replacement."""

    source: ModuleType
    own: Callable[..., Any]
    fused: Callable[..., Any]


class FusedModules:
    """Faster forwards for parts of a module, in force inside `applied`.

    On a CPU they hold copies of the norms' weights, on a GPU references to them. So create a new instance after weights
    change on a CPU or move on a GPU.

    Args:
        model: the module; nothing is replaced if it spans several devices.
    """

    def __init__(self, model: nn.Module) -> None:
        self._forwards: list[tuple[nn.Module, Callable[..., Any]]] = []
        self._rotary: list[_RotaryPatch] = []
        devices = {weight.device for weight in model.parameters()} - {torch.device("meta")}
        if len(devices) != 1:
            return
        device = devices.pop()
        kernel = _kernel(device)
        if kernel is None:
            return
        for module in model.modules():
            norm = _fused_norm(module, kernel, device)
            if norm is not None:
                self._forwards.append((module, norm))
        for name in {type(module).__module__ for module in model.modules()}:
            source = sys.modules.get(name)
            own = getattr(source, _ROTARY, None)
            if isinstance(own, _FusedRotary):  # another thread is inside `applied`
                own = own.own
            if source is not None and own is not None and _rotates_halves(own, kernel, device):
                self._rotary.append(_RotaryPatch(source=source, own=own, fused=_FusedRotary(own, kernel)))
        if isinstance(kernel, Pointwise):
            self._add_llama_blocks(model, kernel)

    def _add_llama_blocks(self, model: nn.Module, kernel: Pointwise) -> None:
        """Add faster forwards of attention and MLP modules."""
        rotating = {patch.source.__name__ for patch in self._rotary}
        for module in model.modules():
            attention = fast_attention(module, kernel) if type(module).__module__ in rotating else None
            forward = attention or fast_mlp(module)
            if forward is not None:
                self._forwards.append((module, forward))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Replace the model's forwards and rotary functions inside the block, rotary functions for this thread only."""
        token = _applied.set(True)
        try:
            with patched(self._forwards):
                for patch in self._rotary:
                    setattr(patch.source, _ROTARY, patch.fused)
                yield
        finally:
            for patch in self._rotary:
                setattr(patch.source, _ROTARY, patch.own)
            _applied.reset(token)


def _kernel(device: torch.device) -> PointwiseKernel | None:
    """Return the kernel for tensors on a device, None if there is none."""
    if device.type == "cpu":
        return pointwise()
    # Only torch's GPU builds ship Triton.
    if device.type != "cuda" or find_spec("triton") is None:
        return None
    from rollout.models.patches.pointwise_triton import triton_pointwise

    return triton_pointwise(device)


# -- norms -----------------------------------------------------------------------------------------------


def _fused_norm(module: nn.Module, kernel: PointwiseKernel, device: torch.device) -> Callable[..., torch.Tensor] | None:
    """Return a fused forward for a root mean square norm, None if the kernel does not match the module."""
    weight = _norm_weight(module, device)
    eps = next((getattr(module, name) for name in _EPSILONS if hasattr(module, name)), None)
    if weight is None or not isinstance(eps, float) or weight.dtype not in kernel.dtypes:
        return None
    x = _test_input(3, len(weight)).mul(torch.tensor([[1.0], [1e-3], [30.0]])).to(device, weight.dtype)
    with torch.no_grad():
        expected = module.forward(x)  # not module(x), so that the caller's hooks do not run
    for plus in (0.0, 1.0):  # some families store the factor minus 1
        for late in (False, True):
            factors = kernel.norm_factors(weight, weight.dtype, plus)
            if _equal_up_to_rounding(kernel.rms_norm(x, factors, eps, late), expected):
                return _norm_forward(own=module.forward, kernel=kernel, factors=factors, eps=eps, late=late)
    return None


def _norm_weight(module: nn.Module, device: torch.device) -> torch.Tensor | None:
    """Return the weight of a possible norm: an unpatched module whose only tensor is one vector."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    if len(tensors) != 1 or tensors[0][0] != "weight" or "forward" in vars(module):
        return None
    weight = tensors[0][1]
    plain = type(weight.data) is torch.Tensor and weight.dim() == 1 and weight.device == device
    # Other norms also take a gate or a residual.
    takes_one = len(inspect.signature(module.forward).parameters) == 1
    return weight if plain and takes_one and "RMSNorm" in type(module).__name__ else None


def _norm_forward(
    own: Callable[..., torch.Tensor], kernel: PointwiseKernel, factors: NormFactors, eps: float, late: bool
) -> Callable[..., torch.Tensor]:
    """Return a forward that calls the kernel, or ``own`` for rows of another dtype or width."""
    width = len(factors.values)

    def forward(x: torch.Tensor) -> torch.Tensor:
        if x.dtype != factors.dtype or x.shape[-1] != width:
            return own(x)
        return kernel.rms_norm(x, factors, eps, late)

    return forward


# -- rotary embeddings -----------------------------------------------------------------------------------


def _rotates_halves(own: Callable[..., Any], kernel: PointwiseKernel, device: torch.device) -> bool:
    """Return whether a family's rotary function rotates the halves of heads, as the kernel does."""
    if list(inspect.signature(own).parameters)[:4] != ["q", "k", "cos", "sin"]:
        return False
    tokens, dim = 3, 8
    for dtype in kernel.dtypes:
        query, key = (
            _test_input(heads * tokens, dim).view(1, heads, tokens, dim).to(device, dtype) for heads in (4, 2)
        )
        angles = [
            _test_input(tokens, dim).mul(step).cos().view(1, tokens, dim).to(device, dtype) for step in (2.0, 3.0)
        ]
        try:
            expected = own(query, key, *angles)
        except RuntimeError:  # the function expects angles of another shape
            return False
        found = _rotated(kernel, query, key, *angles)
        if not all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True)):
            return False
    return True


class _FusedRotary:
    """Replaces a family's rotary function: calls the kernel in threads inside `FusedModules.applied`."""

    def __init__(self, own: Callable[..., Any], kernel: PointwiseKernel) -> None:
        self.own = own
        self._kernel = kernel

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *others: Any, **named: Any
    ) -> Any:
        supported = (
            _applied.get()
            and q.dtype == k.dtype == cos.dtype == sin.dtype
            and q.dtype in self._kernel.dtypes
            and q.dim() == k.dim() == 4
            and cos.shape == sin.shape == (q.shape[0], *q.shape[2:]) == (k.shape[0], *k.shape[2:])
            and q.stride(3) == k.stride(3) == 1
            and not (others or named)
        )
        if not supported:
            return self.own(q, k, cos, sin, *others, **named)
        return _rotated(self._kernel, q, k, cos, sin)


def _rotated(
    kernel: PointwiseKernel, query: torch.Tensor, key: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Rotate heads [b, heads, t, dim] by angles [b, t, dim]; the result is laid out token by token."""
    by_token = (x.transpose(1, 2).flatten(0, 1) for x in (query, key))
    angles = (x.flatten(0, 1).contiguous() for x in (cosines, sines))
    rotated = kernel.rotate(*by_token, *angles)
    return tuple(x.unflatten(0, (query.shape[0], query.shape[2])).transpose(1, 2) for x in rotated)


# -- comparison with the model's own results -----------------------------------------------------------


def _test_input(rows: int, width: int) -> torch.Tensor:
    """Return [rows, width] distinct numbers without using the process's random generators."""
    return torch.arange(rows * width).mul(0.7368).sin().mul(2.0).view(rows, width)


def _equal_up_to_rounding(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Return whether two results are equal up to rounding."""
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return False
    if ours.dtype == torch.float32:
        return torch.allclose(ours, theirs, rtol=2e-6, atol=0.0)
    near = torch.allclose(ours.float(), theirs.float(), rtol=2**-7, atol=0.0)
    return near and float((ours == theirs).float().mean()) >= _MIN_EQUAL
