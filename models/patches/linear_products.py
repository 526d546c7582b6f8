"""Products with copies of linear weights, packed and in a dtype the CPU multiplies."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from rollout.models.arrays import ceil_div
from rollout.models.device import cpu_multiplies
from rollout.models.patches.compiled_products import CompiledProducts, PackedWeight, compiled_products

logger = logging.getLogger(__name__)

Product = Callable[[torch.Tensor], torch.Tensor]

#: Rows that oneDNN packs weights for. Whatever the hint, from 16 rows on it chooses kernels that give a row the same
#: bits in any batch (seen on x86-64 with AVX2 and AVX512_BF16 for 2 to 2048 rows), which plain products do not.
_ROWS_HINT = 128


class Multiplier(Enum):
    """What computes a product, and in whose layout the weight is copied."""

    COMPILED = auto()
    """The kernel ``products.c``."""
    ONEDNN = auto()
    TORCH = auto()
    """Plain products with an ordinary tensor."""


@dataclass(frozen=True, slots=True)
class WeightForm:
    """How a layer's weight is stored and multiplied."""

    rounding_dtype: torch.dtype
    """Dtype that inputs, weights and results are rounded to: autocast's, or the weight's."""
    compute_dtype: torch.dtype
    """Dtype of the copies and products."""
    multiplier: Multiplier

    @classmethod
    def of(cls, layer: nn.Linear) -> WeightForm | None:
        """Return the form of a layer's copy, None if a copy would not help."""
        rounding = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else layer.weight.dtype
        kernel = compiled_products()
        if kernel is not None and kernel.multiplies(rounding):
            return cls(rounding, rounding, Multiplier.COMPILED)
        compute = rounding if cpu_multiplies(rounding) else torch.float32
        if kernel is not None and kernel.multiplies(compute):
            return cls(rounding, compute, Multiplier.COMPILED)
        if _can_pack(compute):
            return cls(rounding, compute, Multiplier.ONEDNN)
        return None if compute == layer.weight.dtype else cls(rounding, compute, Multiplier.TORCH)

    def copy_bytes(self, outputs: int, inputs: int) -> int:
        """Return the memory of a copy of a weight [outputs, inputs]."""
        if self.multiplier is Multiplier.COMPILED:
            return _kernel().packed_bytes(self.compute_dtype, outputs, inputs)
        return outputs * inputs * self.compute_dtype.itemsize


class LinearProduct:
    """Computes a linear layer from copies of a weight and a bias.

    Args:
        form: of the copies.
        weight: [outputs, inputs].
        bias: [outputs], or None.
    """

    def __init__(self, form: WeightForm, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._form = form
        self._multiply: Product | None = None
        self.packed: PackedWeight | None = None
        """The copies as the compiled kernel reads them; None if it is not used."""
        self.load(weight, bias)

    def load(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Take other values, of the same shapes and dtypes, instead of the ones copied before."""
        rounding, compute = self._form.rounding_dtype, self._form.compute_dtype
        bias = None if bias is None else bias.detach().to(rounding).to(compute)
        weight = weight.detach()
        # Freed first, so that the new copy can have its memory: fresh memory costs more than the copy.
        self._multiply = None
        if self._form.multiplier is Multiplier.COMPILED:
            self._multiply = self._packed_by_kernel(weight.to(rounding).to(compute), bias)
        elif self._form.multiplier is Multiplier.ONEDNN:
            self._multiply = _packed(weight.to(rounding).to(compute), bias)
        else:
            copy = weight.to(rounding).to(compute)
            self._multiply = lambda x: F.linear(x, copy, bias)

    def _packed_by_kernel(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        kernel = _kernel()
        if self.packed is None:
            self.packed = kernel.pack(weight, bias)
        else:
            kernel.pack_again(self.packed, weight, bias)
        packed = self.packed
        return lambda x: kernel.multiply(packed, x)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output for x [..., inputs]."""
        rounding, compute = self._form.rounding_dtype, self._form.compute_dtype
        multiply = self._multiply
        assert multiply is not None, "an earlier copy failed"
        if x.dtype == rounding == compute:
            return multiply(x)
        return multiply(x.to(rounding).to(compute)).to(rounding)


def _kernel() -> CompiledProducts:
    kernel = compiled_products()
    assert kernel is not None, "a form was chosen without its kernel"
    return kernel


def _packed(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    """Return a product with a weight that oneDNN has packed."""
    mkldnn: Any = torch.ops.mkldnn
    linear = mkldnn._linear_pointwise.default
    weight = mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS_HINT)

    def multiply(x: torch.Tensor) -> torch.Tensor:
        count = x.numel() // x.shape[-1]
        size = _padded_rows(count)
        rows = x if size == count else F.pad(x.reshape(count, -1), (0, 0, 0, size - count))
        # "none": no pointwise function is fused after the product.
        product: torch.Tensor = linear(rows, weight, bias, "none", [], "")
        return product if size == count else product[:count].view(*x.shape[:-1], -1)

    return multiply


def _padded_rows(rows: int) -> int:
    """Round the rows of a product up to one of eight numbers between two powers of two.

    oneDNN builds a kernel for each number of rows of each product. Building takes some milliseconds and a kernel about
    a megabyte, and oneDNN keeps up to a thousand. Nearly every step that prefills has a new number of rows. The padding
    costs at most an eighth of a product. A single row may use a kernel that rounds differently, so it is padded to two.
    """
    unit = 1 << max(0, (rows - 1).bit_length() - 4)
    return max(2, ceil_div(rows, unit) * unit) if rows else 0


@cache
def _can_pack(dtype: torch.dtype) -> bool:
    """Return whether this build of torch packs linear weights, by a trial: the operators are private."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16) or not torch.backends.mkldnn.is_available():
        return False
    x, weight = torch.ones(3, 32, dtype=dtype), torch.ones(16, 32, dtype=dtype)
    try:
        y = _packed(weight, None)(x)
    except (RuntimeError, AttributeError) as error:
        logger.info("Weights in %s keep their layout, which is slower: %s", dtype, error)
        return False
    return bool((y == 32).all())
