"""Rows from memory: Algorithm 1 of arXiv 2503.05248, as intended."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import NormalDist
from typing import Literal, get_args

from rollout.batcher.estimators.length_moments import LengthMoments, Moments
from rollout.batcher.types import Bounds, Decision, Observation, decoding_rows, prefilling_rows, within

Form = Literal["buffer", "eq12"]

# Lengths grow by a token a decision: estimating them at each one costs more than it tells.
_DECISIONS_PER_ESTIMATE = 16


def rows_by_eq12(eta: int, lengths: Moments, theta: float) -> int:
    """Most rows b with mu*b + theta*sigma*sqrt(b) <= eta: equation 12.

    Printed with the moments of the sum of all rows, the equation has the wrong dimension; it is right with
    mu and sigma of one row, which is what ``lengths`` holds.

    Args:
        eta: tokens that memory can hold.
        lengths: moments of one row.
        theta: standard normal quantile of 1 - epsilon_M, the accepted probability of overflow.
    """
    mu = _positive(lengths.mean)
    spread = theta * lengths.sd
    # (sqrt(s^2 + 4*mu*eta) - s) / (2*mu), written without the difference, which cancels when s is large.
    root = 2 * eta / (math.sqrt(spread**2 + 4 * mu * eta) + spread) if eta > 0 else 0.0
    rows = math.floor(root**2)
    # The root is rounded, which must not cost the row that just fits.
    return rows + (mu * (rows + 1) + spread * math.sqrt(rows + 1) <= eta)


def rows_by_buffer(eta: int, lengths: Moments, theta: float, rows: int) -> int:
    """Most rows b with eta - mu*b >= L0: equations 13 and 14, with L0 = theta*sigma_S.

    The paper prints L0 = eta - (theta*sigma_S + mu_S). That makes equation 13 empty (0 >= -theta*sigma_S) and
    line 5 grow b at every refresh up to B_max. A buffer of theta standard deviations is what equation 10 asks
    for; sigma_S = sigma*sqrt(rows) is the deviation of the sum over the last batch (equation 9).

    The fixed point is equation 12's bound. Repeated calls reach it while theta*sigma < 2*mu*sqrt(b); with
    fewer and more varied rows they swing about it, which is why equation 12 is the default.

    Args:
        eta: tokens that memory can hold.
        lengths: moments of one row.
        theta: standard normal quantile of 1 - epsilon_M.
        rows: the last batch size, b_{t-1}.
    """
    buffer = theta * lengths.sd * math.sqrt(rows)
    return math.floor((eta - buffer) / _positive(lengths.mean))


def _positive(mean: float) -> float:
    # A row holds at least one token, whatever the estimate says.
    return max(mean, 1.0)


class MemoryPolicy:
    """As many rows as fit in memory at their final lengths, but for a probability of overflow.

    Algorithm 1, refreshed at each decision in which rows decode and rows wait for prefill (line 4); otherwise
    the last size holds. Where the paper leaves room or is wrong:

    - Equation 12 takes the moments of one row, and L0 is theta*sigma_S (see the two functions above).
    - Each row is charged its final length, as printed. Rows that started at different times hold less on
      average, so the batch is smaller than memory allows when lengths vary little. Samples that share a
      prompt are charged for it once each.
    - The moments are learned (``LengthMoments``) and estimated again every 16 refreshes; the paper takes them
      as given, "updated online periodically".
    - The floor N^d and the bounds also apply when the last size holds.
    - The first size, which the paper does not give, is ``max_rows``, as in the authors' release.

    Reasons: ``memory``, ``cap`` (memory has room for ``max_rows``), ``running`` (kept up by rows in decode),
    ``hold`` (no refresh).

    Args:
        bounds: what the user allows.
        epsilon_m: accepted probability that the live rows outgrow memory, between 0 and 1.
        form: ``eq12``, or ``buffer`` for equations 13 and 14.
        length_window: finished rows that the moments remember.

    Raises:
        ValueError: a parameter is out of range.
    """

    def __init__(self, bounds: Bounds, epsilon_m: float = 0.05, form: Form = "eq12", length_window: int = 1024) -> None:
        if not 0 < epsilon_m < 1:
            raise ValueError(f"epsilon_m must be between 0 and 1, both excluded, not {epsilon_m}.")
        if form not in get_args(Form):
            raise ValueError(f"form must be one of {', '.join(get_args(Form))}, not {form!r}.")
        self._bounds = bounds
        self._theta = NormalDist().inv_cdf(1 - epsilon_m)
        self._form = form
        self._lengths = LengthMoments(length_window)
        self._moments: Moments | None = None
        self._refreshes = 0
        self._rows = bounds.max_rows

    def decide(self, observation: Observation) -> Decision:
        self._lengths.update(observation.finished)
        wanted = None
        if decoding_rows(observation) and prefilling_rows(observation):
            wanted = self._fitting_rows(observation)
        self._rows = within(self._rows if wanted is None else wanted, observation, self._bounds)
        return Decision(self._rows, self._bounds.prefill_tokens, self._reason(wanted, observation))

    def _fitting_rows(self, observation: Observation) -> int:
        if self._moments is None or self._refreshes % _DECISIONS_PER_ESTIMATE == 0:
            self._moments = self._lengths.estimate(observation)
        self._refreshes += 1
        # A recurrent state takes room as so many tokens more in every prompt would.
        state = observation.tokens_per_row
        moments = replace(self._moments, prompt_mean=self._moments.prompt_mean + state) if state else self._moments
        eta = observation.kv_tokens_total
        if self._form == "eq12":
            return rows_by_eq12(eta, moments, self._theta)
        return rows_by_buffer(eta, moments, self._theta, self._rows)

    def _reason(self, wanted: int | None, observation: Observation) -> str:
        if wanted is None:
            return "hold"
        if wanted >= self._bounds.max_rows:
            return "cap"
        return "running" if wanted < decoding_rows(observation) else "memory"
