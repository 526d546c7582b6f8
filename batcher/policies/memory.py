"""Algorithm 1 of arXiv 2503.05248: the largest batch that fits in memory at its final lengths."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from statistics import NormalDist

from rollout.batcher.estimators.length_moments import LengthMoments, Moments
from rollout.batcher.types import Bounds, Decision, Observation, decoding_rows, prefilling_rows, within

FORMS = ("buffer", "eq12")

# Between two decisions each length grows by one token, so estimating the moments at every decision is wasted time.
_DECISIONS_PER_ESTIMATE = 16


@dataclass
class MemoryParameters:
    """Parameters of Algorithm 1; the keys of ``batcher=memory``."""

    epsilon_m: float = field(
        default=0.05, metadata={"meaning": "accepted probability that the live samples outgrow memory"}
    )
    form: str = field(default="eq12", metadata={"meaning": "eq12, or buffer for equations 13 and 14"})
    length_window: int = field(
        default=1024, metadata={"meaning": "finished samples that mean and variance of lengths are learned from"}
    )


def rows_by_eq12(eta: int, lengths: Moments, theta: float) -> int:
    """Solve equation 12: return the largest b with mu*b + theta*sigma*sqrt(b) <= eta.

    The paper prints equation 12 with the moments of the sum over all rows, which has the wrong dimension. It is
    right with mu and sigma of a single row, and those are in ``lengths``.

    Args:
        eta: tokens that memory can hold.
        lengths: moments of a single row.
        theta: standard normal quantile of 1 - epsilon_M.
    """
    mu = _at_least_one_token(lengths.mean)
    spread = theta * lengths.sd
    # sqrt(b) = (sqrt(s^2 + 4*mu*eta) - s) / (2*mu), rearranged because the difference cancels for large s.
    root = 2 * eta / (math.sqrt(spread**2 + 4 * mu * eta) + spread) if eta > 0 else 0.0
    rows = math.floor(root**2)
    # Rounding of the root may lose the last row that fits.
    one_more_fits = mu * (rows + 1) + spread * math.sqrt(rows + 1) <= eta
    return rows + 1 if one_more_fits else rows


def rows_by_buffer(eta: int, lengths: Moments, theta: float, rows: int) -> int:
    """Solve equations 13 and 14: return the largest b with eta - mu*b >= L0, where L0 = theta*sigma_S.

    The paper prints L0 = eta - (theta*sigma_S + mu_S). That reduces equation 13 to 0 >= -theta*sigma_S, so line 5
    of Algorithm 1 would raise b to B_max. Equation 10 calls for a buffer of theta standard deviations, where
    sigma_S = sigma*sqrt(b_{t-1}) is the deviation of the sum over the last batch (equation 9).

    The fixed point is the solution of equation 12. Repeated calls converge to it while theta*sigma < 2*mu*sqrt(b);
    with fewer rows or more variance they oscillate around it, which is why ``eq12`` is the default.

    Args:
        eta: tokens that memory can hold.
        lengths: moments of a single row.
        theta: standard normal quantile of 1 - epsilon_M.
        rows: the last batch size, b_{t-1}.
    """
    buffer = theta * lengths.sd * math.sqrt(rows)
    return math.floor((eta - buffer) / _at_least_one_token(lengths.mean))


def _at_least_one_token(mean: float) -> float:
    return max(mean, 1.0)


def _own_share(observation: Observation) -> float:
    """Return the share of the live rows' prompt tokens that memory must hold, where shared pages count once."""
    prompts = int(observation.prompt_tokens.sum())
    if observation.shared is None or not prompts:
        return 1.0
    return 1 - observation.shared.repeated_tokens / prompts


class MemoryPolicy:
    """Run as many rows as fit in memory at their final lengths, except with probability epsilon_M.

    Algorithm 1 computes a new batch size when rows are decoding and rows are waiting for prefill (line 4), and
    keeps the last size otherwise. It differs from the paper as follows:

    - Equation 12 uses the moments of a single row, and L0 is theta*sigma_S (see the two functions above).
    - Each row is charged its final length, as in the paper. Rows of different ages hold less on average, so the
      batch is smaller than memory allows when lengths vary little. Prompts are charged as far as live rows do not
      share them, and wholly where an observation tells only groups.
    - ``LengthMoments`` learns the moments, every 16 refreshes; the paper assumes that they are given, "updated
      online periodically".
    - The floor N^d and the bounds also apply when the last size is kept.
    - The first size, which the paper does not give, is ``max_rows``, as in the authors' release.

    Reasons: ``memory``, ``cap`` (memory holds ``max_rows``), ``running`` (raised to the rows in decode), ``hold``
    (last size kept).

    Args:
        bounds: limits set by the user.
        parameters: None means the defaults.

    Raises:
        ValueError: a parameter is out of range.
    """

    def __init__(self, bounds: Bounds, parameters: MemoryParameters | None = None) -> None:
        parameters = parameters or MemoryParameters()
        if not 0 < parameters.epsilon_m < 1:
            raise ValueError(f"epsilon_m must be between 0 and 1, both excluded, not {parameters.epsilon_m}.")
        if parameters.form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, not {parameters.form!r}.")
        self._bounds = bounds
        self._theta = NormalDist().inv_cdf(1 - parameters.epsilon_m)
        self._form = parameters.form
        self._lengths = LengthMoments(parameters.length_window)
        self._moments: Moments | None = None
        self._refreshes = 0
        self._rows = bounds.max_rows

    def decide(self, observation: Observation) -> Decision:
        """Return the batch size of Algorithm 1."""
        self._lengths.learn(observation.finished)
        fitting = None
        if decoding_rows(observation) and prefilling_rows(observation):
            fitting = self._fitting_rows(observation)
        rows = self._rows if fitting is None else fitting
        self._rows = within(rows, observation, self._bounds)
        return Decision(self._rows, self._bounds.prefill_tokens, self._reason(fitting, observation))

    def _fitting_rows(self, observation: Observation) -> int:
        """Return b_t from equation 12, or from equations 13 and 14."""
        if self._moments is None or self._refreshes % _DECISIONS_PER_ESTIMATE == 0:
            self._moments = self._lengths.estimate(observation)
        self._refreshes += 1
        own = _own_share(observation)
        moments = replace(
            self._moments,
            # A recurrent state takes as much memory as that many more prompt tokens would.
            prompt_mean=own * self._moments.prompt_mean + observation.tokens_per_row,
            prompt_variance=own**2 * self._moments.prompt_variance,
        )
        eta = observation.kv_tokens_total
        if self._form == "eq12":
            return rows_by_eq12(eta, moments, self._theta)
        return rows_by_buffer(eta, moments, self._theta, self._rows)

    def _reason(self, fitting: int | None, observation: Observation) -> str:
        if fitting is None:
            return "hold"
        if fitting >= self._bounds.max_rows:
            return "cap"
        return "running" if fitting < decoding_rows(observation) else "memory"
