"""Run a job and compare the time left that it foretells with the time that it then takes.

    python -m jobs.bench.eta +experiment=ppo_sampling
    python -m jobs.bench.eta data.limit=2000 sampling.max_new_tokens=16

Arguments are those of `python -m rollout`. Errors are |foretold - true| / true, from the first tenth of the generation
until a twentieth of it is left. Without a terminal a job writes a line every ten seconds, so it should take minutes.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_BEGUN, _ENDED = re.compile(r" Generating [\d,]+ samples"), re.compile(r" in all · ")
_LEFT = re.compile(r" · (?P<left>–|[\d:]+) left · ")
_FIRST_SHARE, _LAST_SHARE = 0.1, 0.95


class Line(NamedTuple):
    """A line that a job wrote, and the seconds since its start."""

    at: float
    text: str


class Foretold(NamedTuple):
    """A time left, and the true one."""

    seconds: float | None
    """None where the job said that it does not know yet."""
    truth: float


def run(overrides: Sequence[str]) -> list[Line]:
    """Run a job, and return the lines of its stderr, which are also printed."""
    start = time.monotonic()
    lines: list[Line] = []
    command = [sys.executable, "-m", "rollout", *overrides]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as job:
        assert job.stderr is not None
        for text in job.stderr:
            lines.append(Line(time.monotonic() - start, text.rstrip("\n")))
            print(f"{lines[-1].at:7.1f}  {lines[-1].text}", flush=True)
    if job.returncode not in (0, 4):
        raise SystemExit(f"The job ended with status {job.returncode}.")
    return lines


def foretold(lines: Sequence[Line]) -> list[Foretold]:
    """Return what was foretold between the first tenth and the last twentieth of the generation."""
    begun = next(line.at for line in lines if _BEGUN.search(line.text))
    ended = next(line.at for line in reversed(lines) if _ENDED.search(line.text))
    shares = begun + _FIRST_SHARE * (ended - begun), begun + _LAST_SHARE * (ended - begun)
    said = ((line.at, found["left"]) for line in lines if (found := _LEFT.search(line.text)) is not None)
    return [
        Foretold(None if left == "–" else _seconds(left), ended - at)
        for at, left in said
        if shares[0] <= at <= shares[1]
    ]


def describe(lines: Sequence[Line]) -> str:
    """Describe the errors, and the seconds until the first line and until the first step."""
    all_said = foretold(lines)
    errors = [abs(said.seconds - said.truth) / said.truth for said in all_said if said.seconds is not None]
    found = f"median {np.median(errors):.0%}, maximum {max(errors):.0%}" if errors else "nothing foretold"
    begun = next(line.at for line in lines if _BEGUN.search(line.text))
    return (
        f"error of the time left: {found} of {len(errors)} lines; {len(all_said) - len(errors)} lines without; "
        f"first line after {lines[0].at:.1f} s, generation after {begun:.1f} s"
    )


def _seconds(duration: str) -> float:
    seconds = 0
    for part in duration.split(":"):
        seconds = 60 * seconds + int(part)
    return float(seconds)


def main() -> None:
    """Run the job in a temporary folder, unless the overrides name one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory(prefix="eta-") as folder:
        print(describe(run([f"output.dir={folder}/run", *overrides])))


if __name__ == "__main__":
    main()
