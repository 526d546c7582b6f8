"""Run many schedules of simulated workers, each from a seed of its own.

    python -m tests.simulate_workers --schedules 10000
    python -m tests.simulate_workers --first 1234 --schedules 1

Prints the seed and the conditions of each schedule that fails, and what all of them had to bear.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import sys
import time
import traceback
from collections import Counter
from typing import NamedTuple

from tests.support.worker_trials import Trial


class _Outcome(NamedTuple):
    shown: str
    counts: Counter[str]
    error: str


def _try(seed: int) -> _Outcome:
    logging.disable()
    trial = Trial(seed)
    error = ""
    try:
        trial.go()
    except Exception:  # noqa: BLE001 - whatever fails is printed and counted
        error = traceback.format_exc(limit=-4)
    return _Outcome(str(trial), trial.counts(), error)


def main() -> int:
    """Exit status 1 when any schedule failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--schedules", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first; each has the next")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    given = parser.parse_args()
    start = time.monotonic()
    counts: Counter[str] = Counter()
    failed = 0
    seeds = range(given.first, given.first + given.schedules)
    with multiprocessing.get_context("spawn").Pool(given.processes) as pool:
        for outcome in pool.imap_unordered(_try, seeds, chunksize=8):
            counts += outcome.counts
            if outcome.error:
                failed += 1
                print(f"{outcome.shown}\n{outcome.error}", flush=True)
    print(f"{given.schedules} schedules in {time.monotonic() - start:.0f} s: {dict(counts)}; failed: {failed}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
