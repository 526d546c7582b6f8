"""Top-p on a GPU without sorting, copying or synchronizing: a Triton kernel finds the threshold digit by digit.

A row's threshold is its largest logit such that the logits not below it have enough mass. That mass falls as the logit
rises, and the bits of a float, read as an integer (inverted for negative floats), rise with the float. So each pass
over the row sums the mass above 16 candidates, which fixes four bits of the threshold: four passes for half precision,
eight for float32. Logits are read in their own dtype.

Wider digits would read less and take longer: a pass of 16 candidates already computes more than it loads.

Several programs share a row, each a part of fixed size. They write their sums to memory, and the next pass adds them up
in order. So there are no atomics, and neither the batch nor the device changes a row's bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from rollout.models.arrays import ceil_div
from rollout.models.device import launching_on

BLOCK = 512
"""Logits that a program loads at once."""
PART_BLOCKS = 32
"""Blocks of one program."""
_WARPS = 4
_DIGIT_BITS = 4
_CANDIDATES = tl.constexpr(1 << _DIGIT_BITS)
_DIGIT_BITS_IN_KERNEL = tl.constexpr(_DIGIT_BITS)


class _Order(NamedTuple):
    """How the bits of a float dtype are ordered as integers."""

    bits: int
    minus_infinity: int
    """Ordered bits of minus infinity; only NaN lie below."""


ORDERS = {
    torch.float32: _Order(32, ~0x7F800000),
    torch.bfloat16: _Order(16, ~0x7F80),
    torch.float16: _Order(16, ~0x7C00),
}


@triton.jit
def _lowest(first_masses, wanted, done, parts, BITS: tl.constexpr, ALL_PARTS: tl.constexpr):
    """Return the lowest threshold that is left after ``done`` passes, in ordered bits."""
    candidate = tl.arange(0, _CANDIDATES)
    part = tl.arange(0, ALL_PARTS)[:, None]
    found = tl.full((), -(1 << (BITS - 1)), tl.int32)
    enough = tl.full((), 0.0, tl.float32)
    for digit in range(done):
        places = (digit * parts + part) * _CANDIDATES + candidate[None]
        mass = tl.sum(tl.load(first_masses + places, mask=part < parts, other=0.0), 0)
        if digit == 0:
            # The first candidate is the lowest integer, so its mass is all of it.
            enough = wanted * tl.sum(tl.where(candidate == 0, mass, 0.0), 0)
        reached = tl.sum(((mass >= enough) & (candidate > 0)).to(tl.int32), 0)
        found += reached << (BITS - _DIGIT_BITS_IN_KERNEL * (digit + 1))
    return found


@triton.jit(do_not_specialize=["done", "parts", "passes"])
def sum_masses(
    logits,
    temperatures,
    largest,
    floors,
    top_p,
    masses,
    logits_row,
    vocabulary,
    done,
    parts,
    passes,
    BITS: tl.constexpr,
    PART_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALL_PARTS: tl.constexpr,
):
    """Sum, over one part of a row, the mass of logits not below each of 16 candidates for its threshold."""
    row = tl.program_id(0)
    wanted = tl.load(top_p + row)
    if wanted >= 1.0:
        return
    temperature = tl.load(temperatures + row)
    scale = tl.where(temperature > 0, temperature, 1.0)
    top = tl.math.div_rn(tl.load(largest + row).to(tl.float32), scale)
    floor = tl.load(floors + row)
    row_masses = masses + row.to(tl.int64) * passes * parts * _CANDIDATES
    lowest = _lowest(row_masses, wanted, done, parts, BITS, ALL_PARTS)
    candidate = tl.arange(0, _CANDIDATES)
    trials = lowest + (candidate << (BITS - _DIGIT_BITS_IN_KERNEL * (done + 1)))

    part = tl.program_id(1)
    row_logits = logits + row.to(tl.int64) * logits_row
    totals = tl.zeros((_CANDIDATES, BLOCK), tl.float32)
    for block in range(part * PART_BLOCKS, tl.minimum((part + 1) * PART_BLOCKS, tl.cdiv(vocabulary, BLOCK))):
        at = block * BLOCK + tl.arange(0, BLOCK)
        given = tl.load(row_logits + at, mask=at < vocabulary, other=float("-inf"))
        # Negative zero equals zero, so it gets the same bits.
        given = tl.where(given == 0.0, 0.0, given)
        bits = given.to(tl.int32, bitcast=True) if BITS == 32 else given.to(tl.int16, bitcast=True).to(tl.int32)
        ordered = tl.where(bits < 0, bits ^ ((1 << (BITS - 1)) - 1), bits)
        scores = tl.math.div_rn(given.to(tl.float32), scale)
        mass = tl.where(scores >= floor, tl.exp(scores - top), 0.0)
        totals += tl.where(ordered[None] >= trials[:, None], mass[None], 0.0)
    places = (done * parts + part) * _CANDIDATES + candidate
    tl.store(row_masses + places, tl.sum(totals, 1))


@triton.jit(do_not_specialize=["parts", "passes"])
def find(
    temperatures,
    top_p,
    masses,
    out,
    parts,
    passes,
    logit_dtype: tl.constexpr,
    BITS: tl.constexpr,
    MINUS_INFINITY: tl.constexpr,
    ALL_PARTS: tl.constexpr,
):
    """Compute a row's threshold as a score, from the masses of all passes; minus infinity where top_p is off."""
    row = tl.program_id(0)
    wanted = tl.load(top_p + row)
    threshold = tl.full((), float("-inf"), tl.float32)
    if wanted < 1.0:
        temperature = tl.load(temperatures + row)
        scale = tl.where(temperature > 0, temperature, 1.0)
        row_masses = masses + row.to(tl.int64) * passes * parts * _CANDIDATES
        found = _lowest(row_masses, wanted, passes, parts, BITS, ALL_PARTS)
        bits = tl.where(found < 0, found ^ ((1 << (BITS - 1)) - 1), found)
        if BITS == 32:
            logit = bits.to(tl.float32, bitcast=True)
        else:
            logit = bits.to(tl.int16).to(logit_dtype, bitcast=True).to(tl.float32)
        threshold = tl.where(found < MINUS_INFINITY, float("-inf"), tl.math.div_rn(logit, scale))
    tl.store(out + row, threshold)


