"""Norms, rotary embeddings, and on a CPU attention and MLP modules, in place of transformers' many small operations.

Nothing is known by its name alone: a norm and a family's rotary function are replaced where they give the kernel's
numbers on a trial, an attention or MLP module where its code is known, and all stay what they are elsewhere.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import nn

from rollout.models.patches.llama_blocks import shorter_attention, shorter_mlp
from rollout.models.patches.patching import patched
from rollout.models.patches.pointwise_cpu import NormFactors, Pointwise, pointwise

_ROTARY = "apply_rotary_pos_emb"
_EPSILONS = ("variance_epsilon", "eps")
#: Share of the numbers of a trial in which both round alike; where they do not, they are neighbours.
_ALIKE = 0.98

_on_loan: ContextVar[bool] = ContextVar("rollout_fused_parts", default=False)


class FusedModules:
    """Replacements of parts of a module, used while `applied`.

    On a CPU they hold copies of the norms' weights, on a GPU the memory of those, so this is made anew after weights
    change, or on a GPU after they move.

    Args:
        model: the module. Where it lies on several devices, nothing of it is replaced.
    """

    def __init__(self, model: nn.Module) -> None:
        self._forwards: list[tuple[nn.Module, Callable[..., Any]]] = []
        self._rotary: list[tuple[ModuleType, Callable[..., Any], Callable[..., Any]]] = []
        devices = {weight.device for weight in model.parameters()} - {torch.device("meta")}
        if len(devices) != 1:
            return
        device = devices.pop()
        kernel = _kernel(device)
        if kernel is None:
            return
        for module in model.modules():
            fused = _norm(module, kernel, device)
            if fused is not None:
                self._forwards.append((module, fused))
        for name in {type(module).__module__ for module in model.modules()}:
            source = sys.modules.get(name)
            own = getattr(source, _ROTARY, None)
            if isinstance(own, _Rotary):  # inside a block of another thread
                own = own.own
            if source is not None and own is not None and _rotates_halves(own, kernel, device):
                self._rotary.append((source, own, _Rotary(own, kernel)))
        if not isinstance(kernel, Pointwise):
            return
        rotating = {source.__name__ for source, _, _ in self._rotary}
        for module in model.modules():
            rotates = type(module).__module__ in rotating
            shorter = (shorter_attention(module, kernel) if rotates else None) or shorter_mlp(module)
            if shorter is not None:
                self._forwards.append((module, shorter))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """They are in place of the model's own inside this block, for this thread."""
        token = _on_loan.set(True)
        try:
            with patched(self._forwards):
                for source, _, function in self._rotary:
                    setattr(source, _ROTARY, function)
                yield
        finally:
            for source, own, _ in self._rotary:
                setattr(source, _ROTARY, own)
            _on_loan.reset(token)


