"""The rotation of heads, for Triton kernels that read them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rotated_halves(x, cosines, sines, token, head_stride, HEADS, HALF, BLOCK_HEADS, BLOCK_HALF):
    """Rotate one token's heads x [HEADS, 2 * HALF] by angles [tokens, 2 * HALF]; return the halves, unrounded sums.

    To round where torch does, launch with ``enable_fp_fusion=False``: a fused multiply-add rounds once, torch twice.
    """
    head, at = tl.arange(0, BLOCK_HEADS)[:, None], tl.arange(0, BLOCK_HALF)[None]
    inside = (head < HEADS) & (at < HALF)
    dtype = x.dtype.element_ty
    source = x + head * head_stride + at
    left = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    angles = token * 2 * HALF + at
    left_cos = tl.load(cosines + angles, mask=at < HALF, other=0.0).to(tl.float32)
    left_sin = tl.load(sines + angles, mask=at < HALF, other=0.0).to(tl.float32)
    right_cos = tl.load(cosines + angles + HALF, mask=at < HALF, other=0.0).to(tl.float32)
    right_sin = tl.load(sines + angles + HALF, mask=at < HALF, other=0.0).to(tl.float32)
    rotated_left = (left * left_cos).to(dtype).to(tl.float32) + (-right * left_sin).to(dtype).to(tl.float32)
    rotated_right = (right * right_cos).to(dtype).to(tl.float32) + (left * right_sin).to(dtype).to(tl.float32)
    return rotated_left, rotated_right


@triton.jit
def store_halves(target, left, right, HEADS, HALF, BLOCK_HEADS, BLOCK_HALF):
    """Store one token's rotated heads [HEADS, 2 * HALF], contiguous."""
    head, at = tl.arange(0, BLOCK_HEADS)[:, None], tl.arange(0, BLOCK_HALF)[None]
    inside = (head < HEADS) & (at < HALF)
    places = target + head * 2 * HALF + at
    tl.store(places, left.to(target.dtype.element_ty), mask=inside)
    tl.store(places + HALF, right.to(target.dtype.element_ty), mask=inside)
