"""Workloads: prompts with the number of tokens each must get, so that every engine does the same work.

A file is a list of ``{"ids": prompt token ids, "n": output tokens, "group": prompt index}``; samples of one prompt
stand next to each other and share its group. Run as a script, it writes one:

    python jobs/bench/workload.py MODEL OUT.json --requests 128 --samples 8 --prompts questions.jsonl --column question
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Output lengths of production chat requests are close to lognormal: in the Azure LLM inference trace of 2023 the
# median is 129 and the mean 211, from which sigma follows (mean = median * exp(sigma² / 2)).
MEDIAN_LENGTH = 129
SIGMA = math.sqrt(2 * math.log(211 / 129))
SHORTEST = 8


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt, and how many tokens to generate for it."""

    ids: tuple[int, ...]
    n: int
    group: int


@dataclass(frozen=True, slots=True)
class Shape:
    """What a workload looks like: completions in all, completions a prompt, and the longest of them."""

    requests: int = 128
    samples: int = 1
    max_new: int = 512
    seed: int = 7


NAMED = {
    "w1": Shape(),
    "w2": Shape(samples=8),
    "w3": Shape(requests=2048, max_new=2048),
    "w4": Shape(requests=2048, samples=16, max_new=2048),
}
"""For a CPU ``w1``: bulk inference, each prompt once; and ``w2``: RL rollouts, groups of eight. For a GPU ``w3`` and
``w4`` likewise, with groups of sixteen."""


def build(prompts: Sequence[Sequence[int]], shape: Shape, lengths: Sequence[int] | None = None) -> list[Request]:
    """Requests over prompts, with lengths drawn from those given, or from the lognormal fit.

    Raises:
        ValueError: there are too few prompts, or the samples do not divide the requests.
    """
    groups, rest = divmod(shape.requests, shape.samples)
    if rest:
        raise ValueError(f"{shape.requests} requests are no whole number of groups of {shape.samples} samples.")
    if len(prompts) < groups:
        raise ValueError(f"{groups} prompts are needed, but there are {len(prompts)}.")
    rng = random.Random(shape.seed)

    def length() -> int:
        drawn = round(rng.lognormvariate(math.log(MEDIAN_LENGTH), SIGMA)) if lengths is None else rng.choice(lengths)
        return min(max(SHORTEST, drawn), shape.max_new)

    return [Request(tuple(prompts[group]), length(), group) for group in range(groups) for _ in range(shape.samples)]


def read(path: Path) -> list[Request]:
    """The requests of a workload file.

    Raises:
        ValueError: it is no workload; the message names the entry.
    """
    entries = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} holds no list of requests.")
    requests = []
    for index, entry in enumerate(entries):
        try:
            request = Request(tuple(int(i) for i in entry["ids"]), int(entry["n"]), int(entry.get("group", index)))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path}, entry {index}: needs 'ids' (a list of token ids) and 'n' (a number).") from error
        if not request.ids or request.n < 1:
            raise ValueError(f"{path}, entry {index}: 'ids' must not be empty and 'n' must be at least 1.")
        requests.append(request)
    return requests


def write(requests: Sequence[Request], path: Path) -> None:
    """Write a workload file."""
    path.write_text(json.dumps([asdict(request) for request in requests]), encoding="utf-8")


def arithmetic_texts(count: int) -> list[str]:
    """The word problems that the default job runs on."""
    from rollout.arithmetic import problems

    return [problem["prompt"] for problem in problems(count)]


def file_texts(path: Path, column: str) -> list[str]:
    """One column of a JSONL file."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line)[column] for line in lines if line.strip()]


def csv_lengths(path: Path, column: str) -> list[int]:
    """Lengths to draw from: one column of a CSV file."""
    with path.open(encoding="utf-8", newline="") as rows:
        return [int(row[column]) for row in csv.DictReader(rows)]


def tokenised(model: str, texts: Sequence[str]) -> list[list[int]]:
    """Each text as the one user message of a chat, or as it is where the model has no chat template."""
    from rollout.models.load import ModelSource, load_tokenizer

    tokenizer = load_tokenizer(ModelSource(model))
    if not tokenizer.chat_template:
        return [list(tokenizer(text)["input_ids"]) for text in texts]
    chats = [[{"role": "user", "content": text}] for text in texts]
    encoded: Any = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=True)
    return [list(ids) for ids in encoded["input_ids"]]


def make(model: str, shape: Shape) -> list[Request]:
    """A workload that needs no file: generated word problems, lognormal lengths."""
    return build(prompts_for(model, shape), shape)


def without_weights(model: str) -> bool:
    """Whether a model is a folder with no weights, as `random_models` makes it: engines draw them."""
    return Path(model).is_dir() and not any(Path(model).glob("*.safetensors"))


def prompts_for(model: str, shape: Shape, texts: Sequence[str] | None = None) -> list[list[int]]:
    """Prompts of a workload: of ``texts``, or of generated word problems; drawn tokens where a model has no weights."""
    count = shape.requests // shape.samples
    if without_weights(model):
        rng = random.Random(shape.seed)
        vocabulary = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))["vocab_size"]
        # As long as questions of GSM8K in a chat: 91 tokens on average.
        return [[rng.randrange(vocabulary) for _ in range(rng.randint(46, 136))] for _ in range(count)]
    return tokenised(model, arithmetic_texts(count) if texts is None else texts[:count])


def describe(requests: Sequence[Request]) -> str:
    """One line on how much work it is."""
    prompts = sum(len(request.ids) for request in requests)
    groups = len({request.group for request in requests})
    tokens = sum(request.n for request in requests)
    return f"{len(requests)} requests over {groups} prompts, {prompts} prompt tokens, {tokens} output tokens"


def main() -> None:
    """Write a workload file."""
    import random_models  # needs more than the standard library

    standard = Shape()
    parser = argparse.ArgumentParser(description="Writes a workload file for the benchmark.")
    parser.add_argument("model", help="whose tokenizer to use: folder, GGUF file or Hub id; or random:NAME")
    parser.add_argument("out", type=Path)
    parser.add_argument("--requests", type=int, default=standard.requests)
    parser.add_argument("--samples", type=int, default=standard.samples)
    parser.add_argument("--max-new", type=int, default=standard.max_new)
    parser.add_argument("--seed", type=int, default=standard.seed)
    parser.add_argument("--prompts", type=Path, help="JSONL file; by default, generated word problems")
    parser.add_argument("--column", default="prompt")
    parser.add_argument("--lengths", type=Path, help="CSV file of output lengths; by default, a lognormal fit")
    parser.add_argument("--lengths-column", default="GeneratedTokens")
    given = parser.parse_args()
    shape = Shape(given.requests, given.samples, given.max_new, given.seed)
    texts = file_texts(given.prompts, given.column) if given.prompts else None
    lengths = csv_lengths(given.lengths, given.lengths_column) if given.lengths else None
    requests = build(prompts_for(random_models.resolve(given.model), shape, texts), shape, lengths)
    write(requests, given.out)
    print(describe(requests))


if __name__ == "__main__":
    main()
