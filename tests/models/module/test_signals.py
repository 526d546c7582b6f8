"""Signals are held back while a module is switched, and an interrupt at any line leaves it as it was."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import torch

from rollout.models.attention import interface
from rollout.models.module import signals
from rollout.models.module.borrow import BorrowedModule, exclusive
from rollout.models.module.signals import deliver_signals, signals_held
from rollout.models.patches.norms_and_rope import FusedModules
from tests.support.interruptions import interruptible
from tests.support.module_state import module_state
from tests.support.tiny_models import tiny

#: Parts of the names of files whose lines are interrupted.
_FILES = ("models/module/", "models/patches/patching", "models/patches/norms_and_rope", "contextlib.py")


@pytest.fixture
def handler() -> Iterator[Callable[[], list[int]]]:
    """A handler of SIGUSR1; returns the signals that it got."""
    got: list[int] = []
    own = signal.signal(signal.SIGUSR1, lambda number, _: got.append(number))
    yield lambda: got
    signal.signal(signal.SIGUSR1, own)


def test_signals_arrive_after_the_block_or_when_asked_for(handler: Callable[[], list[int]]) -> None:
    with signals_held():
        signal.raise_signal(signal.SIGUSR1)
        with signals_held():
            signal.raise_signal(signal.SIGUSR1)
        assert handler() == []
        deliver_signals()
        assert len(handler()) == 2
        signal.raise_signal(signal.SIGUSR1)
    assert len(handler()) == 3
    signal.raise_signal(signal.SIGUSR1)
    assert len(handler()) == 4


def test_interrupt_is_raised_after_the_block_even_if_the_block_raises() -> None:
    done = []

    def fail() -> None:
        with signals_held():
            signal.raise_signal(signal.SIGINT)
            done.append(True)
            raise ZeroDivisionError

    with pytest.raises(KeyboardInterrupt) as raised:
        fail()
    assert done
    assert isinstance(raised.value.__context__, ZeroDivisionError)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_repeated_interrupt_of_a_block_that_hangs_is_raised_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "_PATIENCE_S", 0.0)
    with signals_held():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_handlers_that_are_set_inside_the_block_stay(handler: Callable[[], list[int]]) -> None:
    def other(*_: object) -> None:
        """Do nothing."""

    with signals_held():
        signal.signal(signal.SIGUSR1, other)
    assert signal.getsignal(signal.SIGUSR1) is other


def test_other_threads_hold_nothing_back(handler: Callable[[], list[int]]) -> None:
    def send() -> None:
        with signals_held():
            os.kill(os.getpid(), signal.SIGUSR1)

    thread = threading.Thread(target=send)
    thread.start()
    thread.join()
    assert len(handler()) == 1


def test_forked_process_gets_its_signals_and_may_borrow() -> None:
    """A data loader forks its workers, perhaps while another thread is inside a step."""
    model = tiny("llama", num_hidden_layers=1)
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with exclusive(model):
            held.set()
            done.wait(60.0)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(60.0)
    with signals_held():
        child = os.fork()
        if not child:
            signal.alarm(20)  # ends a child that waits for the lock of a thread that it does not have
            own = signal.getsignal(signal.SIGINT) is signal.default_int_handler
            with exclusive(model):
                os._exit(0 if own else 1)
    _, status = os.waitpid(child, 0)
    done.set()
    thread.join()
    assert os.waitstatus_to_exitcode(status) == 0


def test_interrupt_at_any_line_leaves_the_module_as_it_was() -> None:
    model = tiny("llama", num_hidden_layers=1)
    model.train()
    model.model.norm.eval()
    borrowed, fused = BorrowedModule(model), FusedModules(model)
    ids = torch.arange(5)[None]
    logits = model(input_ids=ids).logits
    before = module_state(model)

    def use() -> None:
        with borrowed.borrow(interface.NAME), fused.applied():
            deliver_signals()

    lines: dict[tuple[str, int], int] = {}  # how often each is reached
    _traced(use, lambda line: lines.update({line: lines.get(line, 0) + 1}))
    assert len(lines) > 60
    raised = 0
    for line, count in lines.items():
        for nth in {1, count}:
            raised += _interrupted(use, line, nth)
            assert module_state(model) == before, f"interrupted at {line}, time {nth}"
            assert not torch.is_inference_mode_enabled()
    assert raised > 60
    assert torch.equal(model(input_ids=ids).logits, logits)
    # The lock is free again.
    thread = threading.Thread(target=lambda: exclusive(model).__enter__(), daemon=True)
    thread.start()
    thread.join(10.0)
    assert not thread.is_alive()


def _interrupted(function: Callable[[], None], line: tuple[str, int], nth: int) -> bool:
    """Call a function and interrupt it when it reaches a line for the nth time; return whether it raised."""
    left = nth

    def interrupt(reached: tuple[str, int]) -> None:
        nonlocal left
        left -= reached == line
        if reached == line and left == 0:
            signal.raise_signal(signal.SIGINT)

    try:
        interruptible(lambda: _traced(function, interrupt))
    except KeyboardInterrupt:
        return True
    return False


def _traced(function: Callable[[], None], on_line: Callable[[tuple[str, int]], Any]) -> None:
    """Call a function; report each line of `_FILES` before it runs."""

    def trace(frame: FrameType, event: str, _argument: object) -> Any:
        name = frame.f_code.co_filename
        if not any(part in name for part in _FILES):
            return None
        if event == "line":
            on_line((name, frame.f_lineno))
        return trace

    own = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(own)
