"""What stands between matrix products on a GPU, each in one launch of a Triton kernel.

In transformers, norms and rotary embeddings alone are some thirty small launches per layer. The kernels round where
transformers rounds. Each program computes one row, token or block of numbers alone, so results do not depend on batch
composition.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import ClassVar

import torch
import triton
import triton.language as tl

from rollout.models.arrays import ceil_div
from rollout.models.attention.triton_rotary import rotated_halves, store_halves
from rollout.models.device import failure_of, launching_on
from rollout.models.patches.pointwise import NormFactors, blocks_disagree_with_torch, disagreement_with_torch

logger = logging.getLogger(__name__)


@triton.jit
def norm(x, factors, out, x_row, width, eps, plus, LATE: tl.constexpr, BLOCK: tl.constexpr):
    """Norm one row of x [rows, width] and multiply it by the factors [width] plus a constant."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    given = tl.load(x + row * x_row + at, mask=inside, other=0.0).to(tl.float32)
    scaled = given * tl.rsqrt(tl.sum(given * given, 0) / width + eps)
    if not LATE:
        scaled = scaled.to(out.dtype.element_ty).to(tl.float32)
    factor = tl.load(factors + at, mask=inside, other=0.0).to(tl.float32) + plus
    tl.store(out + row * width + at, (scaled * factor).to(out.dtype.element_ty), mask=inside)


@triton.jit
def add_norm(x, y, factors, total, out, width, eps, plus, LATE: tl.constexpr, BLOCK: tl.constexpr):
    """Add one row of x and y [rows, width], and norm the rounded sum like `norm`."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    places = row * width + at
    added = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
    added += tl.load(y + places, mask=inside, other=0.0).to(tl.float32)
    rounded = added.to(out.dtype.element_ty)
    tl.store(total + places, rounded, mask=inside)
    given = rounded.to(tl.float32)
    scaled = given * tl.rsqrt(tl.sum(given * given, 0) / width + eps)
    if not LATE:
        scaled = scaled.to(out.dtype.element_ty).to(tl.float32)
    factor = tl.load(factors + at, mask=inside, other=0.0).to(tl.float32) + plus
    tl.store(out + places, (scaled * factor).to(out.dtype.element_ty), mask=inside)


@triton.jit
def gated_silu(gate, up, out, count, BLOCK: tl.constexpr):
    """Compute silu(gate) * up of ``count`` numbers; rounds after each operation, as torch does."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    x = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    activated = tl.math.div_rn(x, 1.0 + tl.exp(-x)).to(out.dtype.element_ty).to(tl.float32)
    y = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (activated * y).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rotate_heads(x, out, cosines, sines, x_token, x_head, HEADS, HALF, BLOCK_HEADS, BLOCK_HALF):
    token = tl.program_id(0).to(tl.int64)
    left, right = rotated_halves(
        x + token * x_token, cosines, sines, token, x_head, HEADS, HALF, BLOCK_HEADS, BLOCK_HALF
    )
    store_halves(out + token * (HEADS * 2 * HALF), left, right, HEADS, HALF, BLOCK_HEADS, BLOCK_HALF)


@triton.jit
def rotate(
    query,
    key,
    query_out,
    key_out,
    cosines,
    sines,
    query_token,
    query_head,
    key_token,
    key_head,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """Rotate one token's heads [HEADS, 2 * HALF] of the query or the key by angles [2 * HALF]."""
    if tl.program_id(1) == 0:
        _rotate_heads(query, query_out, cosines, sines, query_token, query_head, HEADS, HALF, BLOCK_HEADS, BLOCK_HALF)
    else:
        _rotate_heads(key, key_out, cosines, sines, key_token, key_head, KEY_HEADS, HALF, BLOCK_HEADS, BLOCK_HALF)


_SILU_BLOCK = 1024
"""Numbers that a program of `gated_silu` computes."""


class TritonPointwise:
    """Implements `BlockKernel` for tensors on a GPU."""

    dtypes: ClassVar[frozenset[torch.dtype]] = frozenset((torch.float32, torch.bfloat16, torch.float16))

    def norm_factors(self, weight: torch.Tensor, dtype: torch.dtype, plus: float = 0.0) -> NormFactors:
        """See `PointwiseKernel.norm_factors`; not a copy, so in-place changes of a contiguous weight take effect."""
        return NormFactors(weight.detach().contiguous(), dtype, plus)

    def rms_norm(self, x: torch.Tensor, factors: NormFactors, eps: float, late: bool) -> torch.Tensor:
        """See `PointwiseKernel.rms_norm`."""
        x, width = x.contiguous(), x.shape[-1]
        out = torch.empty_like(x)
        if x.numel():
            with launching_on(x.device):
                norm[(x.numel() // width,)](
                    x,
                    factors.values,
                    out,
                    width,
                    width,
                    eps,
                    factors.plus,
                    LATE=late,
                    BLOCK=triton.next_power_of_2(width),
                    num_warps=4 if width <= 4096 else 8,
                )
        return out

    def add_norm(
        self, x: torch.Tensor, y: torch.Tensor, factors: NormFactors, eps: float, late: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `BlockKernel.add_norm`."""
        x, y, width = x.contiguous(), y.contiguous(), x.shape[-1]
        total, out = torch.empty_like(x), torch.empty_like(x)
        if x.numel():
            with launching_on(x.device):
                add_norm[(x.numel() // width,)](
                    x,
                    y,
                    factors.values,
                    total,
                    out,
                    width,
                    eps,
                    factors.plus,
                    LATE=late,
                    BLOCK=triton.next_power_of_2(width),
                    num_warps=4 if width <= 4096 else 8,
                )
        return total, out

    def gated_silu(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """See `BlockKernel.gated_silu`."""
        gate, up = gate.contiguous(), up.contiguous()
        out, count = torch.empty_like(gate), gate.numel()
        if count:
            with launching_on(gate.device):
                gated_silu[(ceil_div(count, _SILU_BLOCK),)](gate, up, out, count, BLOCK=_SILU_BLOCK)
        return out

    def rotate(
        self, query: torch.Tensor, key: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `PointwiseKernel.rotate`."""
        tokens, heads, dim = query.shape
        outs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key)]
        if tokens:
            with launching_on(query.device):
                rotate[(tokens, 2)](
                    query,
                    key,
                    *outs,
                    cosines,
                    sines,
                    query.stride(0),
                    query.stride(1),
                    key.stride(0),
                    key.stride(1),
                    HEADS=heads,
                    KEY_HEADS=key.shape[1],
                    HALF=dim // 2,
                    BLOCK_HEADS=triton.next_power_of_2(max(heads, key.shape[1])),
                    BLOCK_HALF=triton.next_power_of_2(dim // 2),
                    enable_fp_fusion=False,  # see `rotated_halves`
                )
        return outs[0], outs[1]


@cache
def triton_pointwise(device: torch.device) -> TritonPointwise | None:
    """Return the kernels if they compile for a device and agree with torch there; else None, with one warning."""
    kernel = TritonPointwise()
    reason = failure_of(lambda: disagreement_with_torch(kernel, device) or blocks_disagree_with_torch(kernel, device))
    if reason is None:
        return kernel
    name = torch.cuda.get_device_name(device)
    logger.warning(
        "Norms and rotary embeddings run unfused and slower on %s, since the Triton kernel failed: %s.", name, reason
    )
    return None
