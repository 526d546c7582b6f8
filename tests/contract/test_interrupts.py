"""Promise 6 under interrupts: Ctrl-C at any time leaves the module as it was, and the next call is right."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable

import pytest
import torch

from rollout import Engine, SamplingParams
from tests.support.devices import DEVICE
from tests.support.module_state import module_state
from tests.support.parity import random_prompts
from tests.support.tiny_models import tiny

_PARAMS = SamplingParams(n=2, max_new_tokens=12)
_INTERRUPTS = 20


def interrupted(function: Callable[[], object], after: float) -> None:
    """Call a function and send SIGINT after some seconds, or later than its end."""

    def send() -> None:
        time.sleep(after)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=send)

    def call() -> None:
        thread.start()
        function()
        thread.join()
        time.sleep(1.0)  # the signal may be noticed a little later

    with pytest.raises(KeyboardInterrupt):
        call()
    thread.join()


def test_random_interrupts_leave_the_module_as_it_was() -> None:
    seed = int(time.time())
    print(f"seed {seed}")
    rng = random.Random(seed)
    model = tiny("llama")
    model.train()
    ids = torch.tensor([[5, 6, 7, 8]], device=DEVICE)
    model(input_ids=ids, labels=ids).loss.backward()
    prompts = random_prompts(1, 6)
    engine = Engine(model, None)
    wanted = [(r.completion_ids, r.logprobs) for r in engine.generate(prompts, _PARAMS)]
    start = time.perf_counter()
    engine.generate(prompts, _PARAMS)
    seconds = time.perf_counter() - start
    before = module_state(model)
    for i in range(_INTERRUPTS):
        after = rng.uniform(0.0, 1.1 * seconds)
        if i % 4:
            interrupted(lambda: engine.generate(prompts, _PARAMS), after)
        else:
            interrupted(lambda: Engine(model, None), after)
        assert module_state(model) == before
        if i % 5 == 0:
            assert [(r.completion_ids, r.logprobs) for r in engine.generate(prompts, _PARAMS)] == wanted
    assert [(r.completion_ids, r.logprobs) for r in engine.generate(prompts, _PARAMS)] == wanted
    assert engine.stats is not None
    assert engine.stats.kv_bytes_held == 0
    assert [(r.completion_ids, r.logprobs) for r in Engine(model, None).generate(prompts, _PARAMS)] == wanted
