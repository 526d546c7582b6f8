"""Top-p on a GPU without sorting or synchronizing: a Triton kernel that finds the threshold by binary search on bits.

A row's threshold is its largest score such that the scores not below it have enough mass. That mass falls as the
score rises, and the bits of a float, read as an integer (inverted for negative floats), rise with the float. So 32
passes over the row, one per bit, find the threshold for any scores. One program reads a row in a fixed order, so the
batch composition does not change its bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rollout.models.device import launching_on

BLOCK = 8192
"""Scores that a program loads at once."""
_WARPS = 16

_LOWEST = tl.constexpr(-(1 << 31))
_LOWEST_FLOAT = tl.constexpr(-2139095041)
"""Ordered bits of minus infinity; only NaN lie below."""
_ALL_BUT_SIGN = tl.constexpr((1 << 31) - 1)


@triton.jit
def search(scores, top_p, out, row_scores, vocabulary, BLOCK: tl.constexpr):
    """Find the threshold of each row of ``scores`` for its ``top_p``; minus infinity where top_p is off."""
    row = tl.program_id(0)
    wanted = tl.load(top_p + row)
    threshold = tl.full((), float("-inf"), tl.float32)
    if wanted < 1.0:
        first = scores + row.to(tl.int64) * row_scores
        highest = tl.full((BLOCK,), float("-inf"), tl.float32)
        for start in range(0, vocabulary, BLOCK):
            at = start + tl.arange(0, BLOCK)
            highest = tl.maximum(highest, tl.load(first + at, mask=at < vocabulary, other=float("-inf")))
        top = tl.max(highest, 0)
        mass = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, vocabulary, BLOCK):
            at = start + tl.arange(0, BLOCK)
            mass += tl.exp(tl.load(first + at, mask=at < vocabulary, other=float("-inf")) - top)
        enough = wanted * tl.sum(mass, 0)
        found = tl.full((), _LOWEST, tl.int32)
        for bit in range(32):
            # The first bit is the sign; setting it leads from the lowest integer to zero.
            tried = tl.where(bit > 0, found + (1 << tl.minimum(31 - bit, 30)), 0)
            mass = tl.zeros((BLOCK,), tl.float32)
            for start in range(0, vocabulary, BLOCK):
                at = start + tl.arange(0, BLOCK)
                score = tl.load(first + at, mask=at < vocabulary, other=float("-inf"))
                # Negative zero equals zero, so it gets the same bits.
                bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
                ordered = tl.where(bits < 0, bits ^ _ALL_BUT_SIGN, bits)
                mass += tl.where(ordered >= tried, tl.exp(score - top), 0.0)
            found = tl.where(tl.sum(mass, 0) >= enough, tried, found)
        bits = tl.where(found < 0, found ^ _ALL_BUT_SIGN, found)
        threshold = tl.where(found < _LOWEST_FLOAT, float("-inf"), bits.to(tl.float32, bitcast=True))
    tl.store(out + row, threshold)


def threshold(scores: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Return the thresholds [B, 1] of scores [B, V] and top_p [B] in float32, see `top_p_threshold`."""
    scores = scores if scores.stride(-1) == 1 else scores.contiguous()
    out = torch.empty(len(scores), 1, dtype=torch.float32, device=scores.device)
    block = min(BLOCK, triton.next_power_of_2(scores.shape[1]))
    with launching_on(scores.device):
        search[(len(scores),)](scores, top_p, out, scores.stride(0), scores.shape[1], BLOCK=block, num_warps=_WARPS)
    return out
