"""Measure what a library call costs before its first token, and what it costs to notice changed weights.

    python -m jobs.bench.call_cost [MODEL] [--dtype bfloat16] [--rounds 2]

Calls of one engine follow each other as in training: the first, one with the same weights, and one after an optimizer
step. All weights are trained, and then a LoRA on all linear layers. For each call it prints the seconds before its
first step and their share of a call of 8 prompts x 32 tokens and of 32 x 64, and then the time of a look at the
weights. CPU seconds of the process stand beside wall seconds: on a busy machine only they are comparable. The fastest
of some rounds counts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from rollout import Engine, SamplingParams
from rollout.engine.loop import Loop
from rollout.models.loading.load import ModelSource, load_model
from rollout.models.module.changes import ModuleWatch
from rollout.requests import Request

SETTINGS = ((8, 32), (32, 64))
"""Prompts and new tokens of the calls that the time is a share of."""
PROMPT_TOKENS = 24
SHORT_RECORDS = 200

Seconds = tuple[float, float]
"""Wall and CPU."""


def clocks() -> Seconds:
    """Return the current wall and CPU time."""
    return time.perf_counter(), time.process_time()


def since(start: Seconds) -> Seconds:
    """Return the time that has passed."""
    wall, cpu = clocks()
    return wall - start[0], cpu - start[1]


def requests(prompts: int, tokens: int) -> list[Request]:
    """Return requests of equal lengths with prompts of their own."""
    params = SamplingParams(max_new_tokens=tokens, ignore_eos=True)
    return [Request(str(i), [(7 * i + 3 * j) % 1000 + 5 for j in range(PROMPT_TOKENS)], params) for i in range(prompts)]


def call(engine: Engine, prompts: int, tokens: int) -> tuple[Seconds, Seconds]:
    """Return the time before the first step begins, and the time of the whole call."""
    first: list[Seconds] = []
    own, start = Loop._guarded_step, clocks()

    def step(loop: Loop) -> None:
        if not first:
            first.append(since(start))
        own(loop)

    Loop._guarded_step = step  # type: ignore[method-assign, assignment]
    try:
        for _ in engine.run(requests(prompts, tokens), weights_fixed=True):
            pass
    finally:
        Loop._guarded_step = own  # type: ignore[method-assign]
    return first[0], since(start)


def whole_call(engine: Engine, prompts: int, tokens: int) -> Seconds:
    """Return the time of a whole call."""
    return call(engine, prompts, tokens)[1]


def take_step(model: torch.nn.Module) -> None:
    """Change all trained weights as a fused optimizer does."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.full_like(parameter, 1e-3)
    torch.optim.AdamW(trained, lr=1e-6, fused=True).step()
    for parameter in trained:
        parameter.grad = None


def least(times: list[Seconds]) -> Seconds:
    """Return the least wall and the least CPU time."""
    return min(wall for wall, _ in times), min(cpu for _, cpu in times)


def best(work: Callable[[], Seconds], rounds: int) -> Seconds:
    """Return the least wall and CPU time of some rounds."""
    return least([work() for _ in range(rounds)])


def timed(work: Callable[[], object]) -> Seconds:
    """Return the time of some work."""
    start = clocks()
    work()
    return since(start)


def stream_of_short_records(engine: Engine) -> tuple[float, int]:
    """Return the wall seconds of a stream of short records, and its steps."""
    params = SamplingParams(max_new_tokens=4, ignore_eos=True)
    start = time.perf_counter()
    for _ in engine.run([Request(str(i), [5, 6, 7, i % 900 + 8], params) for i in range(SHORT_RECORDS)]):
        pass
    assert engine.stats is not None
    return time.perf_counter() - start, engine.stats.steps


def adapted(model: Any) -> Any:
    """Return the model with a LoRA on all linear layers."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False))


def measure(model: Any, rounds: int) -> None:
    """Measure calls on a model and print a table."""
    engines: list[Engine] = []
    made = timed(lambda: engines.append(Engine(model, None)))
    engine = engines[0]
    print(f"Engine(): {made[0]:.2f} s wall, {made[1]:.2f} s CPU")
    prompts = SETTINGS[0][0]
    before = {"1, first": call(engine, prompts, 1)[0]}
    before["2, same weights"] = best(lambda: call(engine, prompts, 1)[0], rounds)
    after: list[Seconds] = []
    for _ in range(rounds):
        take_step(model)
        after.append(call(engine, prompts, 1)[0])
    before["3, after a step"] = least(after)
    whole = [best(partial(whole_call, engine, *setting), rounds) for setting in SETTINGS]
    print("call              wall s   CPU s" + "".join(f"   of {p} x {t} (wall, CPU)" for p, t in SETTINGS))
    for name, (wall, cpu) in before.items():
        shares = "".join(f"        {wall / all_wall:6.1%} {cpu / all_cpu:6.1%}" for all_wall, all_cpu in whole)
        print(f"{name:16}  {wall:6.3f}  {cpu:6.3f}{shares}")
    print(
        "whole calls:", ", ".join(f"{p} x {t} {wall:.2f} s" for (p, t), (wall, _) in zip(SETTINGS, whole, strict=True))
    )
    watch = ModuleWatch(model)
    look = best(lambda: timed(watch.look), 20)
    print(f"a look at the weights: {1e3 * look[0]:.1f} ms wall, {1e3 * look[1]:.1f} ms CPU")
    seconds, steps = stream_of_short_records(engine)
    print(f"{SHORT_RECORDS:,} records of 4 tokens: {seconds:.1f} s, {steps} steps of {1e3 * seconds / steps:.1f} ms")


def main() -> None:
    """Measure training of all weights, then of a LoRA."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="packaged:SmolLM2-135M-Instruct")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    model: Any = load_model(ModelSource(path=options.model, dtype=options.dtype), torch.device("cpu"))
    print("all weights trained")
    measure(model, options.rounds)
    print("a LoRA trained")
    measure(adapted(model), options.rounds)


if __name__ == "__main__":
    main()
