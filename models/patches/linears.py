"""Linear layers on a CPU: compute from copies of the weights, packed for oneDNN and in a dtype the CPU multiplies."""

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

from rollout.models.arrays import ceil_div
from rollout.models.device import cpu_multiplies
from rollout.models.patches.patching import patched
from rollout.models.patches.shared_inputs import LinearGroup, version

logger = logging.getLogger(__name__)

Product = Callable[[torch.Tensor], torch.Tensor]

#: Rows that oneDNN packs weights for. Whatever the hint, from 16 rows on it chooses kernels that give a row the same
#: bits in any batch (seen on x86-64 with AVX2 and AVX512_BF16 for 2 to 2048 rows), which plain products do not.
_ROWS_HINT = 128

_FORWARD = nn.Linear.forward

#: Models already warned about patched linear layers.
_warned: WeakSet[nn.Module] = WeakSet()


class PackedLinears:
    """Packed copies of a module's linear weights, which replace the originals inside `applied`.

    oneDNN packs weights in the order in which its kernels read them. This is faster for few rows and for large
    vocabularies, and a row's result does not depend on the number of rows. Half precision that the CPU cannot multiply
    is computed from float32 copies and rounded, as hardware would.

    Layers that receive the same input run as one product, computed when the first of them is called.

    Copies are made by the constructor, so create a new instance after weights change. They take as much memory as the
    weights (4 bytes per parameter in float32). Nothing is copied on a GPU. A layer whose weight is another tensor while
    the model calls it, as parametrizations make it, computes by its own forward.

    Args:
        model: the module.
        room_bytes: memory limit of the copies; layers that do not fit keep their own forward.
        groups: layers of the model that receive the same input.
    """

    def __init__(self, model: nn.Module, room_bytes: int, groups: Sequence[LinearGroup] = ()) -> None:
        self.bytes_held = 0
        """Memory of the copies."""
        self._room_bytes = room_bytes
        self._products: list[tuple[nn.Linear, Product]] = []
        self._merged: list[_MergedProduct] = []
        layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and _is_plain(layer)]
        self._pack_groups(_mergeable(groups, layers))
        grouped = {id(layer) for layer, _ in self._products}
        left_out = self._pack_single([layer for layer in layers if id(layer) not in grouped])
        if self._products:
            logger.info("Copied the model's weights into a faster layout, which takes %.2f GB.", self.bytes_held / 1e9)
        if left_out:
            logger.warning(
                "%d linear layers are not packed, since the copies may take %.2f GB; these layers are slower, and in "
                "half precision results may depend on the batch.",
                left_out,
                room_bytes / 1e9,
            )
        patched_layers = sum(isinstance(layer, nn.Linear) and _is_patched(layer) for layer in model.modules())
        if patched_layers and model not in _warned:
            _warned.add(model)
            logger.warning(
                "%d linear layers are not packed, since their forward is patched, as accelerate's hooks and tensor "
                "parallelism do; these layers are slower, and in half precision results may depend on the batch.",
                patched_layers,
            )

    def _pack_groups(self, groups: Sequence[LinearGroup]) -> None:
        """Pack each group that fits as one product."""
        for group in groups:
            form = _WeightForm.of(group[0])
            if form is None or not self._reserve(group, form):
                continue
            weight = torch.cat([layer.weight.detach() for layer in group])
            merged = _MergedProduct(form.product(weight, _joined_bias(group)), [layer.out_features for layer in group])
            self._merged.append(merged)
            self._products.extend((layer, merged.part(index)) for index, layer in enumerate(group))

    def _pack_single(self, layers: Sequence[nn.Linear]) -> int:
        """Pack each layer that fits; return the number of layers that do not."""
        left_out = 0
        shared: dict[int, Product] = {}
        for layer in layers:
            key = _copy_key(layer)
            if key not in shared:
                form = _WeightForm.of(layer)
                if form is None:
                    continue
                if not self._reserve((layer,), form):
                    left_out += 1
                    continue
                shared[key] = form.product(layer.weight.detach(), layer.bias)
            self._products.append((layer, shared[key]))
        return left_out

    def _reserve(self, layers: LinearGroup, form: _WeightForm) -> bool:
        """Count the copies of some layers if they fit; return whether they do."""
        size = sum(layer.weight.numel() for layer in layers) * form.compute_dtype.itemsize
        if self.bytes_held + size > self._room_bytes:
            return False
        self.bytes_held += size
        return True

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Make the layers compute from their copies inside the block."""
        try:
            with patched((layer, _while_weight_stays(layer, product)) for layer, product in self._products):
                yield
        finally:
            for merged in self._merged:
                merged.clear()


def _while_weight_stays(layer: nn.Linear, product: Product) -> Product:
    """Return a forward that calls the layer's own forward instead of the product if the layer has another weight.

    PEFT parametrizes the layers of its ``target_parameters`` only while it calls them, so no copy can be made then.
    """
    weight, parameters = layer.weight, layer._parameters

    def forward(x: torch.Tensor) -> torch.Tensor:
        if parameters.get("weight") is not weight:
            out: torch.Tensor = type(layer).forward(layer, x)
            return out
        return product(x)

    return forward


class _MergedProduct:
    """Computes the products of several layers at once.

    Args:
        product: of the layers' weights, concatenated by rows.
        sizes: outputs of each layer.
    """

    def __init__(self, product: Product, sizes: list[int]) -> None:
        self._product = product
        self._sizes = sizes
        self.clear()

    def clear(self) -> None:
        """Drop the input and the parts of layers that were not called."""
        self._input: torch.Tensor | None = None
        self._version = 0
        self._parts: dict[int, torch.Tensor] = {}

    def part(self, index: int) -> Product:
        """Return the product of one layer."""

        def forward(x: torch.Tensor) -> torch.Tensor:
            # Each part is handed out once: the caller may change it in place.
            if x is not self._input or version(x) != self._version or index not in self._parts:
                self._parts = dict(enumerate(torch.split_with_sizes(self._product(x), self._sizes, -1)))
                self._input = x
                self._version = version(x)
            part = self._parts.pop(index)
            if not self._parts:
                self.clear()
            return part

        return forward


def _mergeable(groups: Sequence[LinearGroup], layers: Sequence[nn.Linear]) -> list[LinearGroup]:
    """Return the groups without layers that are not in ``layers`` or that share their weight with another layer."""
    counts = Counter(layer.weight.data_ptr() for layer in layers)
    unshared = {id(layer) for layer in layers if counts[layer.weight.data_ptr()] == 1}
    reduced = [tuple(layer for layer in group if id(layer) in unshared) for group in groups]
    return [group for group in reduced if len(group) > 1]


def _joined_bias(group: LinearGroup) -> torch.Tensor | None:
    """Return the concatenated biases of a group, zeros for layers without; None if no layer has a bias."""
    if all(layer.bias is None for layer in group):
        return None
    return torch.cat(
        [layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias for layer in group]
    )


def _is_plain(layer: nn.Linear) -> bool:
    """Return whether a layer is an unpatched ``nn.Linear`` on a CPU with an ordinary weight of its own."""
    return (
        type(layer) is nn.Linear
        and nn.Linear.forward is _FORWARD
        and not _is_patched(layer)
        and "weight" in layer._parameters  # torch's older weight_norm computes the weight in a hook
        and type(layer.weight.data) is torch.Tensor
        and layer.weight.device.type == "cpu"
        and layer.weight.layout == torch.strided
        and layer.weight.is_floating_point()
    )


def _is_patched(layer: nn.Linear) -> bool:
    """Return whether a layer is on a CPU and its forward was replaced."""
    return "forward" in vars(layer) and layer.weight.device.type == "cpu"


def _copy_key(layer: nn.Linear) -> int:
    """Return the key of a layer's copy; layers without bias that share a weight share its copy."""
    return layer.weight.data_ptr() if layer.bias is None else id(layer)


