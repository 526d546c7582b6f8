"""Gumbel-max sampling on a GPU by two Triton kernels.

Tensor operations need about two hundred small launches, most of them for Philox, and several float32 copies of the
logits. Each row is computed independently and in a fixed order, so the batch composition does not change its bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rollout.models.arrays import ceil_div
from rollout.models.device import launching_on
from rollout.models.sampling.base import BLOCK, Draws

BLOCKS = 8
"""Vocabulary blocks per program of `sum_blocks`."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def sum_blocks(
    logits,
    temperatures,
    thresholds,
    sums,
    maxima,
    logits_row,
    vocabulary,
    blocks,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute log-sum-exp and maximum of each block of a row's scores, of those not below its threshold.

    Scores are logits [rows, vocabulary] over the temperature (1 where it is 0). Thresholds may be None.
    """
    row = tl.program_id(0)
    temperature = tl.load(temperatures + row)
    scale = tl.where(temperature > 0, temperature, 1.0)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    at = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    given = tl.load(logits + row.to(tl.int64) * logits_row + at, mask=at < vocabulary, other=float("-inf"))
    scores = tl.math.div_rn(given.to(tl.float32), scale)
    if thresholds is not None:
        scores = tl.where(scores < tl.load(thresholds + row), float("-inf"), scores)
    largest = tl.max(scores, 1)
    # A block of minus infinities only would give NaN as their difference.
    origin = tl.where(largest == float("-inf"), 0.0, largest)
    total = origin + tl.log(tl.sum(tl.exp(scores - origin[:, None]), 1))
    tl.store(sums + row * blocks + block, total, mask=block < blocks)
    tl.store(maxima + row * blocks + block, largest, mask=block < blocks)


@triton.jit
def draw(
    logits,
    temperatures,
    thresholds,
    keys,
    samples,
    positions,
    sums,
    maxima,
    tokens,
    logprobs,
    totals,
    logits_row,
    vocabulary,
    blocks,
    BLOCK: tl.constexpr,
    ALL_BLOCKS: tl.constexpr,
):
    """Sample a row's token: first its block by block sums and noise, then the token by scores and noise."""
    row = tl.program_id(0)
    temperature = tl.load(temperatures + row)
    sampled = temperature > 0
    scale = tl.where(sampled, temperature, 1.0)
    seed = tl.load(keys + 2 * row) | (tl.load(keys + 2 * row + 1) << 32)
    sample = tl.load(samples + row).to(tl.uint32)
    position = tl.load(positions + row).to(tl.uint32)

    block = tl.arange(0, ALL_BLOCKS)
    valid = block < blocks
    row_sums = tl.load(sums + row * blocks + block, mask=valid, other=float("-inf"))
    row_maxima = tl.load(maxima + row * blocks + block, mask=valid, other=float("-inf"))
    top = tl.max(row_sums, 0)
    origin = tl.where(top == float("-inf"), 0.0, top)
    total = origin.to(tl.float64) + tl.log(tl.sum(tl.exp((row_sums - origin).to(tl.float64)), 0))

    noise = _gumbel(block, seed, position, sample)
    values = tl.where(sampled, row_sums.to(tl.float64) + noise, row_maxima.to(tl.float64))
    # argmax of NaN is undefined. An index out of range would crash the device when the token is looked up.
    winner = tl.minimum(tl.argmax(tl.where(valid, values, float("-inf")), 0), blocks - 1)

    inside = tl.arange(0, BLOCK)
    first = logits + row.to(tl.int64) * logits_row
    given = tl.load(first + winner * BLOCK + inside, mask=winner * BLOCK + inside < vocabulary, other=float("-inf"))
    scores = tl.math.div_rn(given.to(tl.float32), scale)
    if thresholds is not None:
        scores = tl.where(scores < tl.load(thresholds + row), float("-inf"), scores)
    scores = scores.to(tl.float64)
    noise = _gumbel(blocks + inside, seed, position, sample)
    offset = tl.argmax(tl.where(sampled, scores + noise, scores), 0)
    token = tl.minimum(winner * BLOCK + offset, vocabulary - 1)
    chosen = tl.math.div_rn(tl.load(first + token).to(tl.float32), scale).to(tl.float64)
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(logprobs + row, (chosen - total).to(tl.float32))
    tl.store(totals + row, total)


@triton.jit
def _gumbel(index, seed, position, sample):
    """Compute number ``index`` of `rollout.models.sampling.philox.gumbel` in float64."""
    counter = (index // 4).to(tl.uint32)
    zero = tl.zeros_like(counter)
    first, second, third, fourth = tl.philox(seed, counter, zero + position, zero + sample, zero)
    word = index % 4
    bits = tl.where(word < 2, tl.where(word == 0, first, second), tl.where(word == 2, third, fourth))
    uniform = (bits.to(tl.float64) + 0.5) * 2.3283064365386963e-10  # 2**-32
    return -tl.log(-tl.log(uniform))


class TritonGumbelMax:
    """Gumbel-max for tensors on a GPU; never synchronizes with the device."""

    def draw(
        self,
        logits: torch.Tensor,
        temperatures: torch.Tensor,
        keys: torch.Tensor,
        samples: torch.Tensor,
        positions: torch.Tensor,
        thresholds: torch.Tensor | None = None,
    ) -> Draws:
        """Draw a token for each row, see `GumbelKernel.draw`."""
        rows, vocabulary = logits.shape
        if logits.dtype not in _DTYPES:
            logits = logits.float()
        logits = logits if logits.stride(-1) == 1 else logits.contiguous()
        temperatures, keys, samples, positions = (x.contiguous() for x in (temperatures, keys, samples, positions))
        blocks, device = ceil_div(vocabulary, BLOCK), logits.device
        sums, maxima = torch.empty((2, rows, blocks), dtype=torch.float32, device=device)
        draws = Draws(
            tokens=torch.empty(rows, dtype=torch.int64, device=device),
            logprobs=torch.empty(rows, dtype=torch.float32, device=device),
            log_sums=torch.empty(rows, dtype=torch.float64, device=device),
        )
        sizes = {"logits_row": logits.stride(0), "vocabulary": vocabulary, "blocks": blocks}
        with launching_on(device):
            sum_blocks[(rows, ceil_div(blocks, BLOCKS))](
                logits, temperatures, thresholds, sums, maxima, **sizes, BLOCKS=BLOCKS, BLOCK=BLOCK
            )
            draw[(rows,)](
                logits,
                temperatures,
                thresholds,
                keys,
                samples,
                positions,
                sums,
                maxima,
                draws.tokens,
                draws.logprobs,
                draws.log_sums,
                **sizes,
                BLOCK=BLOCK,
                ALL_BLOCKS=triton.next_power_of_2(blocks),
            )
        return draws
