"""One thread for tiny models, interrupts as in a terminal; on a CPU, Triton's kernels run in its interpreter."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Iterator

import pytest
import torch

# Helpers assert as tests do, and say as much when they fail.
pytest.register_assert_rewrite("tests.support")

from tests.support.devices import GPU  # noqa: E402 - after the line above

# On a busy machine the threads of small operations mostly wait for each other.
torch.set_num_threads(1)

# Threads of what tests start do not spin while they wait: others need the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# A shell lets what it starts in the background ignore interrupts, and nohup hang-ups; some tests send both.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Read when Triton is first imported, which torch and transformers leave to those who need it.
if GPU is None:
    os.environ["TRITON_INTERPRET"] = "1"
else:
    # Convolutions of recurrent families are in TF32 otherwise, which has ten bits; products are not.
    torch.backends.cudnn.allow_tf32 = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the longest tests, so that no worker is left alone with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_collection_finish() -> None:
    """Keep what is imported out of all collections of garbage, which it would make many times as long."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def nothing_is_handled() -> Iterator[None]:
    """No test leaves an exception behind in the interpreter, which would be the context of all those of later tests."""
    assert sys.exception() is None, "an earlier test, or a fixture, left it behind"
    yield
    assert sys.exception() is None, "the test left it behind"
