"""Linear layers on a CPU: compute from copies of the weights, packed and in a dtype the CPU multiplies."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from weakref import WeakSet

import torch
from torch import nn

from rollout.models.module.weight_samples import Name
from rollout.models.patches.linear_products import LinearProduct, Product, WeightForm
from rollout.models.patches.shared_inputs import LayerProducts, LinearGroup, MergedProduct

logger = logging.getLogger(__name__)

_FORWARD = nn.Linear.forward

#: Models already warned about patched linear layers.
_warned: WeakSet[nn.Module] = WeakSet()


class PackedLinears:
    """Packed copies of a module's linear weights, which replace the originals inside `applied`.

    Weights are packed in the order in which kernels read them: the compiled one, or oneDNN's where that is not to be
    had. This is faster for few rows and for large vocabularies, and a row's result does not depend on the number of
    rows. Half precision that the CPU cannot multiply is computed in float32 and rounded, as hardware would.

    Layers that receive the same input run as one product, computed when the first of them is called.

    Copies are made by the constructor and by `refresh`. They take as much memory as the weights, and a little padding
    (4 bytes per parameter in float32). Nothing is copied on a GPU. A layer whose weight is another tensor while the
    model calls it, as parametrizations make it, computes by its own forward, and so does one with forward pre-hooks,
    which may change it.

    Args:
        model: the module.
        room_bytes: memory limit of the copies; layers that do not fit keep their own forward.
        groups: layers of the model that receive the same input.
    """

    def __init__(self, model: nn.Module, room_bytes: int, groups: Sequence[LinearGroup] = ()) -> None:
        self.bytes_held = 0
        """Memory of the copies."""
        self._room_bytes = room_bytes
        self.left_out = 0
        """Layers that did not fit."""
        self._copies: list[_Copy] = []
        self._products: list[tuple[nn.Linear, Product]] = []
        self._products_of: dict[LinearGroup, LinearProduct] = {}
        self._merged: list[MergedProduct] = []
        layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and _is_plain(layer)]
        self._pack_groups(_mergeable(groups, layers))
        grouped = {id(layer) for layer, _ in self._products}
        self._pack_single([layer for layer in layers if id(layer) not in grouped])
        self._layers = LayerProducts(self._products)
        if self._products:
            logger.info("Copied the model's weights into a faster layout, which takes %.2f GB.", self.bytes_held / 1e9)
        if self.left_out:
            logger.warning(
                "%d linear layers are not packed, since the copies may take %.2f GB; these layers are slower, and in "
                "half precision results may depend on the batch.",
                self.left_out,
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
            form = WeightForm.of(group[0])
            if form is None or not self._reserve(group, form):
                continue
            product = LinearProduct(form, *_joined(group))
            self._copies.append(_Copy(group, product))
            self._products_of[group] = product
            merged = MergedProduct(_split(product, [layer.out_features for layer in group]))
            self._merged.append(merged)
            self._products.extend((layer, merged.part(index)) for index, layer in enumerate(group))

    def _pack_single(self, layers: Sequence[nn.Linear]) -> None:
        """Pack each layer that fits."""
        copies: dict[int, _Copy] = {}
        for layer in layers:
            key = _copy_key(layer)
            if key not in copies:
                form = WeightForm.of(layer)
                if form is None:
                    continue
                if not self._reserve((layer,), form):
                    self.left_out += 1
                    continue
                copies[key] = _Copy((layer,), LinearProduct(form, *_joined((layer,))))
            else:
                copies[key] = replace(copies[key], layers=(*copies[key].layers, layer), shared=True)
            self._products.append((layer, copies[key].product))
            self._products_of[layer,] = copies[key].product
        self._copies.extend(copies.values())

    def product_of(self, *layers: nn.Linear) -> LinearProduct | None:
        """Return the product that computes these layers at once, in this order; None if there is none."""
        return self._products_of.get(layers)

    def refresh(self, names: Collection[Name], *, moved: bool) -> bool:
        """Copy the weights and biases of these names anew.

        Args:
            names: parameters with other values.
            moved: whether parameters may be other tensors than before.

        Returns False if that cannot be done since layers no longer share their weight: make a new instance then.
        """
        if moved and any(copy.shared and len({_copy_key(layer) for layer in copy.layers}) > 1 for copy in self._copies):
            return False
        for copy in self._copies:
            if any((id(layer), name) in names for layer in copy.layers for name in ("weight", "bias")):
                copy.product.load(*copy.joined())
        return True

    def _reserve(self, layers: LinearGroup, form: WeightForm) -> bool:
        """Count the copies of some layers if they fit; return whether they do."""
        size = form.copy_bytes(sum(layer.out_features for layer in layers), layers[0].in_features)
        if self.bytes_held + size > self._room_bytes:
            return False
        self.bytes_held += size
        return True

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Make the layers compute from their copies inside the block."""
        try:
            with self._layers.applied():
                yield
        finally:
            for merged in self._merged:
                merged.clear()


@dataclass(frozen=True, slots=True)
class _Copy:
    """A copy of what one or more layers compute with."""

    layers: LinearGroup
    product: LinearProduct
    shared: bool = False
    """Whether all layers have the same weight; else the copy holds the weights of all, joined."""

    def joined(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return weight and bias of the layers as they are now."""
        return _joined(self.layers[:1] if self.shared else self.layers)


def _split(product: LinearProduct, sizes: list[int]) -> Callable[[torch.Tensor], Sequence[torch.Tensor]]:
    """Return a function that computes the layers of a joined product and splits it into their outputs."""

    def parts(x: torch.Tensor) -> Sequence[torch.Tensor]:
        return torch.split_with_sizes(product(x), sizes, -1)

    return parts


def _mergeable(groups: Sequence[LinearGroup], layers: Sequence[nn.Linear]) -> list[LinearGroup]:
    """Return the groups without layers that are not in ``layers`` or that share their weight with another layer.

    Trained and frozen layers make groups of their own, so that a step of an adapter leaves the copies of its base.
    """
    counts = Counter(layer.weight.data_ptr() for layer in layers)
    unshared = {id(layer) for layer in layers if counts[layer.weight.data_ptr()] == 1}
    reduced = [
        tuple(layer for layer in group if id(layer) in unshared and layer.weight.requires_grad is trained)
        for group in groups
        for trained in (False, True)
    ]
    return [group for group in reduced if len(group) > 1]


def _joined(group: LinearGroup) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the weights of a group, concatenated by rows, and the biases, zeros for layers without."""
    if len(group) == 1:
        return group[0].weight, group[0].bias
    weight = torch.cat([layer.weight.detach() for layer in group])
    if all(layer.bias is None for layer in group):
        return weight, None
    return weight, torch.cat(
        [layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias for layer in group]
    )


def _is_plain(layer: nn.Linear) -> bool:
    """Return whether a layer is an unpatched ``nn.Linear`` on a CPU with an ordinary weight of its own."""
    return (
        type(layer) is nn.Linear
        and nn.Linear.forward is _FORWARD
        and not _is_patched(layer)
        and not layer._forward_pre_hooks
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
