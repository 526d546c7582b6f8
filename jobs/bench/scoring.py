"""Tokens scored per second: the engine against padded forwards in batches, as trainers compute log-probabilities.

    python -m jobs.bench.scoring packaged:SmolLM2-135M-Instruct --device cpu --dtype float32
    python -m jobs.bench.scoring random:tiny --device cpu --dtype float32 --scale 4 --repeats 5

Both score the same pairs in turns in one process; medians are printed, and the largest difference of their numbers.
"""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

from jobs.bench.lib import cli
from rollout import Engine

Pairs = list[tuple[list[int], list[int]]]


@dataclass(frozen=True, slots=True)
class Workload:
    """Prompts of one length, and samples of each of mixed lengths."""

    name: str
    prompts: int
    samples: int
    prompt_tokens: int
    shortest: int
    longest: int

    def pairs(self, vocabulary: int, scale: int) -> Pairs:
        """Return pairs of random ids, the samples of a prompt side by side, of ``scale`` times as many prompts."""
        rng = random.Random(0)

        def ids(count: int) -> list[int]:
            return [rng.randrange(3, vocabulary) for _ in range(count)]

        prompts = [ids(self.prompt_tokens) for _ in range(scale * self.prompts)]
        return [(p, ids(rng.randint(self.shortest, self.longest))) for p in prompts for _ in range(self.samples)]


WORKLOADS = (
    Workload("short prompts", prompts=1, samples=8, prompt_tokens=60, shortest=10, longest=200),
    Workload("long prompts", prompts=1, samples=8, prompt_tokens=500, shortest=10, longest=60),
    Workload("no shared prompts", prompts=8, samples=1, prompt_tokens=60, shortest=10, longest=200),
)


def padded(model: Any, pairs: Pairs, batch: int) -> list[list[float]]:
    """Score with prompts padded on the left and completions on the right, ``batch`` pairs a forward."""
    found: list[list[float]] = []
    for start in range(0, len(pairs), batch):
        part = pairs[start : start + batch]
        width, length = (max(len(pair[i]) for pair in part) for i in (0, 1))
        rows = [[0] * (width - len(p)) + p + c + [0] * (length - len(c)) for p, c in part]
        masks = [[0] * (width - len(p)) + [1] * len(p + c) + [0] * (length - len(c)) for p, c in part]
        ids, mask = (torch.tensor(values, device=model.device) for values in (rows, masks))
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = model(
                input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=length + 1, use_cache=False
            ).logits[:, :-1]
        tokens = ids[:, width:]
        for i, (_, completion) in enumerate(part):
            scores = logits[i, : len(completion)].float()
            chosen = scores.gather(1, tokens[i, : len(completion), None])[:, 0]
            found.append((chosen - scores.logsumexp(1)).tolist())
    return found


def main() -> None:
    """Compare, and print a table."""
    parser = cli.options(str(__doc__).splitlines()[0])
    parser.add_argument("--batch", type=int, default=8, help="pairs of a padded forward")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--scale", type=int, default=1, help="times as many prompts")
    given = parser.parse_args()
    model = cli.model(cli.folder(parser, given), given)
    engine = Engine(model, None)
    print("| workload | scored tokens | engine, tokens/s | padded, tokens/s | ratio | largest difference |")
    print("|---|---|---|---|---|---|")
    for workload in WORKLOADS:
        pairs = workload.pairs(model.config.vocab_size, given.scale)
        prompts, completions = (list(column) for column in zip(*pairs, strict=True))
        tokens = sum(map(len, completions))
        seconds: dict[str, list[float]] = {"engine": [], "padded": []}
        worst = 0.0
        for _ in range(given.repeats + 1):  # the first is a warm-up
            start = time.perf_counter()
            own = engine.score(prompts, completions).logprobs
            middle = time.perf_counter()
            other = padded(model, pairs, given.batch)
            seconds["engine"].append(middle - start)
            seconds["padded"].append(time.perf_counter() - middle)
            worst = max(abs(a - b) for x, y in zip(own, other, strict=True) for a, b in zip(x or [], y, strict=True))
        speeds = {name: tokens / statistics.median(taken[1:]) for name, taken in seconds.items()}
        print(
            f"| {workload.name} | {tokens:,} | {speeds['engine']:,.0f} | {speeds['padded']:,.0f} | "
            f"{speeds['engine'] / speeds['padded']:.2f} | {worst:.1e} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
