"""Counter-based random numbers: equal counters and keys give equal bits on every device, in any order.

Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), in 64-bit integer
tensor operations. There is no generator state to share, save or restore.
"""

from __future__ import annotations

import torch

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_ROUNDS = 10


def philox(counter: tuple[torch.Tensor, ...], key: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Compute four 32-bit words for each counter.

    Args:
        counter: four int64 tensors that broadcast to one shape, values in [0, 2**32).
        key: two such tensors.

    Returns:
        Four int64 tensors of the broadcast shape, values in [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The product wraps around in int64, but its low and high words are correct.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def gumbel(count: int, keys: torch.Tensor, samples: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Compute standard Gumbel noise for each row.

    Args:
        count: numbers per row.
        keys: [B, 2] int64, two 32-bit words derived from the seed and the row id.
        samples: [B] int64, index of the sample.
        positions: [B] int64, index of the token in the completion.

    Returns:
        [B, count] float64.
    """
    blocks = torch.arange((count + 3) // 4, device=keys.device)[None]
    zero = torch.zeros_like(blocks)
    words = philox((blocks, positions[:, None], samples[:, None], zero), (keys[:, :1], keys[:, 1:]))
    bits = torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(1)[:, :count]
    uniform = (bits.double() + 0.5) * 2.0**-32
    return -torch.log(-torch.log(uniform))
