"""Gumbel-max sampling on a GPU by two Triton kernels: the draws of `rollout.models.sampling.sampler`.

As tensor operations they are some two hundred launches, each over little, nearly all of them for Philox, and several
copies of the logits in float32. A row is computed by itself, in an order of its own: its company changes no bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rollout.models.device import launching_on

BLOCK = 256
"""Of the vocabulary; as in `rollout.models.sampling.sampler`, or draws would be others."""
BLOCKS = 8
"""That one program sums up."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def sum_blocks(
    logits, temperatures, sums, maxima, logits_row, vocabulary, blocks, BLOCKS: tl.constexpr, BLOCK: tl.constexpr
):
    """Of logits [rows, vocabulary] over the row's temperature, 0 being 1: each block's log-sum-exp, and its largest."""
    row = tl.program_id(0)
    temperature = tl.load(temperatures + row)
    scale = tl.where(temperature > 0, temperature, 1.0)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    at = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    given = tl.load(logits + row.to(tl.int64) * logits_row + at, mask=at < vocabulary, other=float("-inf"))
    scores = tl.math.div_rn(given.to(tl.float32), scale)
    largest = tl.max(scores, 1)
    # Where all are minus infinity, their differences would be NaN.
    origin = tl.where(largest == float("-inf"), 0.0, largest)
    total = origin + tl.log(tl.sum(tl.exp(scores - origin[:, None]), 1))
    tl.store(sums + row * blocks + block, total, mask=block < blocks)
    tl.store(maxima + row * blocks + block, largest, mask=block < blocks)


@triton.jit
def draw(
    logits,
    temperatures,
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
    """A row's token: its block by the blocks' sums and noise, then its place in there by scores and noise."""
    row = tl.program_id(0)
    temperature = tl.load(temperatures + row)
    drawn = temperature > 0
    scale = tl.where(drawn, temperature, 1.0)
    seed = tl.load(keys + 2 * row) | (tl.load(keys + 2 * row + 1) << 32)
    sample = tl.load(samples + row).to(tl.uint32)
    position = tl.load(positions + row).to(tl.uint32)

    block = tl.arange(0, ALL_BLOCKS)
    real = block < blocks
    its_sums = tl.load(sums + row * blocks + block, mask=real, other=float("-inf"))
    its_maxima = tl.load(maxima + row * blocks + block, mask=real, other=float("-inf"))
    top = tl.max(its_sums, 0)
    origin = tl.where(top == float("-inf"), 0.0, top)
    total = origin.to(tl.float64) + tl.log(tl.sum(tl.exp((its_sums - origin).to(tl.float64)), 0))

    noise = _gumbel(block, seed, position, sample)
    values = tl.where(drawn, its_sums.to(tl.float64) + noise, its_maxima.to(tl.float64))
    # Of NaN alone none is the largest: the token must be one all the same, or looking it up takes the device down.
    winner = tl.minimum(tl.argmax(tl.where(real, values, float("-inf")), 0), blocks - 1)

    inside = tl.arange(0, BLOCK)
    first = logits + row.to(tl.int64) * logits_row
    given = tl.load(first + winner * BLOCK + inside, mask=winner * BLOCK + inside < vocabulary, other=float("-inf"))
    scores = tl.math.div_rn(given.to(tl.float32), scale).to(tl.float64)
    noise = _gumbel(blocks + inside, seed, position, sample)
    place = tl.argmax(tl.where(drawn, scores + noise, scores), 0)
    token = tl.minimum(winner * BLOCK + place, vocabulary - 1)
    chosen = tl.math.div_rn(tl.load(first + token).to(tl.float32), scale).to(tl.float64)
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(logprobs + row, (chosen - total).to(tl.float32))
    tl.store(totals + row, total)


@triton.jit
def _gumbel(index, seed, position, sample):
    """The ``index``-th numbers of `rollout.models.sampling.philox.gumbel`, float64."""
    counter = (index // 4).to(tl.uint32)
    zero = tl.zeros_like(counter)
    first, second, third, fourth = tl.philox(seed, counter, zero + position, zero + sample, zero)
    word = index % 4
    bits = tl.where(word < 2, tl.where(word == 0, first, second), tl.where(word == 2, third, fourth))
    uniform = (bits.to(tl.float64) + 0.5) * 2.3283064365386963e-10  # 2**-32
    return -tl.log(-tl.log(uniform))


class TritonGumbelMax:
    """As `rollout.models.sampling.gumbel_cpu.GumbelMax`, for tensors on a GPU; waits for nothing."""

    def draw(
        self,
        logits: torch.Tensor,
        temperatures: torch.Tensor,
        keys: torch.Tensor,
        samples: torch.Tensor,
        positions: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `GumbelMax.draw`."""
        rows, vocabulary = logits.shape
        if logits.dtype not in _DTYPES:
            logits = logits.float()
        logits = logits if logits.stride(-1) == 1 else logits.contiguous()
        temperatures, keys, samples, positions = (x.contiguous() for x in (temperatures, keys, samples, positions))
        blocks, device = -(-vocabulary // BLOCK), logits.device
        sums, maxima = torch.empty((2, rows, blocks), dtype=torch.float32, device=device)
        tokens = torch.empty(rows, dtype=torch.int64, device=device)
        logprobs = torch.empty(rows, dtype=torch.float32, device=device)
        totals = torch.empty(rows, dtype=torch.float64, device=device)
        sizes = (logits.stride(0), vocabulary, blocks)
        with launching_on(device):
            sum_blocks[(rows, -(-blocks // BLOCKS))](
                logits, temperatures, sums, maxima, *sizes, BLOCKS=BLOCKS, BLOCK=BLOCK
            )
            draw[(rows,)](
                logits,
                temperatures,
                keys,
                samples,
                positions,
                sums,
                maxima,
                tokens,
                logprobs,
                totals,
                *sizes,
                BLOCK=BLOCK,
                ALL_BLOCKS=triton.next_power_of_2(blocks),
            )
        return tokens, logprobs, totals
