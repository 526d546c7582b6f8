"""The comparison of reward curves trains what its file does not have, and sums up each run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.bench import reward_curves


def test_only_runs_that_the_file_lacks_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[tuple[str, str, int]] = []

    def run(weights: str, generation: str, seed: int, steps: int) -> Iterator[dict[str, Any]]:
        made.append((weights, generation, seed))
        for step in range(1, steps + 1):
            values = (weights, generation, seed, step, step / 10, 2.0)
            yield dict(zip(reward_curves.COLUMNS, values, strict=True))

    monkeypatch.setattr(reward_curves, "run", run)
    file = str(tmp_path / "curves.csv")
    for seeds, runs in (("1", 4), ("2", 8), ("2", 8)):
        monkeypatch.setattr(sys, "argv", ["reward_curves", file, "--steps", "8", "--seeds", seeds])
        reward_curves.main()
        assert len(made) == len(set(made)) == runs
    # The mean of steps 1 and 2, and of steps 7 and 8.
    assert "| lora | plain | 1 | 8 | 0.150 | 0.750 | 2.0 |" in capsys.readouterr().out
