"""Linear layers on a CPU: computed from copies of their weights, laid out and wide enough for its products."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from rollout.models.precision import cpu_multiplies

logger = logging.getLogger(__name__)

Product = Callable[[torch.Tensor], torch.Tensor]

#: Rows that oneDNN lays weights out for. Whatever the hint, from 16 rows on it chooses kernels that give a row the same
#: bits in any company (seen on x86-64 with AVX2 for 1 to 2048 rows), which plain products do not.
_ROWS_HINT = 128


class PackedLinears:
    """Copies of a module's linear weights, used in place of them while `in_place`.

    oneDNN lays them out as its kernels read them: faster for few rows and for large vocabularies, and a row's result
    does not depend on how many rows there are. Half precision that the CPU does not multiply itself is computed in
    float32 and rounded, as hardware does, from float32 copies.

    Copies are taken when this is made, so it is made anew after weights change. They cost as much as the weights
    (float32 ones 4 bytes a parameter) and go with it. On a GPU nothing is copied.

    Args:
        model: the module.
        room_bytes: what copies may take; layers that do not fit compute as ever.
    """

    def __init__(self, model: nn.Module, room_bytes: int) -> None:
        self._products: list[tuple[nn.Linear, Product]] = []
        self.bytes_held = 0
        shared: dict[int, Product] = {}
        left_out = 0
        for layer in model.modules():
            if not _is_plain(layer):
                continue
            assert isinstance(layer, nn.Linear)
            if _key(layer) not in shared:
                form = _Form.of(layer)
                if form is None:
                    continue
                size = layer.weight.numel() * form.kept.itemsize
                if self.bytes_held + size > room_bytes:
                    left_out += 1
                    continue
                self.bytes_held += size
                shared[_key(layer)] = form.product(layer)
            self._products.append((layer, shared[_key(layer)]))
        if self._products:
            logger.info("Linear weights are packed: %.2f GB besides the model's own.", self.bytes_held / 1e9)
        if left_out:
            logger.warning(
                "%d linear layers are not packed, since memory is short; they are slower, and in half precision "
                "results may depend on the batch.",
                left_out,
            )

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The layers compute from their copies inside this block."""
        try:
            for layer, product in self._products:
                layer.forward = product  # type: ignore[method-assign, assignment]
            yield
        finally:
            for layer, _ in self._products:
                vars(layer).pop("forward", None)


def _is_plain(layer: nn.Module) -> bool:
    """Whether ``layer`` is a linear on a CPU that nobody has patched, with an ordinary weight."""
    return (
        type(layer) is nn.Linear
        and "forward" not in vars(layer)
        and type(layer.weight.data) is torch.Tensor
        and layer.weight.device.type == "cpu"
        and layer.weight.layout == torch.strided
        and layer.weight.is_floating_point()
    )


def _key(layer: nn.Linear) -> int:
    """Layers that share a weight, and have no bias of their own, share its copy."""
    return layer.weight.data_ptr() if layer.bias is None else id(layer)


@dataclass(frozen=True, slots=True)
class _Form:
    """How a layer's weight is kept and multiplied."""

    rounded: torch.dtype
    """What inputs, weights and results are rounded to: autocast's dtype where it is on."""
    kept: torch.dtype
    """What products are computed in."""
    packed: bool
    """Whether oneDNN lays the weight out."""

    @classmethod
    def of(cls, layer: nn.Linear) -> _Form | None:
        """None where the layer is best left alone."""
        rounded = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else layer.weight.dtype
        kept = rounded if cpu_multiplies(rounded) else torch.float32
        packed = _packs(kept)
        return cls(rounded, kept, packed) if packed or kept != layer.weight.dtype else None

    def product(self, layer: nn.Linear) -> Product:
        """Computes what ``layer`` does, from a copy of its weight."""
        rounded, kept = self.rounded, self.kept
        weight = layer.weight.detach().to(rounded).to(kept)
        bias = None if layer.bias is None else layer.bias.detach().to(rounded).to(kept)
        multiply = _packed(weight, bias) if self.packed else lambda x: F.linear(x, weight, bias)

        def forward(x: torch.Tensor) -> torch.Tensor:
            return multiply(x.to(rounded).to(kept)).to(rounded)

        return forward


def _packed(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    mkldnn: Any = torch.ops.mkldnn
    weight = mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS_HINT)

    def multiply(x: torch.Tensor) -> torch.Tensor:
        # The result as it is: no pointwise function after it.
        product: torch.Tensor = mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return product

    return multiply


@cache
def _packs(dtype: torch.dtype) -> bool:
    """Whether this build of torch packs linear weights; the operators are private, so they are tried."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16) or not torch.backends.mkldnn.is_available():
        return False
    x, weight = torch.ones(3, 32, dtype=dtype), torch.ones(16, 32, dtype=dtype)
    try:
        y = _packed(weight, None)(x)
    except (RuntimeError, AttributeError) as reason:
        logger.info("Linear weights in %s are not packed: %s", dtype, reason)
        return False
    return bool((y == 32).all())