@dataclass(frozen=True, slots=True)
class _WeightForm:
    """How a layer's weight is stored and multiplied."""

    rounding_dtype: torch.dtype
    """Dtype that inputs, weights and results are rounded to: autocast's, or the weight's."""
    compute_dtype: torch.dtype
    """Dtype of the copies and products."""
    packed: bool
    """True if oneDNN packs the weight."""

    @classmethod
    def of(cls, layer: nn.Linear) -> _WeightForm | None:
        """Return the form of a layer's copy, None if a copy would not help."""
        rounding = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else layer.weight.dtype
        compute = rounding if cpu_multiplies(rounding) else torch.float32
        packed = _can_pack(compute)
        if not packed and compute == layer.weight.dtype:
            return None
        return cls(rounding_dtype=rounding, compute_dtype=compute, packed=packed)

    def product(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        """Return a function that computes a layer with this weight and bias from copies of them."""
        rounding, compute = self.rounding_dtype, self.compute_dtype
        weight = weight.to(rounding).to(compute)
        bias = None if bias is None else bias.detach().to(rounding).to(compute)
        multiply = _packed(weight, bias) if self.packed else lambda x: F.linear(x, weight, bias)

        def forward(x: torch.Tensor) -> torch.Tensor:
            if x.dtype == rounding == compute:
                return multiply(x)
            return multiply(x.to(rounding).to(compute)).to(rounding)

        return forward


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
