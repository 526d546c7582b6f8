"""Products whose rows do not depend on their batch, for a while, in place of ``torch.nn.functional.linear`` on GPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import nn

from rollout.models.device import failure_of
from rollout.models.errors import UnsupportedDevice
from rollout.models.module.shared_attribute import replaced
from rollout.models.patches.shared_inputs import LayerProducts, LinearGroup, MergedProduct, Product

Linear = Callable[..., torch.Tensor]

#: Largest error of the self-test, relative to the largest result.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@contextmanager
def batch_invariant() -> Iterator[None]:
    """Compute linear layers on GPUs by a kernel that gives a row the same bits in any batch.

    Put a forward and its backward inside: gradients of inputs are invariant too, and a weight's is a sum over all rows
    in their order. All threads compute so meanwhile, since torch runs backwards in threads of its own. Products of
    other functions, attention among them, stay as they are, and so do weights in formats other than plain tensors.

    Raises:
        UnsupportedDevice: there is no GPU, or the kernel does not work on it.
    """
    if not torch.cuda.is_available():
        raise UnsupportedDevice("batch_invariant() needs a GPU: the kernel of its products runs on no CPU.")
    check_kernel(torch.device("cuda", torch.cuda.current_device()))
    with invariant_products():
        yield


@contextmanager
def invariant_products() -> Iterator[None]:
    """Replace the products as `batch_invariant` does, without its checks."""
    with replaced(F, "linear", _Replacement):
        yield


class _Replacement:
    """Computes what the kernel can, and leaves the rest to torch's function.

    Args:
        own: torch's function.
    """

    def __init__(self, own: Linear) -> None:
        self._own = own

    def __call__(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """See ``torch.nn.functional.linear``."""
        given = [tensor for tensor in (input, weight, bias) if tensor is not None]
        # torch broadcasts other biases, and takes a vector as the weight of one output.
        plain = weight.dim() == 2 and (bias is None or bias.shape == weight.shape[:1])
        if not plain or not _is_plain(given) or torch.compiler.is_compiling():
            return self._own(input, weight, bias)
        kind = input.device.type
        if torch.is_autocast_enabled(kind):
            given = [tensor.to(torch.get_autocast_dtype(kind)) for tensor in given]
        from rollout.models.patches.products_triton import DTYPES, linear

        if given[0].dtype not in DTYPES or len({tensor.dtype for tensor in given}) > 1:
            return self._own(input, weight, bias)
        return linear(given[0], given[1], given[2] if bias is not None else None)


def _is_plain(given: list[torch.Tensor]) -> bool:
    """Return whether all are ordinary tensors on one GPU."""
    return all(
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and _runs_on(tensor.device)
        and tensor.device == given[0].device
        for tensor in given
    )


def _runs_on(device: torch.device) -> bool:
    return device.type == "cuda"


class GroupedProducts:
    """Computes layers that receive the same input in one launch inside `applied`, without copies of their weights.

    Args:
        groups: layers of a model on a GPU that receive the same input.
    """

    def __init__(self, groups: Sequence[LinearGroup]) -> None:
        self._merged: list[MergedProduct] = []
        products: list[tuple[nn.Linear, Product]] = []
        for group in groups:
            merged = MergedProduct(partial(_products_of, group))
            self._merged.append(merged)
            products += [(layer, merged.part(i)) for i, layer in enumerate(group)]
        self._layers = LayerProducts(products)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Make the layers compute so inside the block, which is inside `invariant_products`."""
        try:
            with self._layers.applied():
                yield
        finally:
            for merged in self._merged:
                merged.clear()


def _products_of(group: LinearGroup, x: torch.Tensor) -> Sequence[torch.Tensor]:
    """Return the outputs of all layers of a group for one input, each alone where they do not suit one launch."""
    weights: list[torch.Tensor] = [layer.weight for layer in group]
    biases: list[torch.Tensor | None] = [layer.bias for layer in group]
    given = [x, *weights, *(bias for bias in biases if bias is not None)]
    if _is_plain(given) and not torch.is_autocast_enabled(x.device.type) and x.dtype == weights[0].dtype:
        from rollout.models.patches.products_triton import DTYPES, grouped_product

        outs = grouped_product(x.reshape(-1, x.shape[-1]), weights, biases) if x.dtype in DTYPES else None
        if outs is not None:
            return [out.view(*x.shape[:-1], -1) for out in outs]
    return [F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]


@cache
def check_kernel(device: torch.device) -> None:
    """Run the kernel's self-test on a device.

    Raises:
        UnsupportedDevice: it does not compile there, differs from torch's products, or a row's bits depend on the rows.
    """
    reason = "Triton is not installed" if find_spec("triton") is None else failure_of(lambda: _self_test(device))
    if reason is not None:
        raise UnsupportedDevice(f"batch-invariant products do not work on {device}: {reason.rstrip('.')}.")


def _self_test(device: torch.device) -> str | None:
    """Return what is wrong with the kernel's results, or None."""
    from rollout.models.patches.products_triton import product

    rows, columns, inner = 67, 75, 200
    for dtype, tolerance in _TOLERANCE.items():
        # Not random, so that the process's generators keep their state.
        x, weight = (
            torch.arange(count * inner, device=device).mul(step).sin().view(count, inner).to(dtype)
            for count, step in ((rows, 0.37), (columns, 0.61))
        )
        found, expected = product(x, weight.T, weight[:, 0]), x.float() @ weight.float().T + weight[:, 0].float()
        error = float((found.float() - expected).abs().max() / expected.abs().max())
        if not error <= tolerance:
            return f"the kernel differs from torch in {dtype} by {error:.2g} (tolerance {tolerance:g})"
        if not torch.equal(product(x[3:4], weight.T, weight[:, 0]), found[3:4]):
            return f"a row alone has other bits in {dtype}"
    return None
