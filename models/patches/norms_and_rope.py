"""Fuse norms and rotary embeddings, and blocks around them, in place of many small operations.

Names alone do not decide: a norm or a family's rotary function is replaced only if it matches the kernel on a test
input, an attention or MLP module only if its bytecode is known. Everything else stays as it is.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from copy import copy
from importlib.util import find_spec
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

from rollout.models.module.shared_attribute import replaced
from rollout.models.patches.llama_blocks import fast_attention, fast_mlp
from rollout.models.patches.patching import patched
from rollout.models.patches.pointwise import BlockKernel, PointwiseKernel
from rollout.models.patches.pointwise_cpu import Pointwise, pointwise
from rollout.models.patches.residual_blocks import fused_layer, fused_mlp

_ROTARY = "apply_rotary_pos_emb"
_EPSILONS = ("variance_epsilon", "eps")
#: Share of a test's numbers that must be equal in half precision; the others may differ by rounding.
_MIN_EQUAL = 0.98

_rotary_kernels: ContextVar[Mapping[Callable[..., Any], PointwiseKernel]] = ContextVar(
    "rollout_rotary_kernels",
    default=MappingProxyType({}),
)
"""The kernel in place of each family's rotary function in this thread."""


class _RotaryPatch(NamedTuple):
    """A rotary function of a family's Python module, which a kernel replaces."""

    source: ModuleType
    own: Callable[..., Any]


class FusedModules:
    """Faster forwards for parts of a module, in force inside `applied`.

    On a CPU they hold copies of the norms' weights, on a GPU references to them: `refresh` reads them anew after
    weights change on a CPU or move on a GPU.

    Args:
        model: the module; nothing is replaced if it spans several devices.
    """

    def __init__(self, model: nn.Module) -> None:
        self._forwards: list[tuple[nn.Module, Callable[..., Any]]] = []
        self._norms: dict[nn.Module, FusedNorm] = {}
        self._rotary: list[_RotaryPatch] = []
        self._rotary_kernels: dict[Callable[..., Any], PointwiseKernel] = {}
        devices = {weight.device for weight in model.parameters()} - {torch.device("meta")}
        if len(devices) != 1:
            return
        device = devices.pop()
        kernel = _kernel(device)
        if kernel is None:
            return
        kinds: dict[_NormKind, _NormForm | None] = {}
        for module in model.modules():
            kind = _NormKind.of(module, device)
            if kind is None:
                continue
            if kind not in kinds:
                kinds[kind] = _norm_form(module, kind, kernel, device)
            form = kinds[kind]
            if form is not None:
                self._norms[module] = FusedNorm(module, kind.eps, kernel, form)
        self._forwards.extend(self._norms.items())
        for name in {type(module).__module__ for module in model.modules()}:
            source = sys.modules.get(name)
            own = getattr(source, _ROTARY, None)
            if isinstance(own, _FusedRotary):  # another thread is inside `applied`
                own = own.own
            if source is not None and own is not None and _rotates_halves(own, kernel, device):
                self._rotary.append(_RotaryPatch(source=source, own=own))
        self._rotary_kernels = {patch.own: kernel for patch in self._rotary}
        if isinstance(kernel, Pointwise):
            self._add_llama_blocks(model, kernel)
        else:
            self._add_residual_blocks(model, kernel)

    def norm(self, module: nn.Module) -> FusedNorm | None:
        """Return the forward that replaces a norm's, None if there is none."""
        return self._norms.get(module)

    def rotates(self, module: nn.Module) -> bool:
        """Return whether a kernel replaces the rotary function of a module's family."""
        return any(patch.source.__name__ == type(module).__module__ for patch in self._rotary)

    def refresh(self) -> None:
        """Read the norms' weights anew."""
        for norm in self._norms.values():
            norm.refresh()

    def _add_llama_blocks(self, model: nn.Module, kernel: Pointwise) -> None:
        """Add faster forwards of attention and MLP modules."""
        for module in model.modules():
            attention = fast_attention(module, kernel) if self.rotates(module) else None
            forward = attention or fast_mlp(module)
            if forward is not None:
                self._forwards.append((module, forward))

    def _add_residual_blocks(self, model: nn.Module, kernel: BlockKernel) -> None:
        """Add forwards of MLP modules and decoder layers with fewer launches."""
        for module in model.modules():
            before_mlp = getattr(module, "post_attention_layernorm", None)
            norm = self._norms.get(before_mlp) if isinstance(before_mlp, nn.Module) else None
            forward = fused_layer(module, norm, kernel) or fused_mlp(module, kernel)
            if forward is not None:
                self._forwards.append((module, forward))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Replace the model's forwards and rotary functions inside the block, for this thread only."""
        token = _rotary_kernels.set(self._rotary_kernels)
        try:
            with patched(self._forwards), ExitStack() as stack:
                for patch in self._rotary:
                    stack.enter_context(replaced(patch.source, _ROTARY, _FusedRotary))
                yield
        finally:
            _rotary_kernels.reset(token)