class Kernel(Protocol):
    """What `rollout.models.patches.pointwise_cpu.Pointwise` computes; says what each is."""

    @property
    def dtypes(self) -> frozenset[torch.dtype]: ...

    def norm_factors(self, weight: torch.Tensor, dtype: torch.dtype, plus: float = 0.0) -> NormFactors: ...

    def rms_norm(self, x: torch.Tensor, factors: NormFactors, eps: float, late: bool) -> torch.Tensor: ...

    def rotate(
        self, query: torch.Tensor, key: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


def _kernel(device: torch.device) -> Kernel | None:
    """For tensors on a device; None where there is none."""
    if device.type == "cpu":
        return pointwise()
    # Comes with torch's builds for GPUs, and with no other.
    if device.type != "cuda" or find_spec("triton") is None:
        return None
    from rollout.models.patches.pointwise_triton import triton_pointwise

    return triton_pointwise(device)


# -- norms -----------------------------------------------------------------------------------------------


def _norm(module: nn.Module, kernel: Kernel, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """What computes the root mean square norm that ``module`` is; None where it is none that the kernel has."""
    weight, eps = _weight(module, device), next((getattr(module, n) for n in _EPSILONS if hasattr(module, n)), None)
    if weight is None or not isinstance(eps, float) or weight.dtype not in kernel.dtypes:
        return None
    trial = _trial(3, len(weight)).mul(torch.tensor([[1.0], [1e-3], [30.0]])).to(device, weight.dtype)
    with torch.no_grad():
        wanted = module.forward(trial)  # without its hooks: they stay, and are for the model's own calls
    for plus in (0.0, 1.0):  # some families keep what the factor is above 1
        for late in (False, True):
            factors = kernel.norm_factors(weight, weight.dtype, plus)
            if _same(kernel.rms_norm(trial, factors, eps, late), wanted):
                return _fused_norm(module.forward, kernel, factors, eps, late)
    return None


def _weight(module: nn.Module, device: torch.device) -> torch.Tensor | None:
    """The weight of what may be a norm: a module with one vector and nothing else, that nobody has patched."""
    own = [*module.named_parameters(), *module.named_buffers()]
    if len(own) != 1 or own[0][0] != "weight" or "forward" in vars(module):
        return None
    weight = own[0][1]
    plain = type(weight.data) is torch.Tensor and weight.dim() == 1 and weight.device == device
    # Others take a gate, or what to add, besides.
    takes_one = len(inspect.signature(module.forward).parameters) == 1
    return weight if plain and takes_one and "RMSNorm" in type(module).__name__ else None


def _fused_norm(
    own: Callable[..., torch.Tensor], kernel: Kernel, factors: NormFactors, eps: float, late: bool
) -> Callable[..., torch.Tensor]:
    width = len(factors.values)

    def forward(x: torch.Tensor) -> torch.Tensor:
        if x.dtype != factors.dtype or x.shape[-1] != width:
            return own(x)
        return kernel.rms_norm(x, factors, eps, late)

    return forward


# -- rotary embeddings -----------------------------------------------------------------------------------


def _rotates_halves(own: Callable[..., Any], kernel: Kernel, device: torch.device) -> bool:
    """Whether a family's function rotates the halves of heads, as the kernel does."""
    if list(inspect.signature(own).parameters)[:4] != ["q", "k", "cos", "sin"]:
        return False
    tokens, dim = 3, 8
    for dtype in kernel.dtypes:
        query, key = (_trial(heads * tokens, dim).view(1, heads, tokens, dim).to(device, dtype) for heads in (4, 2))
        angles = [_trial(tokens, dim).mul(step).cos().view(1, tokens, dim).to(device, dtype) for step in (2.0, 3.0)]
        try:
            wanted = own(query, key, *angles)
        except RuntimeError:  # it takes angles of another shape
            return False
        got = _rotated(kernel, query, key, *angles)
        if not all(torch.equal(ours, theirs) for ours, theirs in zip(got, wanted, strict=True)):
            return False
    return True


class _Rotary:
    """Takes the place of a family's function: computes what the kernel can, for threads in a block, by the kernel."""

    def __init__(self, own: Callable[..., Any], kernel: Kernel) -> None:
        self.own, self._kernel = own, kernel

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *others: Any, **named: Any
    ) -> Any:
        served = (
            _on_loan.get()
            and q.dtype == k.dtype == cos.dtype == sin.dtype
            and q.dtype in self._kernel.dtypes
            and q.dim() == k.dim() == 4
            and cos.shape == sin.shape == (q.shape[0], *q.shape[2:]) == (k.shape[0], *k.shape[2:])
            and q.stride(3) == k.stride(3) == 1
            and not (others or named)
        )
        if not served:
            return self.own(q, k, cos, sin, *others, **named)
        return _rotated(self._kernel, q, k, cos, sin)


def _rotated(
    kernel: Kernel, query: torch.Tensor, key: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Heads [b, heads, t, dim] by angles [b, t, dim]; like the others, but laid out token by token."""
    given = (x.transpose(1, 2).flatten(0, 1) for x in (query, key))
    angles = (x.flatten(0, 1).contiguous() for x in (cosines, sines))
    rotated = kernel.rotate(*given, *angles)
    return tuple(x.unflatten(0, (query.shape[0], query.shape[2])).transpose(1, 2) for x in rotated)


# -- trials ----------------------------------------------------------------------------------------------


def _trial(rows: int, width: int) -> torch.Tensor:
    """[rows, width] numbers that do not repeat; no generator of the process is used."""
    return torch.arange(rows * width).mul(0.7368).sin().mul(2.0).view(rows, width)


def _same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether two results are one up to rounding."""
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return False
    if ours.dtype == torch.float32:
        return torch.allclose(ours, theirs, rtol=2e-6, atol=0.0)
    near = torch.allclose(ours.float(), theirs.float(), rtol=2**-7, atol=0.0)
    return near and float((ours == theirs).float().mean()) >= _ALIKE
