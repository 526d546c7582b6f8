"""The teams that kernels run in: all work is done once and in order, whoever comes late, forks or is interrupted."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from rollout.models.csrc import build, threads
from tests.support.compiler import needs_compiler

_PROBE = Path(__file__).with_name("phases.c")
Stress = Callable[..., int]


def probe(folder: Path) -> ctypes.CDLL:
    """Compile ``phases.c``."""
    needs_compiler()
    library = folder / "phases.so"
    flags = [*build.FLAGS, f"-I{threads.SOURCE.parent}", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([*build.compiler(), *flags, "-o", library, str(_PROBE)], check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="module")
def stress(tmp_path_factory: pytest.TempPathFactory) -> Stress:
    """Run regions of random sizes; return how many went wrong."""
    run_many = probe(tmp_path_factory.mktemp("probe")).run_many
    number, address = ctypes.c_int64, ctypes.c_void_p
    run_many.argtypes, run_many.restype = [*[number] * 4, ctypes.c_uint, address, address], number
    found = threads.entry_points()

    def run(regions: int, seed: int, most_threads: int = 4, most_phases: int = 30, most_tasks: int = 30) -> int:
        wrong: int = run_many(regions, most_phases, most_tasks, most_threads, seed, found.parallel, found.barrier)
        return wrong

    return run


def test_source_compiles_without_warnings(tmp_path: Path) -> None:
    needs_compiler()
    command = [*build.compiler(), *build.FLAGS, "-Wall", "-Wextra", "-Werror", "-o", str(tmp_path / "out.so")]
    subprocess.run([*command, str(threads.SOURCE)], check=True)


def test_own_threads_are_used() -> None:
    needs_compiler()
    assert threads.entry_points() != threads._of_openmp()


def test_every_task_runs_once_and_after_those_of_the_phase_before(stress: Stress) -> None:
    assert stress(4000, seed=1) == 0


def test_more_threads_than_cores(stress: Stress) -> None:
    assert stress(400, seed=2, most_threads=4 * (os.cpu_count() or 1) + 3) == 0


def test_many_phases_of_few_tasks(stress: Stress) -> None:
    assert stress(100, seed=3, most_phases=2000, most_tasks=3) == 0


def test_callers_in_several_threads_have_teams_of_their_own(stress: Stress) -> None:
    with ThreadPoolExecutor(4) as callers:
        assert list(callers.map(lambda seed: stress(500, seed), range(4))) == [0] * 4


def test_torch_can_run_in_between(stress: Stress) -> None:
    with ThreadPoolExecutor(1) as other:
        running = other.submit(stress, 1000, 5)
        while not running.done():
            assert float(torch.ones(1 << 18).exp().sum()) > 0
        assert running.result() == 0


def test_signals_reach_the_callers(stress: Stress) -> None:
    """Handlers run while regions do, and none is lost to a thread of a team."""
    heard: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda *_: heard.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 1e-3, 1e-3)
        for seed in range(20):
            assert stress(50, seed) == 0
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert heard


def test_child_of_a_fork_has_threads_of_its_own(stress: Stress) -> None:
    assert stress(50, seed=6) == 0
    stop = threading.Event()

    def keep_running() -> None:
        while not stop.is_set():
            stress(10, seed=7)

    other = threading.Thread(target=keep_running)
    other.start()
    try:
        children = []
        for seed in range(8):
            child = os.fork()
            if not child:  # pragma: no cover
                os._exit(min(1, stress(200, seed)))
            children.append(child)
        statuses = [os.waitpid(child, 0)[1] for child in children]
    finally:
        stop.set()
        other.join()
    assert statuses == [0] * 8
    assert stress(50, seed=8) == 0


@pytest.mark.parametrize("end", ["pass", "raise SystemExit(0)", "import os; os.kill(os.getpid(), 2)"])
def test_process_ends_quietly(tmp_path: Path, end: str) -> None:
    """While a thread that nobody joins is in a region, too."""
    probe(tmp_path)
    script = f"""
import ctypes, signal, sys, threading
from rollout.models.csrc import threads
signal.signal(signal.SIGINT, lambda *_: sys.exit(0))
found = threads.entry_points()
run = ctypes.CDLL({str(tmp_path / "phases.so")!r}).run_many
run.argtypes = [*[ctypes.c_int64] * 4, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p]
call = lambda regions: run(regions, 9, 9, 4, 1, found.parallel, found.barrier)
call(50)
threading.Thread(target=call, args=(1 << 40,), daemon=True).start()
{end}
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_members_round_as_the_caller_does(tmp_path: Path) -> None:
    """A denormal times one is zero where the caller flushes denormals, whichever member multiplies."""
    needs_compiler()
    (tmp_path / "flush.c").write_text(
        '#include <unistd.h>\n#include "threads.h"\n'
        "static int kept, members;\n"
        "static void work(void *x) {\n"
        "    volatile float y = *(volatile float *)x * 1.0f;\n"
        "    usleep(2000);\n"
        "    __atomic_fetch_add(&kept, y != 0, __ATOMIC_SEQ_CST);\n"
        "    __atomic_fetch_add(&members, 1, __ATOMIC_SEQ_CST);\n"
        "}\n"
        "int run(Parallel *parallel, int *count) {\n"
        "    volatile float x = 1e-40f;\n"
        "    kept = members = 0, parallel(work, (void *)&x, 2, 0);\n"
        "    *count = members;\n"
        "    return kept;\n"
        "}\n"
    )
    flags = ["-O1", "-fPIC", "-shared", f"-I{threads.SOURCE.parent}"]
    subprocess.run([*build.compiler(), *flags, "-o", tmp_path / "flush.so", tmp_path / "flush.c"], check=True)
    run, members = ctypes.CDLL(str(tmp_path / "flush.so")).run, ctypes.c_int()
    run.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    try:
        for flush in (False, True, False):
            if not torch.set_flush_denormal(flush):
                pytest.skip("this CPU cannot flush denormals")
            together = 0
            for _ in range(20):
                kept = run(threads.parallel(), ctypes.byref(members))
                assert kept == (0 if flush else members.value)
                together += members.value == 2
            assert together
    finally:
        torch.set_flush_denormal(False)
