"""Measure what ending at k of n samples saves on a long-tailed workload, and what resuming the rest keeps.

    python -m jobs.bench.tails packaged:SmolLM2-135M-Instruct --device cpu --dtype float32
    python -m jobs.bench.tails random:tiny --device cpu --dtype float32 --prompts 32 --steps 3 --tokens 1024 --repeats 5

Completions end where the model ends them. A model with random weights ends at one of many stop ids: the lengths of a
prompt's samples are geometric, with means that are log-normal over the prompts (sigma 1). Each way takes the same
training steps, with prompts of their own: `whole` waits for all samples; `drop` ends a prompt at k of n and forgets the
rest; `resume` continues the rest along with the next step's prompts, and in the last step to the end. The ways run in
turns, so that a change of the machine's speed affects all alike; figures are medians over the turns.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from jobs.bench.lib import cli, workload
from rollout import Batch, Engine, FinishedPerPrompt, Record, SamplingParams
from rollout.arithmetic import problems
from rollout.models.loading.load import ModelSource, load_tokenizer


@dataclass(frozen=True, slots=True)
class Workload:
    """Training steps, each with prompts of its own."""

    steps: list[list[list[int]]]
    """Token ids by step and prompt."""
    params: list[list[SamplingParams]]
    """Of each prompt."""
    k: int


@dataclass(frozen=True, slots=True)
class Figures:
    """All steps of one way."""

    seconds: float
    cpu_seconds: float
    """Of this process: less disturbed by others than seconds are."""
    decode_steps: int
    finished: int
    """Samples with a whole completion."""
    kept_tokens: int
    """Completion tokens of these."""
    dropped_tokens: int
    """Tokens generated for nothing."""
    resumed_tokens: int
    """Tokens of unfinished completions that a later step continued."""


class Trainer:
    """Takes the steps of a workload and counts."""

    def __init__(self, engine: Engine, workload: Workload) -> None:
        self.engine, self.workload = engine, workload
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        self._decode_steps = 0
        self._finished: list[Record] = []
        self._resumed_tokens = 0
        self._generated = 0

    def step(self, number: int, *, early: bool, resume: tuple[Record, ...] = ()) -> Batch:
        """Generate for one step, along with the records of earlier ones."""
        params = self.workload.params
        of_resumed = [params[seed][int(row_id)] for seed, row_id in dict.fromkeys((r.seed, r.row_id) for r in resume)]
        self._resumed_tokens += sum(len(record.completion_ids) for record in resume)
        batch = self.engine.generate(
            self.workload.steps[number],
            of_resumed + params[number],
            seed=number,
            stop_when=FinishedPerPrompt(self.workload.k) if early else None,
            resume=resume,
        )
        self._decode_steps += batch.stats.steps
        self._generated += batch.stats.output_tokens
        self._finished += batch.finished
        return batch

    def figures(self) -> Figures:
        """Return what the steps so far came to."""
        kept = sum(len(record.completion_ids) for record in self._finished)
        return Figures(
            seconds=time.perf_counter() - self._wall,
            cpu_seconds=time.process_time() - self._cpu,
            decode_steps=self._decode_steps,
            finished=len(self._finished),
            kept_tokens=kept,
            dropped_tokens=self._generated - kept,
            resumed_tokens=self._resumed_tokens,
        )


def whole(trainer: Trainer) -> None:
    """Wait for all samples of every step."""
    for number in range(len(trainer.workload.steps)):
        trainer.step(number, early=False)


def drop(trainer: Trainer) -> None:
    """End every prompt at k of n, and forget the rest."""
    for number in range(len(trainer.workload.steps)):
        trainer.step(number, early=True)


def resume(trainer: Trainer) -> None:
    """End new prompts at k of n, and continue the rest in the next step; the last step has no next."""
    rest: tuple[Record, ...] = ()
    last = len(trainer.workload.steps) - 1
    for number in range(len(trainer.workload.steps)):
        rest = trainer.step(number, early=number < last, resume=rest).aborted


WAYS: dict[str, Callable[[Trainer], None]] = {"whole": whole, "drop": drop, "resume": resume}


def chats(options: argparse.Namespace, engine: Engine) -> Workload:
    """Return arithmetic problems as chats, a few for each step."""
    texts = [problem["prompt"] for problem in problems(options.prompts * options.steps)]
    ids = [engine.encode([{"role": "user", "content": text}]) for text in texts]
    assert engine.tokenizer is not None
    end = engine.tokenizer.eos_token_id
    params = SamplingParams(n=options.n, max_new_tokens=options.tokens, stop_token_ids=() if end is None else (end,))
    return in_steps(options, ids, [params] * len(ids))


def drawn(options: argparse.Namespace, vocabulary: int) -> Workload:
    """Return prompts of drawn tokens, whose samples end at one of so many ids that their mean length is as drawn."""
    rng = random.Random(0)
    count = options.prompts * options.steps
    ids = [[rng.randrange(3, vocabulary) for _ in range(64)] for _ in range(count)]
    means = [options.tokens / 16 * rng.lognormvariate(0, 1) for _ in range(count)]
    # Logits of random weights are nearly equal, so that each id is drawn about as often.
    ends = [tuple(range(3, 3 + max(1, min(vocabulary // 2, round(vocabulary / mean))))) for mean in means]
    params = [
        SamplingParams(n=options.n, max_new_tokens=options.tokens, ignore_eos=True, stop_token_ids=end) for end in ends
    ]
    return in_steps(options, ids, params)


def in_steps(options: argparse.Namespace, ids: Sequence[list[int]], params: Sequence[SamplingParams]) -> Workload:
    """Part the prompts among the steps."""
    starts = range(0, len(ids), options.prompts)
    return Workload(
        steps=[list(ids[i : i + options.prompts]) for i in starts],
        params=[list(params[i : i + options.prompts]) for i in starts],
        k=options.k,
    )


def describe_lengths(batch: Batch) -> str:
    """Describe the lengths of completions, and how much of a prompt's time its longest ones take."""
    lengths = sorted(len(record.completion_ids) for record in batch)
    shares = ", ".join(f"p{p} {lengths[min(len(lengths) - 1, len(lengths) * p // 100)]}" for p in (10, 50, 90, 100))
    return f"{len(lengths)} completions of one step, tokens: {shares}"


