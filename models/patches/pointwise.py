"""Interface of kernels for the operations between matrix products (norms, rotary embeddings), and their self-test."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F


@dataclass(frozen=True, slots=True)
class NormFactors:
    """Factors of a root mean square norm, as the kernel reads them."""

    values: torch.Tensor
    """[width], float32 on a CPU, the weight's dtype on a GPU."""
    dtype: torch.dtype
    """Dtype of the normed rows."""
    plus: float = 0.0
    """Constant to add to ``values``."""


class PointwiseKernel(Protocol):
    """Computes norms and rotary embeddings of tensors on one kind of device."""

    @property
    def dtypes(self) -> frozenset[torch.dtype]:
        """Supported dtypes."""
        ...

    def norm_factors(self, weight: torch.Tensor, dtype: torch.dtype, plus: float = 0.0) -> NormFactors:
        """Return the factors of `rms_norm` for rows of a dtype: weight [width], in any float dtype, plus a constant."""
        ...

    def rms_norm(self, x: torch.Tensor, factors: NormFactors, eps: float, late: bool) -> torch.Tensor:
        """Return ``x / sqrt(mean(x^2) + eps) * factors`` over the last dim of x [..., width].

        Args:
            x: any shape; of the dtype of the factors.
            factors: from `norm_factors`.
            eps: see above.
            late: True to round to the dtype once, after the factors; False to round before them too.
        """
        ...

    def rotate(
        self, query: torch.Tensor, key: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate the halves of heads (rotary embeddings, Su et al., arXiv 2104.09864, in the layout of GPT-NeoX).

        Args:
            query, key: [T, heads, dim], each with its own number of heads; any strides of tokens and heads.
            cosines, sines: [T, dim], contiguous.

        Returns:
            Both rotated, [T, heads, dim], contiguous.
        """
        ...


class BlockKernel(PointwiseKernel, Protocol):
    """A kernel that also computes what stands between the products of a decoder layer."""

    def add_norm(
        self, x: torch.Tensor, y: torch.Tensor, factors: NormFactors, eps: float, late: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ``x + y``, rounded to the dtype, and the norm of that, see `PointwiseKernel.rms_norm`.

        Args:
            x, y: [..., width], of the dtype of the factors.
            factors, eps, late: see `PointwiseKernel.rms_norm`.
        """
        ...

    def gated_silu(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Return ``silu(gate) * up``, rounded to the dtype after each of the two; both of one shape and dtype."""
        ...


def blocks_disagree_with_torch(kernel: BlockKernel, device: torch.device) -> str | None:
    """Return how the results of a `BlockKernel` differ from torch's, None if they agree up to rounding."""
    width = 75  # no multiple of a vector
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        x, y = (
            torch.arange(4 * width).mul(step).sin().mul(3).view(4, width).to(device, dtype) for step in (0.37, 0.61)
        )
        residual, normed = kernel.add_norm(x, y, kernel.norm_factors(y[0], dtype), 1e-6, late=False)
        pairs = (
            (residual, x + y),
            (normed, F.rms_norm(x + y, (width,), y[0], 1e-6)),
            (kernel.gated_silu(x, y), F.silu(x) * y),
        )
        for found, expected in pairs:
            distance = float((found.float() - expected.float()).abs().max() / expected.float().abs().max())
            if not distance <= tolerance:
                return f"it differs from torch in {dtype} by {distance:.2g} (tolerance {tolerance:g})"
    return None


def disagreement_with_torch(kernel: PointwiseKernel, device: torch.device) -> str | None:
    """Return how a kernel's results differ from torch's, None if they agree up to rounding."""
    width = 75  # no multiple of a vector
    half = 37
    dim = 2 * half
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        # No random numbers: the process's generators must not advance.
        x, y = (
            torch.arange(4 * width).mul(step).sin().mul(3).view(4, width).to(device, dtype) for step in (0.37, 0.61)
        )
        factors = kernel.norm_factors(y[0], dtype)
        pairs = [(kernel.rms_norm(x, factors, 1e-6, late=False), F.rms_norm(x, (width,), y[0], 1e-6))]
        heads = torch.stack((x, y), 1)[..., :dim]
        cosines, sines = y[:, :dim].contiguous(), x[:, :dim].contiguous()
        for rotated in kernel.rotate(heads, heads[:, 1:], cosines, sines):
            original = heads[:, -rotated.shape[1] :]
            swapped = torch.cat((-original[..., half:], original[..., :half]), -1)
            pairs.append((rotated, original * cosines[:, None] + swapped * sines[:, None]))
        for found, expected in pairs:
            distance = float((found.float() - expected.float()).abs().max() / expected.float().abs().max())
            if not distance <= tolerance:
                return f"it differs from torch in {dtype} by {distance:.2g} (tolerance {tolerance:g})"
    return None
