"""Rows from what memory will hold: lengths, costs of a step and the latency budget are all learned on the way."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np

from rollout.batcher.hazard import Hazard
from rollout.batcher.latency import Latency
from rollout.batcher.limits import decoding_rows
from rollout.batcher.occupancy import Forecast, Occupancy, Rows
from rollout.batcher.peak import future_peak
from rollout.batcher.sla import OVER_BUDGET
from rollout.batcher.steptime import StepTime
from rollout.batcher.types import BoolArray, Bounds, Decision, FloatArray, IntArray, Observation

# Lengths and costs change slowly: what follows from them is worked out once in so many decisions.
_DECISIONS_PER_ESTIMATE = 16
_GRID = 48
_MOST_HORIZON = 4096
_TYPICAL_MAX_NEW = 256
_MOST_UNKNOWN_ROWS = 256


class PredictivePolicy:
    """Admits while memory will do, but for a risk that is worth it.

    A row is admitted if, with it, mean + theta * sd of the tokens held stays within memory at every step of a
    horizon. Lengths come from a life table over finished and running rows (``Hazard``), or are known where
    ``max_new_tokens`` alone ends a row. The variance has a term for what is not known of the mean itself:
    (tokens that rows are expected to give back)^2 / (finished rows + 8). All rows may be longer than thought, which
    matters as far as one counts on their end, and the most while none has ended.

    How much to risk depends on what a preemption costs against what an idle slot costs. With step times fitted
    as c0 + c1 * rows + c2 * kv tokens + c3 * prefill tokens, rho = c3 * rows / c0 is the price of prefilling a
    token again in units of a row's share of a step, and then theta = Phi^-1(1 - 0.045 / (rho + 0.15)) and the
    horizon is 512 * rho steps. Both are the reference simulations' rule, which was chosen on machines like those
    of ``jobs/bench/policies.py``.

    With a latency budget, ``Latency`` says how many of the rows decode, how many tokens are prefilled beside them
    and how many rows more would fit.

    Reasons: ``memory``, ``cap`` (all of ``max_rows``), ``latency``, ``over_budget`` (``OVER_BUDGET``).

    Args:
        bounds: what the user allows.
        memory_rows: finished rows that lengths are learned from, about; older ones fade.
    """

    def __init__(self, bounds: Bounds, memory_rows: int = 4096) -> None:
        if memory_rows < 1:
            raise ValueError(f"memory_rows must be at least 1, not {memory_rows}.")
        self._bounds = bounds
        self._hazard = Hazard(memory_rows)
        self._steps = StepTime()
        self._latency = None if bounds.latency_budget_ms is None else Latency(bounds, self._steps)
        self._decisions = 0
        self._theta = 0.0
        self._forecast: Forecast | None = None

    def decide(self, observation: Observation) -> Decision:
        bounds = self._bounds
        self._hazard.learn(observation.finished)
        self._steps.learn(observation.steps)
        if self._forecast is None or self._decisions % _DECISIONS_PER_ESTIMATE == 0:
            self._forecast = self._estimate(observation)
        self._decisions += 1
        rows = observation.live_rows + self._admissible(observation, self._forecast)
        reason = "memory"
        decode_rows, prefill_tokens = None, bounds.prefill_tokens
        if self._latency is not None:
            share = self._latency.share(observation)
            decode_rows, prefill_tokens = share.decode_rows, share.prefill_tokens
            if share.rows < rows or share.over_budget:
                rows, reason = share.rows, OVER_BUDGET if share.over_budget else "latency"
        if rows >= bounds.max_rows:
            reason = "cap"
        rows = min(max(rows, decoding_rows(observation), bounds.min_rows), bounds.max_rows)
        return Decision(rows, prefill_tokens, reason, decode_rows)

    # -- estimating ----------------------------------------------------------------------------------

    def _estimate(self, observation: Observation) -> Forecast:
        limits = observation.max_new_tokens
        if not len(limits) and observation.waiting is not None:
            limits = observation.waiting.max_new_tokens
        typical = float(limits.mean()) if len(limits) else float(_TYPICAL_MAX_NEW)
        self._hazard.estimate(observation.generated_tokens, typical)
        rho = self._price(observation.live_rows)
        self._theta = NormalDist().inv_cdf(1 - 0.045 / (rho + 0.15))
        horizon = min(max(16.0, 512 * rho), _MOST_HORIZON)
        return Forecast(self._hazard, _grid(horizon, min(horizon, self._hazard.length(0.9))))

    def _price(self, rows: int) -> float:
        """What it costs to compute a token again, in units of a row's share of a step; 0.2 while nobody knows."""
        c0, _, _, c3 = self._steps.coefficients
        return min(c3 * max(rows, 1) / c0, 64.0) if c0 > 0 and self._steps.samples >= 8 else 0.2

    # -- fitting -------------------------------------------------------------------------------------

    def _admissible(self, observation: Observation, forecast: Forecast) -> int:
        """How many waiting rows more may live; beyond those that are known, rows like them are imagined."""
        live, held = _live(observation, forecast)
        waiting = _waiting(observation)
        eta = observation.kv_tokens_total
        if not len(waiting):
            return 0
        if live.ends_at_limit.all() and waiting.ends_at_limit.all():
            return _fitting_exactly(live, waiting, eta)
        more = forecast.one_by_one(waiting)
        fits = self._fits(held + more.up_to_each(), eta)
        if not fits.all():
            return int(np.argmin(fits))
        unknown = more.times(np.arange(1, _MOST_UNKNOWN_ROWS + 1))
        fits = self._fits(held + more.up_to_each().last() + unknown, eta)
        return len(waiting) + (_MOST_UNKNOWN_ROWS if fits.all() else int(np.argmin(fits)))

    def _fits(self, needed: Occupancy, eta: int) -> BoolArray:
        """[rows] whether memory will do for each of [rows, grid]."""
        unsure = (needed.most - needed.mean) ** 2 / (self._hazard.finished + 8)
        most = needed.mean + self._theta * np.sqrt(needed.variance + unsure)
        return np.asarray((most <= eta).all(1))