LOGIT_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def threshold(
    logits: torch.Tensor, temperatures: torch.Tensor, top_p: torch.Tensor, floors: torch.Tensor
) -> torch.Tensor:
    """Return the thresholds [B] of logits [B, V] on a GPU, see `rollout.models.sampling.top_p.top_p_threshold`."""
    if logits.dtype not in ORDERS:
        logits = logits.float()
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    rows, vocabulary = logits.shape
    order, device = ORDERS[logits.dtype], logits.device
    passes = order.bits // _DIGIT_BITS
    block = min(BLOCK, triton.next_power_of_2(vocabulary))
    parts = ceil_div(vocabulary, block * PART_BLOCKS)
    all_parts = triton.next_power_of_2(parts)
    largest = logits.amax(-1)
    masses = torch.empty((rows, passes, parts, _CANDIDATES.value), dtype=torch.float32, device=device)
    out = torch.empty(rows, dtype=torch.float32, device=device)
    with launching_on(device):
        for done in range(passes):
            sum_masses[(rows, parts)](
                logits,
                temperatures,
                largest,
                floors,
                top_p,
                masses,
                logits.stride(0),
                vocabulary,
                done,
                parts,
                passes,
                BITS=order.bits,
                PART_BLOCKS=PART_BLOCKS,
                BLOCK=block,
                ALL_PARTS=all_parts,
                num_warps=_WARPS,
            )
        find[(rows,)](
            temperatures,
            top_p,
            masses,
            out,
            parts,
            passes,
            logit_dtype=LOGIT_DTYPES[logits.dtype],
            BITS=order.bits,
            MINUS_INFINITY=order.minus_infinity,
            ALL_PARTS=all_parts,
            num_warps=1,
        )
    return out
