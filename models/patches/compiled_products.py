"""Products with packed weights on a CPU, by the compiled kernel ``products.c``."""

from __future__ import annotations

import ctypes
import platform
from ctypes import Structure, addressof, c_int64, c_void_p
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch

from rollout.models.csrc.build import KernelUnavailable, address_of, try_build
from rollout.models.csrc.threads import parallel
from rollout.models.device import cpu_multiplies
from rollout.models.huge_pages import Arena

SOURCE = Path(__file__).parents[1] / "csrc" / "products.c"
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
#: Relative to the sum of the products' magnitudes: results in bfloat16 are rounded to 8 bits.
_TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3}


class CProduct(Structure):
    """A ``Product`` of ``products.h``."""

    _fields_ = (
        ("outputs", c_int64),
        ("inputs", c_int64),
        ("dtype", c_int64),
        ("weight", c_void_p),
        ("bias", c_void_p),
    )


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight and a bias as the kernel reads them; other values may be packed in their place."""

    outputs: int
    inputs: int
    dtype: torch.dtype
    """Of the weight, and of the inputs and outputs of products with it."""
    values: torch.Tensor
    """[bytes] uint8, in the layout of ``products.h``."""
    bias: torch.Tensor | None
    """[outputs] float32."""
    as_c: CProduct = field(init=False, repr=False, compare=False)
    """Holds bare addresses of this object's tensors."""

    def __post_init__(self) -> None:
        bias = None if self.bias is None else self.bias.data_ptr()
        c_product = CProduct(self.outputs, self.inputs, _DTYPES[self.dtype], self.values.data_ptr(), bias)
        object.__setattr__(self, "as_c", c_product)

    @property
    def address(self) -> int:
        """Address of the C structure."""
        return addressof(self.as_c)


