"""Disturb a small run at every operation on files, in every way, and check what it becomes.

    python -m tests.faults

Prints each failure, and the numbers of what was tried.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from tests.support.failure_points import KINDS, Kind, disturb, small_job, undisturbed
from tests.support.toy_run import ToyJob


@cache
def _prepared() -> tuple[ToyJob, list[str], list[dict[str, Any]]]:
    logging.disable()
    # A generator that is collected closes its files, which fails as well.
    sys.unraisablehook = lambda unraisable: None
    with tempfile.TemporaryDirectory() as folder:
        job = small_job(Path(folder))
        operations, expected = undisturbed(job)
    return job, operations, expected


def _try(point: tuple[Kind, int]) -> tuple[Kind, int, bool, str]:
    kind, number = point
    job, _, expected = _prepared()
    try:
        return kind, number, disturb(job, kind, number, expected), ""
    except Exception:  # noqa: BLE001 - whatever fails is printed and counted
        return kind, number, True, traceback.format_exc(limit=-3)


def _points(operations: int) -> Iterator[tuple[Kind, int]]:
    return ((kind, number) for kind in KINDS for number in range(1, operations + 1))


def main() -> int:
    """Exit status 1 when any point failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    given = parser.parse_args()
    operations = _prepared()[1]
    happened: Counter[str] = Counter()
    failed = 0
    with multiprocessing.get_context("spawn").Pool(given.processes) as pool:
        for kind, number, disturbed, error in pool.imap_unordered(_try, _points(len(operations)), chunksize=8):
            happened[kind.name] += disturbed
            if error:
                failed += 1
                print(f"{kind.name} at operation {number}, {operations[number - 1]}:\n{error}", flush=True)
    print(f"{len(operations)} operations; disturbed: {dict(happened)}, all in all {happened.total()}; failed: {failed}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