def main() -> None:
    """Run the ways in turns and print a table."""
    parser = cli.options("Measures what ending at k of n samples saves, and what resuming the rest keeps.")
    parser.add_argument("--prompts", type=int, default=4, help="prompts a step")
    parser.add_argument("--steps", type=int, default=2, help="training steps")
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--k", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=96, help="longest completion")
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()

    folder = cli.folder(parser, options)
    model = cli.model(folder, options)
    if workload.without_weights(folder):
        engine = Engine(model, None)
        work = drawn(options, model.config.vocab_size)
    else:
        engine = Engine(model, load_tokenizer(ModelSource(path=folder)))
        work = chats(options, engine)
    print(describe_lengths(engine.generate(work.steps[0], work.params[0], seed=0)), flush=True)
    turns: dict[str, list[Figures]] = {name: [] for name in WAYS}
    for repeat in range(options.repeats):
        for name, way in WAYS.items():
            trainer = Trainer(engine, work)
            way(trainer)
            turns[name].append(trainer.figures())
            print(f"turn {repeat + 1}  {name:7}{turns[name][-1]}", flush=True)
    print(f"\n{options.steps} steps of {options.prompts} prompts, {options.k} of {options.n}, {os.cpu_count()} CPUs\n")
    columns = ("seconds", "cpu_seconds", "decode_steps", "finished", "kept_tokens", "dropped_tokens", "resumed_tokens")
    print("| way | " + " | ".join(column.replace("_", " ") for column in columns) + " |")
    print("|---" * (1 + len(columns)) + "|")
    for name, runs in turns.items():
        values = [median(getattr(run, column) for run in runs) for column in columns]
        print(f"| {name} | " + " | ".join(f"{value:.1f}" if value % 1 else f"{value:.0f}" for value in values) + " |")


if __name__ == "__main__":
    main()
