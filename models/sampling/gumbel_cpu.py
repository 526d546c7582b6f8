"""Gumbel-max sampling on a CPU by a compiled kernel, ``gumbel_max.c``: the draws of
`rollout.models.sampling.sampler`."""

from __future__ import annotations

import ctypes
from ctypes import Structure, byref, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch

from rollout.models.csrc.build import KernelUnavailable, gomp_parallel, try_build

_SOURCE = Path(__file__).parents[1] / "csrc" / "gumbel_max.c"
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_BLOCK = 256


class _Batch(Structure):
    _fields_ = (
        [(name, c_int64) for name in ("rows", "vocabulary", "dtype")]
        + [(name, c_void_p) for name in ("logits", "temperatures", "keys", "samples", "positions", "sums")]
        + [(name, c_void_p) for name in ("tokens", "totals", "logprobs", "parallel")]
        + [(name, c_int64) for name in ("threads", "next")]
    )


class GumbelMax:
    """The loaded kernel.

    Args:
        library: with the entry point of ``gumbel_max.c``.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._sample = library.rollout_sample
        self._sample.argtypes, self._sample.restype = [c_void_p], None
        self._parallel = gomp_parallel()

    def draw(
        self,
        logits: torch.Tensor,
        temperatures: torch.Tensor,
        keys: torch.Tensor,
        samples: torch.Tensor,
        positions: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A token for each row, its log-probability, and the row's log-sum: int64, float32 and float64 [B].

        Args:
            logits: [B, V] on a CPU.
            temperatures: float32 [B]; 0 is greedy.
            keys: int64 [B, 2], and samples, positions: int64 [B], see `rollout.models.sampling.philox.gumbel`.
        """
        rows, vocabulary = logits.shape
        if logits.dtype not in _DTYPES:
            logits = logits.float()
        # Held by name until the kernel has returned.
        logits, temperatures, keys, samples, positions = (
            x.contiguous() for x in (logits, temperatures, keys, samples, positions)
        )
        sums = torch.empty((rows, -(-vocabulary // _BLOCK)), dtype=torch.float64)
        tokens, totals = torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.float64)
        logprobs = torch.empty(rows, dtype=torch.float32)
        given = (logits, temperatures, keys, samples, positions, sums, tokens, totals, logprobs)
        addresses = (x.data_ptr() for x in given)
        sizes = (rows, vocabulary, _DTYPES[logits.dtype])
        self._sample(byref(_Batch(*sizes, *addresses, self._parallel, torch.get_num_threads(), 0)))
        return tokens, logprobs, totals


@cache
def gumbel_max() -> GumbelMax | None:
    """The kernel, built if this is its first use on this machine; None, with one warning, where there is none."""
    return try_build(_SOURCE, _checked)


def _checked(library: ctypes.CDLL) -> GumbelMax:
    """The kernel, if two rows of it are torch's.

    Raises:
        KernelUnavailable: they differ.
    """
    kernel = GumbelMax(library)
    vocabulary = 700
    logits = torch.arange(2 * vocabulary).mul(0.37).sin().mul(5).view(2, vocabulary)
    zeros = torch.zeros(2, dtype=torch.int64)
    tokens, logprobs, _ = kernel.draw(
        logits, torch.tensor([0.0, 0.5]), torch.ones(2, 2, dtype=torch.int64), zeros, zeros
    )
    expected = (logits / torch.tensor([[1.0], [0.5]])).log_softmax(-1)
    chosen = expected.gather(1, tokens.clamp(0, vocabulary - 1)[:, None])[:, 0]
    if int(tokens[0]) != int(logits[0].argmax()) or not torch.allclose(logprobs, chosen, atol=1e-5):
        raise KernelUnavailable("what the compiler built computes something else.")
    return kernel
