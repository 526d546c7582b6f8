"""The parts between matrix products on a CPU by a compiled kernel, ``pointwise.c``: norms and rotary embeddings."""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from rollout.models.csrc.build import KernelUnavailable, gomp_parallel, try_build

_SOURCE = Path(__file__).parents[1] / "csrc" / "pointwise.c"
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}


@dataclass(frozen=True, slots=True)
class NormFactors:
    """What a root mean square norm multiplies with, as the kernel reads it."""

    values: torch.Tensor
    """[width], float32 on a CPU, as the weight is on a GPU."""
    dtype: torch.dtype
    """Of the rows that they are for."""
    plus: float = 0.0
    """To be added to ``values``."""


class Pointwise:
    """The loaded kernel. All tensors are on a CPU, and of a dtype in `dtypes`.

    Args:
        library: with the entry points of ``pointwise.c``.
    """

    dtypes = frozenset(_DTYPES)

    def __init__(self, library: ctypes.CDLL) -> None:
        number, address = c_int64, c_void_p
        strided: list[Any] = [address, number, number, number, address]
        self._norm, self._factors = library.rollout_rms_norm, library.rollout_norm_factors
        self._rotate = library.rollout_rotate
        self._factors.argtypes = [number, number, address, address]
        self._norm.argtypes = [*[number] * 4, address, address, c_double, address, number, address]
        self._rotate.argtypes = [*[number] * 3, address, address, number, *strided, *strided, number, address]
        for entry in (self._norm, self._factors, self._rotate):
            entry.restype = None
        self._parallel = gomp_parallel()

    def norm_factors(self, weight: torch.Tensor, dtype: torch.dtype, plus: float = 0.0) -> NormFactors:
        """For `rms_norm` of rows of a dtype: weight [width], in any float dtype, plus a constant."""
        weight = (weight.detach().float() + plus).contiguous()
        values = torch.empty_like(weight)
        self._factors(_DTYPES[dtype], len(weight), weight.data_ptr(), values.data_ptr())
        return NormFactors(values, dtype)

    def rms_norm(self, x: torch.Tensor, factors: NormFactors, eps: float, late: bool) -> torch.Tensor:
        """``x / sqrt(mean(x^2) + eps) * factors`` over the last dim of x [..., width].

        Args:
            x: any shape; of the dtype that the factors are for.
            factors: of `norm_factors`.
            eps: see above.
            late: whether results are rounded to the dtype once, after the factors; else also before them.
        """
        x, width = x.contiguous(), x.shape[-1]
        out, threads = torch.empty_like(x), torch.get_num_threads()
        count = x.numel() // width
        arguments = (x.data_ptr(), factors.values.data_ptr(), eps, out.data_ptr())
        self._norm(_DTYPES[x.dtype], late, count, width, *arguments, threads, self._parallel)
        return out

    def rotate(
        self, query: torch.Tensor, key: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotary embeddings of the halves of heads (Su et al., arXiv 2104.09864, in the layout of GPT-NeoX).

        Args:
            query, key: [T, heads, dim], each its own number of heads; any strides of tokens and heads.
            cosines, sines: [T, dim], contiguous.

        Returns:
            Both rotated, [T, heads, dim], contiguous.
        """
        tokens, _, dim = query.shape
        outs = [torch.empty(x.shape, dtype=x.dtype) for x in (query, key)]
        size = query.element_size()
        given = [
            argument
            for x, out in zip((query, key), outs, strict=True)
            for argument in (x.data_ptr(), x.shape[1], x.stride(0) * size, x.stride(1) * size, out.data_ptr())
        ]
        angles = (cosines.data_ptr(), sines.data_ptr(), dim * size)
        self._rotate(_DTYPES[query.dtype], tokens, dim, *angles, *given, torch.get_num_threads(), self._parallel)
        return outs[0], outs[1]


@cache
def pointwise() -> Pointwise | None:
    """The kernel, built if this is its first use on this machine; None, with one warning, where there is none."""
    return try_build(_SOURCE, _checked)


def _checked(library: ctypes.CDLL) -> Pointwise:
    """The kernel, if it agrees with torch.

    Raises:
        KernelUnavailable: it does not.
    """
    kernel = Pointwise(library)
    width = 75
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        # No random numbers: the process's generators stay as they are.
        x, y = (torch.arange(4 * width).mul(step).sin().mul(3).view(4, width).to(dtype) for step in (0.37, 0.61))
        factors = kernel.norm_factors(y[0], dtype)
        pairs = [(kernel.rms_norm(x, factors, 1e-6, late=False), F.rms_norm(x, (width,), y[0], 1e-6))]
        # Halves of 37: vectors of any width, and a remainder.
        heads, cosines, sines = torch.stack((x, y), 1)[..., :74], y[:, :74].contiguous(), x[:, :74].contiguous()
        for part in kernel.rotate(heads, heads[:, 1:], cosines, sines):
            given = heads[:, -part.shape[1] :]
            halves = torch.cat((-given[..., 37:], given[..., :37]), -1)
            pairs.append((part, given * cosines[:, None] + halves * sines[:, None]))
        for ours, theirs in pairs:
            distance = float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max())
            if not distance <= tolerance:
                raise KernelUnavailable(f"what it built computes something else in {dtype} (by {distance:.2g}).")
    return kernel
