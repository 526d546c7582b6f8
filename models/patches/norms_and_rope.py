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
from importlib.util import find_spec
from itertools import pairwise
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

from rollout.models.module.shared_attribute import replaced
from rollout.models.patches.fused_blocks import fused_attention, fused_layer, fused_mlp, hands_on
from rollout.models.patches.fused_norms import FusedNorm, NormForm, NormKind, norm_form, probe_input
from rollout.models.patches.llama_blocks import fast_attention, fast_mlp
from rollout.models.patches.patching import PatchedForward, patched
from rollout.models.patches.pointwise import BlockKernel, PointwiseKernel
from rollout.models.patches.pointwise_cpu import Pointwise, pointwise

_ROTARY = "apply_rotary_pos_emb"

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
        self._forwards: list[PatchedForward] = []
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
        kinds: dict[NormKind, NormForm | None] = {}
        for module in model.modules():
            kind = NormKind.of(module, device)
            if kind is None:
                continue
            if kind not in kinds:
                kinds[kind] = norm_form(module, kind, kernel, device)
            form = kinds[kind]
            if form is not None:
                self._norms[module] = FusedNorm(module, kind.eps, kernel, form)
        self._forwards.extend(PatchedForward.of(module, norm) for module, norm in self._norms.items())
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
            self._add_fused_blocks(model, kernel)

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
                self._forwards.append(PatchedForward.of(module, forward))

    def _add_fused_blocks(self, model: nn.Module, kernel: BlockKernel) -> None:
        """Add forwards of attention and MLP modules and decoder layers with fewer launches."""
        next_norms = self._next_norms(model)
        for module in model.modules():
            before_mlp = getattr(module, "post_attention_layernorm", None)
            norm = self._norms.get(before_mlp) if isinstance(before_mlp, nn.Module) else None
            attention = fused_attention(module) if self.rotates(module) else None
            layer = fused_layer(module, norm, next_norms.get(module), kernel)
            forward = attention or layer or fused_mlp(module, kernel)
            if forward is not None:
                self._forwards.append(PatchedForward.of(module, forward))

    def _next_norms(self, model: nn.Module) -> dict[nn.Module, FusedNorm]:
        """Return the norm that follows each decoder layer, as far as they are fused."""
        found: dict[nn.Module, FusedNorm] = {}
        for module in model.modules():
            layers = getattr(module, "layers", None)
            if not isinstance(layers, nn.ModuleList):
                continue
            for layer, after in pairwise([*layers, getattr(module, "norm", None)]):
                following = getattr(after, "input_layernorm", after)
                norm = self._norms.get(following) if isinstance(following, nn.Module) else None
                if norm is not None and hands_on(layer, after):
                    found[layer] = norm
        return found

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
            for norm in self._norms.values():
                norm.drop_kept()


def _kernel(device: torch.device) -> Pointwise | BlockKernel | None:
    """Return the kernel for tensors on a device, None if there is none."""
    if device.type == "cpu":
        return pointwise()
    # Only torch's GPU builds ship Triton.
    if device.type != "cuda" or find_spec("triton") is None:
        return None
    from rollout.models.patches.pointwise_triton import triton_pointwise

    return triton_pointwise(device)


# -- rotary embeddings -----------------------------------------------------------------------------------


def _rotates_halves(own: Callable[..., Any], kernel: PointwiseKernel, device: torch.device) -> bool:
    """Return whether a family's rotary function rotates the halves of heads, as the kernel does."""
    if list(inspect.signature(own).parameters)[:4] != ["q", "k", "cos", "sin"]:
        return False
    tokens, dim = 3, 8
    for dtype in kernel.dtypes:
        query, key = (
            probe_input(heads * tokens, dim).view(1, heads, tokens, dim).to(device, dtype) for heads in (4, 2)
        )
        angles = [
            probe_input(tokens, dim).mul(step).cos().view(1, tokens, dim).to(device, dtype) for step in (2.0, 3.0)
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