class CompiledProducts:
    """The loaded kernel; all tensors must be on a CPU and of a dtype that it multiplies.

    Args:
        library: the compiled ``products.c``.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        number, address = c_int64, c_void_p
        self._bytes = library.rollout_packed_bytes
        self._pack = library.rollout_pack_weight
        self._multiply = library.rollout_multiply
        self._bytes.argtypes = [number] * 3
        self._pack.argtypes = [*[number] * 3, address, number, address, number, address]
        self._multiply.argtypes = [address, number, address, number, address, number, number, address]
        self._bytes.restype = self._multiply.restype = number
        self._pack.restype = None
        self.fused = bool(library.rollout_products_are_fused())
        """Whether the CPU has fused multiply-adds of vectors, or better."""
        self.tasks = address_of(library.rollout_product_tasks)
        """Address of a function that counts a product's tasks, for kernels whose threads run already."""
        self.scratch_bytes = address_of(library.rollout_product_scratch_bytes)
        """Address of a function that returns the working memory of a thread, likewise."""
        self.run_task = address_of(library.rollout_product_task)
        """Address of a function that runs one of the tasks, likewise."""
        self._parallel = parallel()
        self._arena = Arena()

    def multiplies(self, dtype: torch.dtype) -> bool:
        """Return whether the kernel multiplies a dtype as fast as the CPU can.

        Where the CPU has no instructions for bfloat16, numbers are widened to float32 in registers. Instructions of
        other architectures than x86 are not used.
        """
        return dtype == torch.float32 or (
            dtype == torch.bfloat16 and (platform.machine() in ("x86_64", "AMD64") or not cpu_multiplies(dtype))
        )

    def packed_bytes(self, dtype: torch.dtype, outputs: int, inputs: int) -> int:
        """Return the memory of a packed weight."""
        size: int = self._bytes(_DTYPES[dtype], outputs, inputs)
        return size

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None) -> PackedWeight:
        """Pack a weight [outputs, inputs] and copy a bias [outputs]."""
        outputs, inputs = weight.shape
        values = self._arena.empty(self.packed_bytes(weight.dtype, outputs, inputs))
        held = None if bias is None else torch.empty(outputs, dtype=torch.float32)
        packed = PackedWeight(outputs, inputs, weight.dtype, values, held)
        self.pack_again(packed, weight, bias)
        return packed

    def pack_again(self, packed: PackedWeight, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Pack other values, of the same shape and dtype, in the place of the ones before.

        Raises:
            ValueError: the shape or dtype differs, or there is a bias where there was none, or none where one was.
        """
        shape = (packed.outputs, packed.inputs)
        if weight.shape != shape or weight.dtype != packed.dtype or (bias is None) != (packed.bias is None):
            raise ValueError(
                f"Expected a weight {shape} in {packed.dtype} {'without' if packed.bias is None else 'with'} a bias, "
                f"got {tuple(weight.shape)} in {weight.dtype}."
            )
        weight = weight.detach()
        if weight.stride(1) != 1:
            weight = weight.contiguous()
        self._pack(
            _DTYPES[weight.dtype],
            *shape,
            weight.data_ptr(),
            weight.stride(0) * weight.element_size(),
            packed.values.data_ptr(),
            torch.get_num_threads(),
            self._parallel,
        )
        if packed.bias is not None and bias is not None:
            packed.bias.copy_(bias.detach())

    def multiply(self, packed: PackedWeight, x: torch.Tensor) -> torch.Tensor:
        """Return x [..., inputs] times the transposed weight, plus the bias: [..., outputs], contiguous.

        A row's bits do not depend on the other rows or their number, or on the number of threads.

        Raises:
            ValueError: the shape or dtype of x does not match.
            MemoryError: there is no working memory.
        """
        inputs = packed.inputs
        if x.dtype != packed.dtype or x.shape[-1] != inputs:
            raise ValueError(f"Expected [..., {inputs}] in {packed.dtype}, got {tuple(x.shape)} in {x.dtype}.")
        out = torch.empty((*x.shape[:-1], packed.outputs), dtype=x.dtype)
        rows = x.reshape(-1, inputs) if inputs else x.new_zeros(out.shape[:-1].numel(), 0)
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        size = x.element_size()
        failed = self._multiply(
            packed.address,
            rows.shape[0],
            rows.data_ptr(),
            rows.stride(0) * size,
            out.data_ptr(),
            packed.outputs * size,
            torch.get_num_threads(),
            self._parallel,
        )
        if failed:
            raise MemoryError("There is no working memory for a product.")
        return out


@cache
def compiled_products() -> CompiledProducts | None:
    """Return the kernel, building it at its first use on this machine; None, with one warning, if that fails."""
    return try_build(SOURCE, checked)


def checked(library: ctypes.CDLL) -> CompiledProducts:
    """Return the kernel of a library after its self-test.

    Raises:
        KernelUnavailable: the kernel disagrees with torch, or the CPU has no fused multiply-adds of vectors.
    """
    kernel = CompiledProducts(library)
    if not kernel.fused:
        raise KernelUnavailable("the kernel needs fused multiply-adds of vectors")
    draws = torch.Generator().manual_seed(0)
    for dtype, tolerance in _TOLERANCE.items():
        for outputs, inputs in ((70, 75), (33, 192)):
            x, weight = (torch.randn(n, inputs, generator=draws).to(dtype) for n in (41, outputs))
            bias = torch.randn(outputs, generator=draws)
            packed = kernel.pack(weight, bias)
            out = kernel.multiply(packed, x)
            exact = x.double() @ weight.double().T + bias
            size = x.double().abs() @ weight.double().T.abs() + bias.abs()
            error = float(((out - exact).abs() / size).max())
            if not error <= tolerance:
                raise KernelUnavailable(f"the compiled kernel differs from torch by {error:.2g} in {dtype}.")
            if any(not torch.equal(kernel.multiply(packed, x[:n]), out[:n]) for n in (1, 5, 16, 33)):
                raise KernelUnavailable(f"results of the compiled kernel depend on the number of rows in {dtype}.")
    return kernel
