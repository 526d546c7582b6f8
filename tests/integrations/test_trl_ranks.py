"""Two trainer processes: their samples differ, though their prompts do not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.long
def test_two_ranks_draw_different_samples(tmp_path: Path) -> None:
    # With --cpu, accelerate starts several processes through MPI alone.
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu"]
    launch += ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--main_process_port", "0"]
    done = subprocess.run(
        [*launch, "-m", "tests.support.trl_ranks", str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]
    assert ranks[0]["prompts"] == ranks[1]["prompts"]
    samples = [tuple(ids) for rank in ranks for call in rank["ids"] for ids in call]
    assert len(samples) == 2 * 3 * 2
    assert len(set(samples)) == len(samples)
    assert max(max(rank["distances"]) for rank in ranks) < 1e-5
