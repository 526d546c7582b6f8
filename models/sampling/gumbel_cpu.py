"""Gumbel-max sampling on a CPU by the compiled kernel ``gumbel_max.c``."""

from __future__ import annotations

import ctypes
from ctypes import Structure, byref, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch

from rollout.models.arrays import ceil_div
from rollout.models.csrc.build import KernelUnavailable, try_build
from rollout.models.csrc.threads import parallel
from rollout.models.sampling.base import BLOCK, Draws, scores_above

_SOURCE = Path(__file__).parents[1] / "csrc" / "gumbel_max.c"
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_TOLERANCE = 1e-5
"""Largest difference from torch's log-probabilities in the self-test."""


class _Batch(Structure):
    """The struct of the same name in ``gumbel_max.c``."""

    _fields_ = (
        [(name, c_int64) for name in ("rows", "vocabulary", "dtype")]
        + [(name, c_void_p) for name in ("logits", "temperatures", "keys", "samples", "positions", "sums")]
        + [(name, c_void_p) for name in ("tokens", "totals", "logprobs", "parallel")]
        + [(name, c_int64) for name in ("threads", "next")]
    )


class GumbelMax:
    """The loaded kernel.

    Args:
        library: the shared library compiled from ``gumbel_max.c``.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._sample = library.rollout_sample
        self._sample.argtypes = [c_void_p]
        self._sample.restype = None
        self._parallel = parallel()

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
        if thresholds is not None:
            logits, temperatures = scores_above(logits, temperatures, thresholds), (temperatures > 0).float()
        if logits.dtype not in _DTYPES:
            logits = logits.float()
        # Contiguous copies need a name: they must live until the kernel returns.
        logits, temperatures, keys, samples, positions = (
            x.contiguous() for x in (logits, temperatures, keys, samples, positions)
        )
        block_sums = torch.empty((rows, ceil_div(vocabulary, BLOCK)), dtype=torch.float64)
        draws = Draws(
            tokens=torch.empty(rows, dtype=torch.int64),
            logprobs=torch.empty(rows, dtype=torch.float32),
            log_sums=torch.empty(rows, dtype=torch.float64),
        )
        batch = _Batch(
            rows=rows,
            vocabulary=vocabulary,
            dtype=_DTYPES[logits.dtype],
            logits=logits.data_ptr(),
            temperatures=temperatures.data_ptr(),
            keys=keys.data_ptr(),
            samples=samples.data_ptr(),
            positions=positions.data_ptr(),
            sums=block_sums.data_ptr(),
            tokens=draws.tokens.data_ptr(),
            totals=draws.log_sums.data_ptr(),
            logprobs=draws.logprobs.data_ptr(),
            parallel=self._parallel,
            threads=torch.get_num_threads(),
            next=0,
        )
        self._sample(byref(batch))
        return draws


@cache
def gumbel_max() -> GumbelMax | None:
    """Return the kernel, compiled on its first use on this machine; None after one warning if it is unavailable."""
    return try_build(_SOURCE, _checked)


def _checked(library: ctypes.CDLL) -> GumbelMax:
    """Return the kernel if it samples two rows like torch.

    Raises:
        KernelUnavailable: a token or a log-probability differs.
    """
    kernel = GumbelMax(library)
    vocabulary = 700
    logits = torch.arange(2 * vocabulary).mul(0.37).sin().mul(5).view(2, vocabulary)
    zeros = torch.zeros(2, dtype=torch.int64)
    draws = kernel.draw(
        logits,
        temperatures=torch.tensor([0.0, 0.5]),
        keys=torch.ones(2, 2, dtype=torch.int64),
        samples=zeros,
        positions=zeros,
    )
    expected = (logits / torch.tensor([[1.0], [0.5]])).log_softmax(-1)
    chosen = expected.gather(1, draws.tokens.clamp(0, vocabulary - 1)[:, None])[:, 0]
    if int(draws.tokens[0]) != int(logits[0].argmax()):
        raise KernelUnavailable("the compiled kernel does not draw the largest logit at temperature 0.")
    if not torch.allclose(draws.logprobs, chosen, atol=_TOLERANCE):
        difference = float((draws.logprobs - chosen).abs().max())
        raise KernelUnavailable(
            f"the log-probabilities of the compiled kernel differ by {difference:.2g} from torch's "
            f"(tolerance {_TOLERANCE})."
        )
    return kernel