def _grid(horizon: float, dense: float) -> FloatArray:
    """Steps from now to the horizon, close to each other while most rows come and go."""
    steps = np.linspace(0.0, dense, _GRID * 2 // 3)
    if dense < horizon:
        steps = np.concatenate((steps, np.geomspace(max(dense, 1.0), horizon, _GRID // 3 + 1)[1:]))
    return steps


def _own(tokens: IntArray, observation: Observation) -> FloatArray:
    """What rows hold for so many tokens: half of a last page is empty on average."""
    return tokens + (observation.tokens_per_row + (observation.page_tokens - 1) / 2)


def _live(observation: Observation, forecast: Forecast) -> tuple[Rows, Occupancy]:
    """The live rows, and what they will hold."""
    groups = observation.groups
    known = observation.ends_at_limit
    known = np.zeros(observation.live_rows, bool) if known is None else known
    tokens = observation.prompt_tokens + observation.generated_tokens
    rows = Rows(_own(tokens, observation), observation.generated_tokens, observation.max_new_tokens, known)
    if groups is None or len(groups) < 2 or not (alike := groups[1:] == groups[:-1]).any():
        held = forecast.together(rows)
        if groups is None:
            # Some of the tokens may be shared; what is held now is known.
            surplus = min(0.0, observation.kv_tokens_held - float(rows.own_tokens.sum()))
            held = Occupancy(held.mean + surplus, held.variance, held.most + surplus)
        return rows, held
    # Rows of a group are admitted together, so they stand together.
    shared = observation.prompt_tokens // observation.page_tokens * observation.page_tokens
    rows = Rows(rows.own_tokens - shared, rows.ages, rows.limits, rows.ends_at_limit)
    last = np.flatnonzero(np.append(~alike, True))
    sizes = np.diff(last, prepend=-1)
    prompts = forecast.shared(sizes, shared[last], forecast.survival(rows.taken(last)))
    return rows, forecast.together(rows) + prompts


def _waiting(observation: Observation) -> Rows:
    """The rows that wait: those that are known, else one for all of them."""
    waiting = observation.waiting
    if waiting is None:
        if not observation.waiting_rows:
            return Rows(np.zeros(0), *(np.zeros(0, np.int64),) * 2, np.zeros(0, bool))
        prompt = np.array([observation.waiting_prompt_tokens // observation.waiting_rows])
        limit = observation.max_new_tokens.mean() if observation.live_rows else _TYPICAL_MAX_NEW
        return Rows(_own(prompt, observation), np.zeros(1, np.int64), np.array([int(limit)]), np.zeros(1, bool))
    shared = waiting.prompt_tokens // observation.page_tokens * observation.page_tokens
    joins = np.zeros(len(waiting), bool)
    joins[1:] = waiting.groups[1:] == waiting.groups[:-1]
    if observation.groups is not None and len(waiting):
        joins |= np.isin(waiting.groups, observation.groups)
    tokens = waiting.prompt_tokens + waiting.generated_tokens - joins * shared
    return Rows(_own(tokens, observation), waiting.generated_tokens, waiting.max_new_tokens, waiting.ends_at_limit)


def _fitting_exactly(live: Rows, waiting: Rows, eta: int) -> int:
    """How many of the waiting rows fit where all lengths are known."""
    held = np.concatenate((live.own_tokens, waiting.own_tokens))
    remaining = np.concatenate((live.remaining, waiting.remaining)).astype(np.float64)
    grows = np.ones(len(held))
    low, high = 0, len(waiting)
    while low < high:
        middle = (low + high + 1) // 2
        count = len(live) + middle
        if future_peak(held[:count], grows[:count], remaining[:count]) <= eta:
            low = middle
        else:
            high = middle - 1
    return low