def _kernel(device: torch.device) -> Pointwise | BlockKernel | None:
    """Return the kernel for tensors on a device, None if there is none."""
    if device.type == "cpu":
        return pointwise()
    # Only torch's GPU builds ship Triton.
    if device.type != "cuda" or find_spec("triton") is None:
        return None
    from rollout.models.patches.pointwise_triton import triton_pointwise

    return triton_pointwise(device)


# -- norms -----------------------------------------------------------------------------------------------


class _NormKind(NamedTuple):
    """What decides how a possible norm computes; modules of one kind differ only in their weights."""

    own: type[nn.Module]
    eps: float
    width: int
    dtype: torch.dtype

    @classmethod
    def of(cls, module: nn.Module, device: torch.device) -> _NormKind | None:
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


class _NormForm(NamedTuple):
    """How a norm uses its weight."""

    plus: float
    """Constant to add: some families store the factor minus 1."""
    late: bool
    """See `PointwiseKernel.rms_norm`."""


def _norm_form(module: nn.Module, kind: _NormKind, kernel: PointwiseKernel, device: torch.device) -> _NormForm | None:
    """Return how a norm uses its weight, None if the kernel does not match it on a test input."""
    if kind.dtype not in kernel.dtypes:
        return None
    x = _test_input(3, kind.width).mul(torch.tensor([[1.0], [1e-3], [30.0]])).to(device, kind.dtype)
    # Weights of their own: those of an untrained norm are all equal and do not show when it rounds.
    weight = _test_input(1, kind.width)[0].to(device, kind.dtype)
    norm = copy(module)
    vars(norm)["_parameters"] = {"weight": weight}
    with torch.no_grad():
        expected = norm.forward(x)  # not norm(x), so that the caller's hooks do not run
    for form in (_NormForm(plus, late) for plus in (0.0, 1.0) for late in (False, True)):
        factors = kernel.norm_factors(weight, kind.dtype, form.plus)
        if _equal_up_to_rounding(kernel.rms_norm(x, factors, kind.eps, form.late), expected):
            return form
    return None


class FusedNorm:
    """A forward of a norm that calls the kernel, or the norm's own forward for rows of another dtype or width."""

    def __init__(self, module: nn.Module, eps: float, kernel: PointwiseKernel, form: _NormForm) -> None:
        self.module = module
        self._own: Callable[..., torch.Tensor] = module.forward
        self.eps = eps
        self._kernel = kernel
        self._form = form
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

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the normed rows of x [..., width]."""
        if x.dtype != self.factors.dtype or x.shape[-1] != self._width:
            return self._own(x)
        return self._kernel.rms_norm(x, self.factors, self.eps, self.late)


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
    """Replaces a family's rotary function: calls the kernel of the thread, if it is inside `FusedModules.applied`."""

    def __init__(self, own: Callable[..., Any]) -> None:
        self.own = own

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *others: Any, **named: Any
    ) -> Any:
        kernel = _rotary_kernels.get().get(self.own)
        supported = (
            kernel is not None
            and q.dtype == k.dtype == cos.dtype == sin.dtype
            and q.dtype in kernel.dtypes
            and q.dim() == k.dim() == 4
            and cos.shape == sin.shape == (q.shape[0], *q.shape[2:]) == (k.shape[0], *k.shape[2:])
            and q.stride(3) == k.stride(3) == 1
            and not (others or named)
        )
        if kernel is None or not supported:
            return self.own(q, k, cos, sin, *others, **named)
        return _rotated(kernel, q, k, cos, sin)


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
