"""Linear layers on a CPU: computed from copies of their weights, laid out and wide enough for its products."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import nn

from rollout.models.device import cpu_multiplies
from rollout.models.patches.patching import patched
from rollout.models.patches.shared_inputs import LinearGroup, version

logger = logging.getLogger(__name__)

Product = Callable[[torch.Tensor], torch.Tensor]

#: Rows that oneDNN lays weights out for. Whatever the hint, from 16 rows on it chooses kernels that give a row the same
#: bits in any company (seen on x86-64 with AVX2 and AVX512_BF16 for 2 to 2048 rows), which plain products do not.
_ROWS_HINT = 128

#: Models of which the log says already that others have replaced forwards in them.
_told: WeakSet[nn.Module] = WeakSet()


class PackedLinears:
    """Copies of a module's linear weights, used in place of them while `applied`.

    oneDNN lays them out as its kernels read them: faster for few rows and for large vocabularies, and a row's result
    does not depend on how many rows there are. Half precision that the CPU does not multiply itself is computed in
    float32 and rounded, as hardware does, from float32 copies.

    Layers that are given the same input become one product, computed when the first of them is called.

    Copies are taken when this is made, so it is made anew after weights change. They cost as much as the weights
    (float32 ones 4 bytes a parameter) and go with it. On a GPU nothing is copied.

    Args:
        model: the module.
        room_bytes: what copies may take; layers that do not fit compute as ever.
        groups: layers of the model that are given the same input.
    """

    def __init__(self, model: nn.Module, room_bytes: int, groups: Sequence[LinearGroup] = ()) -> None:
        self._products: list[tuple[nn.Linear, Product]] = []
        self._sync: list[_Together] = []
        self.bytes_held = 0
        shared: dict[int, Product] = {}
        left_out = 0
        layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and _is_plain(layer)]
        for group in _mergeable(groups, layers):
            form = _Form.of(group[0])
            if form is None or not self._take(group, form, room_bytes):
                continue
            weight, bias = torch.cat([layer.weight.detach() for layer in group]), _joined_bias(group)
            together = _Together(form.product(weight, bias), [layer.out_features for layer in group])
            self._sync.append(together)
            self._products.extend((layer, together.part(i)) for i, layer in enumerate(group))
        merged = {id(layer) for layer, _ in self._products}
        for layer in layers:
            if id(layer) in merged:
                continue
            if _key(layer) not in shared:
                form = _Form.of(layer)
                if form is None:
                    continue
                if not self._take((layer,), form, room_bytes):
                    left_out += 1
                    continue
                shared[_key(layer)] = form.product(layer.weight.detach(), layer.bias)
            self._products.append((layer, shared[_key(layer)]))
        if self._products:
            logger.info("Linear weights are packed: %.2f GB besides the model's own.", self.bytes_held / 1e9)
        if left_out:
            logger.warning(
                "%d linear layers are not packed, since memory is short; they are slower, and in half precision "
                "results may depend on the batch.",
                left_out,
            )
        patched = sum(isinstance(layer, nn.Linear) and _is_patched(layer) for layer in model.modules())
        if patched and model not in _told:
            _told.add(model)
            logger.warning(
                "%d linear layers are not packed, since others have replaced their forward, as accelerate's hooks and "
                "tensor parallelism do; they are slower, and in half precision results may depend on the batch.",
                patched,
            )

    def _take(self, layers: LinearGroup, form: _Form, room_bytes: int) -> bool:
        """Counts the copies of some layers; False, and nothing is counted, where there is no room for them."""
        size = sum(layer.weight.numel() for layer in layers) * form.kept.itemsize
        fits = self.bytes_held + size <= room_bytes
        self.bytes_held += size * fits
        return fits

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The layers compute from their copies inside this block."""
        try:
            with patched(self._products):
                yield
        finally:
            for together in self._sync:
                together.forget()


