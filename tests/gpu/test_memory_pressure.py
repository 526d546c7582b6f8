"""Another process takes GPU memory while rows are live: the engine shrinks, loses no row, and grows again."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import torch

from rollout import Engine, Record, SamplingParams
from rollout.requests import Request, StepReport
from tests.support.devices import DEVICE
from tests.support.parity import random_prompts
from tests.support.tiny_models import tiny

#: A process with a context on the GPU, which takes a fair share of memory by itself; then, for each line that it reads,
#: it takes so many bytes, piece by piece as they come free, or lets go of all.
_NEIGHBOUR = """
import sys, time, torch
torch.zeros(1, device=sys.argv[1])
print("ready", flush=True)
for line in sys.stdin:
    taken = []
    torch.cuda.empty_cache()
    while sum(map(len, taken)) < int(line):
        try:
            taken.append(torch.empty(32 << 20, dtype=torch.uint8, device=sys.argv[1]))
        except torch.OutOfMemoryError:
            time.sleep(0.002)
    print("done", flush=True)
"""


class Neighbour:
    def __init__(self) -> None:
        command = [sys.executable, "-c", _NEIGHBOUR, str(DEVICE)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.wait_for("ready")

    def ask(self, size: int) -> None:
        """Ask the process to hold ``size`` bytes, without waiting for it."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{size}\n")
        self._process.stdin.flush()

    def wait_for(self, word: str) -> None:
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == f"{word}\n"

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def neighbour() -> Iterator[Neighbour]:
    made = Neighbour()
    yield made
    made.close()


def test_headroom_follows_a_neighbour(neighbour: Neighbour) -> None:
    engine = Engine(tiny("llama"), None)
    before = engine._generation.headroom.free_bytes()
    assert before == pytest.approx(torch.cuda.mem_get_info(DEVICE)[0], rel=0.05)
    neighbour.ask(before // 2)
    neighbour.wait_for("done")
    assert engine._generation.headroom.free_bytes() <= before - before // 2
    neighbour.ask(0)
    neighbour.wait_for("done")
    time.sleep(0.1)  # headroom reuses the driver's last answer for less than this
    assert engine._generation.headroom.free_bytes() == pytest.approx(before, rel=0.02)


def test_a_pool_that_fills_the_device_makes_way(neighbour: Neighbour) -> None:
    """Allocate nearly all memory first, so that the rows of a small model fill the rest."""
    model = tiny("llama", num_hidden_layers=16, head_dim=64, max_position_embeddings=1024)
    prompts, params = random_prompts(1, 64), SamplingParams(n=2, max_new_tokens=400, ignore_eos=True)
    requests = [Request(str(i), prompt, params) for i, prompt in enumerate(prompts)]
    expected = Engine(model, None, max_rows=64).generate(prompts, params)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(DEVICE)
    reserve, room = 0.05, 512 << 20  # the rows need about as much: 16 KiB a token
    stand_in = torch.empty(max(0, free - int(reserve * total) - room), dtype=torch.uint8, device=DEVICE)
    held: list[int] = []

    def on_step(report: StepReport) -> None:
        held.append(report.kv_bytes)
        if report.step == 200:
            neighbour.ask(3 * room // 4)  # more than the rows leave free by then
        if report.step == 300:
            neighbour.wait_for("done")
            neighbour.ask(0)

    records = list(Engine(model, None, max_rows=64, reserve_fraction=reserve).run(requests, on_step=on_step))
    del stand_in
    assert_same(list(expected), records)
    assert min(held[200:300]) < max(held[:200])


def assert_same(expected: list[Record], found: list[Record]) -> None:
    found = sorted(found, key=lambda record: (int(record.row_id), record.sample))
    assert [(r.row_id, r.sample) for r in found] == [(r.row_id, r.sample) for r in expected]
    assert [r.completion_ids for r in found] == [r.completion_ids for r in expected]


def test_all_memory_is_given_back() -> None:
    model = tiny("llama")
    engine = Engine(model, None)
    engine.generate(random_prompts(2, 4), SamplingParams(max_new_tokens=4))  # libraries keep their first allocations
    gc.collect()  # parts of an engine hold each other
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(DEVICE), torch.cuda.memory_reserved(DEVICE)
    batch = engine.generate(random_prompts(3, 64), SamplingParams(n=4, max_new_tokens=64))
    assert batch.stats.peak_kv_bytes > 0
    assert batch.stats.kv_bytes_held == 0
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated(DEVICE) == before[0]
    assert torch.cuda.memory_reserved(DEVICE) <= before[1] + (64 << 20)


def test_a_gpu_is_served_by_triton() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert Engine(tiny("llama", dtype), None).attention == "triton"
