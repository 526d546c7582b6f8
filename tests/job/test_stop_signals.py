"""The handlers of a job's signals: the first is noted or raised, the second ends the process."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rollout.job import stop_signals as module
from rollout.job.stop_signals import SIGNALS, Stopped, stop_signals
from rollout.models.module.signals import signals_held

ROOT = Path(__file__).parents[2]


def in_process(code: str) -> subprocess.CompletedProcess[str]:
    """Run code that raises signals in another process."""
    start = "import os, signal, sys\nfrom rollout.job import stop_signals as module\nsend = signal.raise_signal\n"
    return subprocess.run(
        [sys.executable, "-c", start + code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("number", SIGNALS)
def test_first_signal_is_noted_and_handlers_are_put_back(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    with stop_signals({}) as signals, signals.noted():
        assert signals.received is None
        signal.raise_signal(number)
        signal.raise_signal(signal.SIGUSR1)
        assert signals.received == number
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_signal_is_raised_where_nothing_is_under_way() -> None:
    with stop_signals({}) as signals:
        with signals.noted():
            pass
        with pytest.raises(Stopped):
            signal.raise_signal(signal.SIGTERM)
        assert signals.received == signal.SIGTERM
        # What cleans up after it is not interrupted by the same signal of a launcher.
        signal.raise_signal(signal.SIGTERM)


def test_jobs_of_a_sweep_have_the_signals_in_common() -> None:
    with stop_signals({}) as outer, stop_signals({}) as inner:
        assert inner is outer


def test_other_threads_install_nothing() -> None:
    installed: list[object] = []

    def run() -> None:
        with stop_signals({}):
            installed.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert installed == [signal.getsignal(signal.SIGTERM)]
    assert module._installed is None


def test_ignored_hangup_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals({}) as signals:
            signal.raise_signal(signal.SIGHUP)
            assert signals.received is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_signal_does_not_wait_until_a_borrowed_module_is_given_back() -> None:
    with stop_signals({}) as signals, signals.noted(), signals_held():
        signal.raise_signal(signal.SIGTERM)
        assert signals.received == signal.SIGTERM


@pytest.mark.parametrize(
    ("first", "second", "environment", "status"),
    [
        ("SIGINT", "SIGINT", "{}", 75),
        ("SIGTERM", "SIGTERM", "{}", 75),
        ("SIGTERM", "SIGINT", "{}", 75),
        # Warnings, after which a scheduler sends SIGTERM.
        ("SIGUSR1", "SIGTERM", "{}", 0),
        ("SIGHUP", "SIGINT", "{}", 0),
        ("SIGTERM", "SIGUSR2", "{}", 0),
        ("SIGTERM", "SIGHUP", "{}", 0),
        # SLURM sends it at the beginning and at the end of the time of grace.
        ("SIGTERM", "SIGTERM", "{'SLURM_JOB_ID': '1'}", 0),
        ("SIGTERM", "SIGINT", "{'SLURM_JOB_ID': '1'}", 75),
        # torchrun sends it to the others when one rank has ended.
        ("SIGTERM", "SIGTERM", "{'TORCHELASTIC_RUN_ID': '1'}", 0),
        ("SIGTERM", "SIGINT", "{'TORCHELASTIC_RUN_ID': '1'}", 75),
    ],
)
def test_second_signal_ends_the_process(first: str, second: str, environment: str, status: int) -> None:
    done = in_process(
        "module._SAME_SECONDS = -1.0\n"
        f"with module.stop_signals({environment}) as signals, signals.noted():\n"
        f"    send(signal.{first})\n    send(signal.{second})\n    print('on')\n"
    )
    assert (done.returncode, done.stdout) == (status, "on\n" if status == 0 else "")
    assert ("Stopped at once" in done.stderr) == (status == 75)


def test_warning_and_one_signal_more_are_not_two() -> None:
    done = in_process(
        "module._SAME_SECONDS = -1.0\n"
        "with module.stop_signals({}) as signals, signals.noted():\n"
        "    send(signal.SIGUSR1)\n    send(signal.SIGTERM)\n    print('on', flush=True)\n    send(signal.SIGTERM)\n"
    )
    assert (done.returncode, done.stdout) == (75, "on\n")
    assert done.stderr == "Stopped at once: the same command resumes the run.\n"


def test_signal_that_a_launcher_passes_on_is_the_same() -> None:
    done = in_process(
        "with module.stop_signals({}) as signals, signals.noted():\n"
        "    send(signal.SIGINT)\n    send(signal.SIGINT)\n    print('on')\n"
    )
    assert (done.returncode, done.stdout) == (0, "on\n")


def test_forked_process_has_the_handlers_of_before() -> None:
    """A pool ends its processes with SIGTERM, and waits for them."""
    done = in_process(
        "with module.stop_signals({}):\n"
        "    child = os.fork()\n"
        "    if not child:\n        send(signal.SIGTERM)\n        os._exit(3)\n"
        "    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    assert done.stdout == f"{-signal.SIGTERM}\n", done.stderr
