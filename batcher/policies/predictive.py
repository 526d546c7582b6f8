"""Rows from what memory will hold: lengths, costs of a step and the latency budget are all learned on the way."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np

from rollout.batcher.estimators.latency_budget import LatencyBudget
from rollout.batcher.estimators.memory_forecast import Forecast, MemoryForecaster
from rollout.batcher.estimators.peak_memory import fitting_exactly
from rollout.batcher.estimators.row_memory import TYPICAL_MAX_NEW, live_rows, waiting_rows
from rollout.batcher.estimators.step_time import StepTime
from rollout.batcher.estimators.survival import Survival
from rollout.batcher.types import OVER_BUDGET, BoolArray, Bounds, Decision, FloatArray, Observation, decoding_rows

# Lengths and costs change slowly: what follows from them is worked out once in so many decisions.
_DECISIONS_PER_ESTIMATE = 16
_GRID = 48
_MOST_HORIZON = 4096
_MOST_UNKNOWN_ROWS = 256
# What is thought of lengths before any row has ended is as good as so many ends. With 8, a first wave of rows of one
# length leaves so much memory idle that another wave is needed at the end; with 32, short jobs outgrow memory.
_PRIOR_ROWS = 16
_FIRST = np.zeros(1, np.int64)


class PredictivePolicy:
    """Admits while memory will do, but for a risk that is worth it.

    A row is admitted if, with it, mean + theta * sd of the tokens held stays within memory at every step of a
    horizon. Lengths come from a life table over finished and running rows (``Hazard``), or are known where
    ``max_new_tokens`` alone ends a row. The variance has a term for what is not known of the mean itself:
    (tokens that rows are expected to give back)^2 / (finished rows + 16). All rows may be longer than thought, which
    matters as far as one counts on their end, and the most while none has ended.

    How much to risk depends on what a preemption costs against what an idle slot costs. With step times fitted
    as c0 + c1 * rows + c2 * kv tokens + c3 * prefill tokens, rho = c3 * rows / c0 is the price of prefilling a
    token again in units of a row's share of a step, and then theta = Phi^-1(1 - 0.045 / (rho + 0.15)) and the
    horizon is 512 * rho steps. Both are the reference simulations' rule, which was chosen on machines like those
    of ``jobs/bench/policies_simulated.py``.

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
        self._hazard = Survival(memory_rows)
        self._steps = StepTime()
        self._latency = None if bounds.latency_budget_ms is None else LatencyBudget(bounds, self._steps)
        self._decisions = 0
        self._theta = 0.0
        self._admitted = 0
        """Rows that memory was found to have room for at the last decision."""
        self._forecast: Forecast | None = None

    def decide(self, observation: Observation) -> Decision:
        bounds = self._bounds
        self._hazard.learn(observation.finished)
        self._steps.learn(observation.steps)
        if self._forecast is None or self._decisions % _DECISIONS_PER_ESTIMATE == 0:
            self._forecast = self._estimate(observation)
        self._decisions += 1
        most, reason = bounds.max_rows, "cap"
        decode_rows, prefill_tokens = None, bounds.prefill_tokens
        if self._latency is not None:
            share = self._latency.share(observation)
            decode_rows, prefill_tokens = share.decode_rows, share.prefill_tokens
            if share.over_budget or share.rows < most:
                most, reason = share.rows, OVER_BUDGET if share.over_budget else "latency"
        rows = min(observation.live_rows, most)
        if rows < most:
            # What nobody may use is not looked at: it is most of what a decision costs.
            rows += self._admissible(observation, self._forecast, most - rows)
            if rows < most:
                reason = "memory"
        self._admitted = rows
        rows = min(max(rows, decoding_rows(observation), bounds.min_rows), bounds.max_rows)
        return Decision(rows, prefill_tokens, reason, decode_rows)

    # -- estimating ----------------------------------------------------------------------------------

    def _estimate(self, observation: Observation) -> Forecast:
        limits = observation.max_new_tokens
        if not len(limits) and observation.waiting is not None:
            limits = observation.waiting.max_new_tokens
        typical = float(limits.mean()) if len(limits) else float(TYPICAL_MAX_NEW)
        self._hazard.estimate(observation.generated_tokens, typical)
        rho = self._price(max(observation.live_rows, self._admitted))
        self._theta = NormalDist().inv_cdf(1 - 0.045 / (rho + 0.15))
        horizon = min(max(16.0, 512 * rho), _MOST_HORIZON)
        return Forecast(self._hazard, _grid(horizon, min(horizon, self._hazard.length(0.9))))

    def _price(self, rows: int) -> float:
        """What it costs to compute a token again, in units of a row's share of a step.

        1 while nobody knows: the rows that a job begins with are many and of unknown lengths, and to be careful with
        them for some steps costs little.
        """
        c0, _, _, c3 = self._steps.coefficients
        return min(c3 * max(rows, 1) / c0, 64.0) if c0 > 0 and self._steps.samples >= 8 else 1.0

    # -- fitting -------------------------------------------------------------------------------------

    def _admissible(self, observation: Observation, forecast: Forecast, most: int) -> int:
        """How many waiting rows more may live, of ``most`` that are asked for.

        Beyond those that are known, rows like them are imagined.
        """
        live, shared = live_rows(observation)
        waiting = waiting_rows(observation)
        eta = observation.kv_tokens_total
        if not len(waiting):
            return 0
        if len(waiting) > most:
            waiting = waiting.taken(np.arange(most))
        if live.ends_at_limit.all() and waiting.ends_at_limit.all():
            alike = np.arange(min(most, len(waiting) + _MOST_UNKNOWN_ROWS)) % len(waiting)
            return fitting_exactly(live, shared, waiting.taken(alike), eta)
        held = forecast.together(live)
        if len(shared):
            held += forecast.of_prompts(shared, live)
        elif observation.groups is None:
            # What is shared, nobody says; but what is held now is known.
            held = held.less(max(0.0, float(live.own_tokens.sum()) - observation.kv_tokens_held))
        # Mostly there is no room for one more; then the others need no look.
        if not self._fits(held + forecast.one_by_one(waiting.taken(_FIRST)), eta)[0]:
            return 0
        more = forecast.one_by_one(waiting)
        fits = self._fits(held + more.up_to_each(), eta)
        if not fits.all():
            return int(np.argmin(fits))
        if len(waiting) == most:
            return most
        imagined = min(most - len(waiting), _MOST_UNKNOWN_ROWS)
        fits = self._fits(held + more.up_to_each().last() + more.times(np.arange(1, imagined + 1)), eta)
        return len(waiting) + (imagined if fits.all() else int(np.argmin(fits)))

    def _fits(self, needed: MemoryForecaster, eta: int) -> BoolArray:
        """[rows] whether memory will do for each of [rows, grid]."""
        unsure = (needed.most - needed.mean) ** 2 / (self._hazard.finished + _PRIOR_ROWS)
        most = needed.mean + self._theta * np.sqrt(needed.variance + unsure)
        return np.asarray((most <= eta).all(1))


def _grid(horizon: float, dense: float) -> FloatArray:
    """Steps from now to the horizon, close to each other while most rows come and go."""
    steps = np.linspace(0.0, dense, _GRID * 2 // 3)
    if dense < horizon:
        steps = np.concatenate((steps, np.geomspace(max(dense, 1.0), horizon, _GRID // 3 + 1)[1:]))
    return steps
