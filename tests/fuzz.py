"""Fuzz the whole engine for some minutes, with larger calls than `make test` has time for.

    python -m tests.fuzz --minutes 30

Prints a line per round, the smallest failing call of each failing round, and totals at the end.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections import Counter

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.support.fuzz import Case, cases, check

_EXAMPLES_PER_ROUND = 20


def fuzz_round(number: int) -> Counter[str]:
    """Try some calls drawn from one seed; counts of what was tried. Raises what the smallest failing call raises."""
    tried: Counter[str] = Counter()

    @seed(number)
    @given(case=cases(prompt_tokens=12_000, output_tokens=4000))
    @settings(
        max_examples=_EXAMPLES_PER_ROUND,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    def examples(case: Case) -> None:
        tried["calls"] += 1
        tried["prompts"] += len(case.prompts)
        tried["prompt tokens"] += sum(prompt.length for prompt in case.prompts)
        tried["samples"] += sum(prompt.params.n for prompt in case.prompts)
        tried[f"calls of {case.family}"] += 1
        check(case)

    try:
        examples()
    except Exception:  # noqa: BLE001 - whatever fails is printed and counted, and the next seed goes on
        traceback.print_exc(limit=-3)
        tried["failing rounds"] += 1
    return tried


def main() -> int:
    """Exit status 1 when any round failed."""
    parser = argparse.ArgumentParser(description="Fuzzes the engine against transformers' generate.")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=1000, help="of the first round; each round has the next")
    given_args = parser.parse_args()
    torch.set_num_threads(1)
    total: Counter[str] = Counter()
    end = time.monotonic() + 60 * given_args.minutes
    number = given_args.seed
    while time.monotonic() < end:
        total += fuzz_round(number)
        print(f"seed {number}: {total['calls']} calls, {total['failing rounds']} failing rounds so far", flush=True)
        number += 1
    print(f"seeds {given_args.seed} to {number - 1}")
    for name, count in sorted(total.items()):
        print(f"{name}: {count}")
    return int(total["failing rounds"] > 0)


if __name__ == "__main__":
    sys.exit(main())
