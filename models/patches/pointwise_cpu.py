"""Norms and rotary embeddings on a CPU, by the compiled kernel ``pointwise.c``."""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch

from rollout.models.csrc.build import KernelUnavailable, try_build
from rollout.models.csrc.threads import parallel
from rollout.models.patches.pointwise import NormFactors, disagreement_with_torch

_SOURCE = Path(__file__).parents[1] / "csrc" / "pointwise.c"
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}


class Pointwise:
    """The loaded kernel; all tensors must be on a CPU and of a dtype in `dtypes`.

    Args:
        library: the compiled ``pointwise.c``.
    """

    dtypes = frozenset(_DTYPES)

    def __init__(self, library: ctypes.CDLL) -> None:
        number, address = c_int64, c_void_p
        strided: list[Any] = [address, number, number, number, address]
        self._norm = library.rollout_rms_norm
        self._factors = library.rollout_norm_factors
        self._rotate = library.rollout_rotate
        self._factors.argtypes = [number, number, address, address]
        self._norm.argtypes = [*[number] * 4, address, address, c_double, address, number, address]
        self._rotate.argtypes = [*[number] * 3, address, address, number, *strided, *strided, number, address]
        for entry in (self._norm, self._factors, self._rotate):
            entry.restype = None
        self._parallel = parallel()

    def norm_factors(self, weight: torch.Tensor, dtype: torch.dtype, plus: float = 0.0) -> NormFactors:
        """See `PointwiseKernel.norm_factors`; the factors are a copy of the weight."""
        weight = (weight.detach().float() + plus).contiguous()
        values = torch.empty_like(weight)
        self._factors(_DTYPES[dtype], len(weight), weight.data_ptr(), values.data_ptr())
        return NormFactors(values, dtype)

    def rms_norm(self, x: torch.Tensor, factors: NormFactors, eps: float, late: bool) -> torch.Tensor:
        """See `PointwiseKernel.rms_norm`."""
        x = x.contiguous()
        width = x.shape[-1]
        out = torch.empty_like(x)
        self._norm(
            _DTYPES[x.dtype],
            late,
            x.numel() // width,
            width,
            x.data_ptr(),
            factors.values.data_ptr(),
            eps,
            out.data_ptr(),
            torch.get_num_threads(),
            self._parallel,
        )
        return out

    def rotate(
        self, query: torch.Tensor, key: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `PointwiseKernel.rotate`."""
        tokens, _, dim = query.shape
        query_out = torch.empty(query.shape, dtype=query.dtype)
        key_out = torch.empty(key.shape, dtype=key.dtype)
        self._rotate(
            _DTYPES[query.dtype],
            tokens,
            dim,
            cosines.data_ptr(),
            sines.data_ptr(),
            dim * query.element_size(),
            *_heads_arguments(query, query_out),
            *_heads_arguments(key, key_out),
            torch.get_num_threads(),
            self._parallel,
        )
        return query_out, key_out


def _heads_arguments(x: torch.Tensor, out: torch.Tensor) -> tuple[int, ...]:
    """Return the arguments of the C function for heads [T, heads, dim]: strides are in bytes."""
    size = x.element_size()
    return x.data_ptr(), x.shape[1], x.stride(0) * size, x.stride(1) * size, out.data_ptr()


@cache
def pointwise() -> Pointwise | None:
    """Return the kernel, building it at its first use on this machine; None, with one warning, if that fails."""
    return try_build(_SOURCE, _checked)


def _checked(library: ctypes.CDLL) -> Pointwise:
    """Return the kernel of a library after its self-test.

    Raises:
        KernelUnavailable: the kernel disagrees with torch.
    """
    kernel = Pointwise(library)
    reason = disagreement_with_torch(kernel, torch.device("cpu"))
    if reason is not None:
        raise KernelUnavailable(f"the compiled kernel is wrong: {reason}.")
    return kernel
