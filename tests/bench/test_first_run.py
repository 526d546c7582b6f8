"""The first run on a GPU: it runs every kernel and every test of a kernel, and its spies see what the engine does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from jobs.bench.lib import spies
from tests.support.cuda_graph_world import World

ROOT = Path(__file__).parents[2]
#: One per line, relative to the root; `make test-gpu` and the first run read it.
KERNEL_TESTS = (ROOT / "tests/gpu/kernel_tests.txt").read_text(encoding="utf-8").split()
#: What stands in for a GPU in them needs a CPU.
OF_FAKES = {"tests/models/runners/test_cuda_graphs.py", "tests/models/attention/test_prefill_libraries.py"}


def test_every_test_of_a_kernel_is_listed() -> None:
    """They run on the GPU where there is one, in a fixture ``device`` by `kernels_run_here`."""
    found = set()
    for path in (ROOT / "tests/models").rglob("test_*.py"):
        text, conftest = path.read_text(encoding="utf-8"), path.parent / "conftest.py"
        shared = conftest.exists() and "kernels_run_here" in conftest.read_text(encoding="utf-8")
        if "kernels_run_here" in text or (shared and re.search(r"def test_\w+\([^)]*\bdevice: torch\.device", text)):
            found.add(str(path.relative_to(ROOT)))
    assert found - OF_FAKES <= set(KERNEL_TESTS)
    assert found >= OF_FAKES
    assert all((ROOT / path).exists() for path in KERNEL_TESTS)


def test_every_kernel_is_launched_under_compute_sanitizer(tmp_path: Path) -> None:
    """Here in Triton's interpreter, on the tiniest shapes."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OUT": str(tmp_path)}
    environment |= {"FIRST_RUN_DEVICE": "cpu", "FIRST_RUN_TINY": "1"}
    command = [sys.executable, "-m", "jobs.gpu.sanitize"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "kernels launched" in done.stdout
    assert "FAIL" not in done.stdout


def test_spies_see_captures_replays_and_eager_steps() -> None:
    world = World()
    with spies.watched() as found:
        world.same([(0, 4), (1, 9)])
        for _ in range(6):
            world.decode(0, 1)
    assert [(rung.tokens, rung.mixed) for rung, _ in found.captures] == [(2, False)]
    assert (found.eager[True], found.eager[False] + found.replayed[False]) == (1, 6)
    assert found.replayed[False] >= 1
    assert "1 captures" in str(found)
    assert found.graph_bytes == world.fake.bytes_kept
    found.clear()
    world.decode(0, 1)
    assert not found.captures + found.waits
