"""Time one decision of each policy by number of live rows."""

from __future__ import annotations

import argparse
import time

import numpy as np

from jobs.bench.lib.tables import tell
from rollout.batcher.registry import POLICIES, make_policy
from rollout.batcher.simulation.compare import MAX_ROWS
from rollout.batcher.types import Bounds, FinishedRow, Observation, StepSample, WaitingRows


def cost(given: argparse.Namespace) -> None:
    """Return the microseconds per decision by number of live rows."""
    lines = [["policy", "100 rows", "300 rows", "1000 rows", "1000 rows and room for more"]]
    cases = ((100, 0), (300, 0), (1000, 0), (1000, 100_000))
    for name in POLICIES:
        for limit in (None, 1e4):
            cells = [f"{_decision_us(name, rows, room, limit, given.seeds):.0f}" for rows, room in cases]
            lines.append([name + (" with a budget" if limit else ""), *cells])
    print("microseconds a decision, the median of batches of 64")
    tell(lines)


def _decision_us(name: str, rows: int, room: int, limit: float | None, seeds: int) -> float:
    policy = make_policy(name, Bounds(1, MAX_ROWS, limit))
    rng = np.random.default_rng(0)
    ages = np.sort(rng.integers(1, 600, rows))[::-1].copy()
    prompts = rng.integers(50, 400, rows)
    limits = np.full(rows, 4096, np.int64)
    held = int((ages + prompts).sum())
    sixty_four = np.arange(64)
    waiting = WaitingRows(
        rng.integers(50, 400, 64), np.zeros(64, np.int64), limits[:1].repeat(64), 10_000 + sixty_four,
        np.zeros(64, bool),
    )  # fmt: skip
    batches = []
    for batch in range(20 * seeds):
        started = time.perf_counter()
        for _ in range(64):
            ms = 30 + 0.02 * rows
            policy.decide(
                Observation(
                    prompts, ages, limits, 1000, 200_000, held, room, 0, 1, 0, 16, np.arange(rows),
                    np.zeros(rows, bool), waiting, (StepSample(rows, held, 200 * (batch % 3), ms),),
                    (FinishedRow(200, 300 + batch),),
                )
            )  # fmt: skip
        batches.append((time.perf_counter() - started) / 64)
    return 1e6 * float(np.median(batches))