class _Together:
    """Several layers as one product.

    Args:
        product: of the layers' weights, one below the other.
        sizes: outputs of each layer.
    """

    def __init__(self, product: Product, sizes: list[int]) -> None:
        self._product, self._sizes = product, sizes
        self.forget()

    def forget(self) -> None:
        """Drops what was computed for layers that were not called."""
        self._given: torch.Tensor | None = None
        self._version = 0
        self._parts: dict[int, torch.Tensor] = {}

    def part(self, index: int) -> Product:
        """The product of one layer."""

        def forward(x: torch.Tensor) -> torch.Tensor:
            # A part is handed out once: it is the caller's then, who may have changed it.
            if x is not self._given or version(x) != self._version or index not in self._parts:
                self._parts = dict(enumerate(torch.split_with_sizes(self._product(x), self._sizes, -1)))
                self._given, self._version = x, version(x)
            part = self._parts.pop(index)
            if not self._parts:
                self.forget()
            return part

        return forward


def _mergeable(groups: Sequence[LinearGroup], layers: Sequence[nn.Linear]) -> list[LinearGroup]:
    """Groups without the layers that are not among ``layers``, or whose weights stand in other places too."""
    counts = Counter(layer.weight.data_ptr() for layer in layers)
    own = {id(layer) for layer in layers if counts[layer.weight.data_ptr()] == 1}
    merged = [tuple(layer for layer in group if id(layer) in own) for group in groups]
    return [group for group in merged if len(group) > 1]


def _joined_bias(group: LinearGroup) -> torch.Tensor | None:
    """The biases of a group, one after another, zeros where a layer has none; None where none has."""
    if all(layer.bias is None for layer in group):
        return None
    return torch.cat(
        [layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias for layer in group]
    )


def _is_plain(layer: nn.Linear) -> bool:
    """Whether a layer is on a CPU, that nobody has patched, with an ordinary weight."""
    return (
        type(layer) is nn.Linear
        and not _is_patched(layer)
        and type(layer.weight.data) is torch.Tensor
        and layer.weight.device.type == "cpu"
        and layer.weight.layout == torch.strided
        and layer.weight.is_floating_point()
    )


def _is_patched(layer: nn.Linear) -> bool:
    """Whether a layer on a CPU computes what somebody has put in place of its forward."""
    return "forward" in vars(layer) and layer.weight.device.type == "cpu"


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

    def product(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        """Computes what a layer with this weight and bias does, from copies of them."""
        rounded, kept = self.rounded, self.kept
        weight = weight.to(rounded).to(kept)
        bias = None if bias is None else bias.detach().to(rounded).to(kept)
        multiply = _packed(weight, bias) if self.packed else lambda x: F.linear(x, weight, bias)

        def forward(x: torch.Tensor) -> torch.Tensor:
            if x.dtype == rounded == kept:
                return multiply(x)
            return multiply(x.to(rounded).to(kept)).to(rounded)

        return forward


def _packed(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    mkldnn: Any = torch.ops.mkldnn
    linear = mkldnn._linear_pointwise.default
    weight = mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS_HINT)

    def multiply(x: torch.Tensor) -> torch.Tensor:
        count = x.numel() // x.shape[-1]
        size = _rounded_up(count)
        rows = x if size == count else F.pad(x.reshape(count, -1), (0, 0, 0, size - count))
        # The result as it is: no pointwise function after it.
        product: torch.Tensor = linear(rows, weight, bias, "none", [], "")
        return product if size == count else product[:count].view(*x.shape[:-1], -1)

    return multiply


def _rounded_up(rows: int) -> int:
    """Gives how many rows are multiplied in place of so many: one of eight numbers between two powers of two.

    oneDNN makes a kernel for each number of rows of each product. A kernel takes some milliseconds to make and about a
    megabyte to keep, and oneDNN keeps up to a thousand. A step that prefills has nearly always another number of rows.
    The rows that are added cost at most an eighth of a product. A single row may take another way, which rounds
    differently, so it is multiplied as two.
    """
    unit = 1 << max(0, (rows - 1).bit_length() - 4)
    return max(2, -(-rows // unit) * unit) if rows else 0


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
