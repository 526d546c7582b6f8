"""Fixtures shared by the tests of norms, rotary functions and linear layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rollout.models.csrc import build
from rollout.models.csrc.build import KernelUnavailable
from rollout.models.patches import linear_products
from rollout.models.patches.compiled_products import CompiledProducts, PackedWeight
from rollout.models.patches.pointwise_cpu import Pointwise, pointwise


@pytest.fixture
def kernel() -> None:
    try:
        build.compiler()
    except KernelUnavailable as error:
        pytest.skip(str(error))
    assert pointwise() is not None


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count calls of the kernel by entry point."""
    calls: Counter[str] = Counter()

    def counting(name: str, own: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            calls[name] += 1
            return own(*arguments, **named)

        return counted

    for name in ("rms_norm", "rotate"):
        monkeypatch.setattr(Pointwise, name, counting(name, getattr(Pointwise, name)))
    return calls


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of all results of packed products."""
    shapes: list[torch.Size] = []
    own, compiled = linear_products._packed, CompiledProducts.multiply

    def packed(weight: torch.Tensor, bias: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor]:
        multiply = own(weight, bias)

        def counted(x: torch.Tensor) -> torch.Tensor:
            out = multiply(x)
            shapes.append(out.shape)
            return out

        return counted

    def counting(kernel: CompiledProducts, weight: PackedWeight, x: torch.Tensor) -> torch.Tensor:
        out = compiled(kernel, weight, x)
        shapes.append(out.shape)
        return out

    monkeypatch.setattr(linear_products, "_packed", packed)
    monkeypatch.setattr(CompiledProducts, "multiply", counting)
    return shapes


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave products to oneDNN, as on a machine without a compiler."""
    monkeypatch.setattr(linear_products, "compiled_products", lambda: None)
