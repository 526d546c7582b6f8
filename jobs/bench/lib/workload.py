"""Workloads: prompts with the number of tokens each must get, so that every engine does the same work.

A file is a list of ``{"ids": prompt token ids, "n": output tokens, "group": number}``. Prompts of one group stand next
to each other, and are equal or begin alike. ``python -m jobs.bench.make_workload`` writes one.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

# Output lengths of production chat requests are close to lognormal: in the Azure LLM inference trace of 2023 the
# median is 129 and the mean 211, from which sigma follows (mean = median * exp(sigma² / 2)).
MEDIAN_LENGTH = 129
SIGMA = math.sqrt(2 * math.log(211 / 129))
SHORTEST = 8

# The same trace: half of the prompts are longer than 1,020 tokens. The logarithms of those have this median and sigma.
LONG_PROMPT = 1593
LONG_SIGMA = 0.52
SHORTEST_LONG_PROMPT = 1020
LONGEST_PROMPT = 7000

FEW_SHOT_TOKENS = 1000
REASONING_LENGTHS = (256, 384, 512, 768, 1024, 1024, 1536, 2000)
SYSTEM_TOKENS = 300
PROBLEMS = 4000
"""Word problems that prompts of `Field` are cut from: some 100,000 tokens."""


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt, and how many tokens to generate for it."""

    ids: tuple[int, ...]
    n: int
    group: int


@dataclass(frozen=True, slots=True)
class Shape:
    """The shape of a workload: requests, samples per prompt, and the longest output."""

    requests: int = 128
    samples: int = 1
    max_new: int = 512
    seed: int = 7


class Source:
    """The text that prompts are cut from.

    Args:
        problems: token ids of a question and of its answer each.
        seed: of all draws.
    """

    def __init__(self, problems: Sequence[tuple[Sequence[int], Sequence[int]]], seed: int) -> None:
        self.problems = problems
        self.rng = random.Random(seed)
        self._text = [token for problem in problems for part in problem for token in part]

    def piece(self, tokens: int) -> tuple[int, ...]:
        """Return ``count`` tokens of the problems from a random place."""
        start = self.rng.randrange(len(self._text) - tokens + 1)
        return tuple(self._text[start : start + tokens])

    def length(self, median: float, sigma: float, shortest: int, longest: int) -> int:
        """Draw a lognormal length within bounds."""
        return min(max(shortest, round(self.rng.lognormvariate(math.log(median), sigma))), longest)


def long_prompts(source: Source) -> list[Request]:
    """Make long prompts with short answers: documents to summarise or to search."""
    lengths = [source.length(LONG_PROMPT, LONG_SIGMA, SHORTEST_LONG_PROMPT, LONGEST_PROMPT) for _ in range(8)]
    return [
        Request(source.piece(length), source.length(MEDIAN_LENGTH, SIGMA, SHORTEST, 64), group)
        for group, length in enumerate([*lengths, LONGEST_PROMPT])
    ]


def few_shot(source: Source) -> list[Request]:
    """Make many questions after the same solved problems: an evaluation."""
    shots: tuple[int, ...] = ()
    shown = 0
    while len(shots) < FEW_SHOT_TOKENS:
        question, answer = source.problems[shown]
        shots += (*question, *answer)
        shown += 1
    asked = [question for question, _ in source.problems[shown : shown + 48]]
    return [Request((*shots, *question), source.rng.randint(1, 64), 0) for question in asked]


def reasoning(source: Source) -> list[Request]:
    """Make few short prompts with long answers: reasoning."""
    return [Request(source.piece(100), length, group) for group, length in enumerate(REASONING_LENGTHS)]


def conversations(source: Source) -> list[Request]:
    """Make conversations under one system text: each prompt begins with the whole prompt before."""
    system, requests = source.piece(SYSTEM_TOKENS), []
    for _ in range(8):
        ids = system
        for _ in range(4):
            ids += source.piece(source.rng.randint(100, 499))
            requests.append(Request(ids, 64, 0))
    return requests


@dataclass(frozen=True, slots=True)
class Field:
    """A workload at the sizes of one field of use."""

    requests: Callable[[Source], list[Request]]
    seed: int = 3


NAMED: dict[str, Shape | Field] = {
    "w1": Shape(),
    "w2": Shape(samples=8),
    "w3": Shape(requests=2048, max_new=2048),
    "w4": Shape(requests=2048, samples=16, max_new=2048),
    "w5": Field(long_prompts),
    "w6": Field(few_shot),
    "w7": Field(reasoning),
    "w8": Field(conversations),
}
"""For a CPU ``w1``: bulk inference, each prompt once; and ``w2``: RL rollouts, groups of eight. For a GPU ``w3`` and
``w4`` likewise, with groups of sixteen. ``w5`` to ``w8`` are at other sizes: long prompts; a long beginning in common;
a small batch of long answers; conversations."""


def build(prompts: Sequence[Sequence[int]], shape: Shape, lengths: Sequence[int] | None = None) -> list[Request]:
    """Make requests over prompts, with lengths drawn from those given or from the lognormal fit.

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


def shorten(requests: Sequence[Request], fraction: float) -> list[Request]:
    """Return the same requests with a fraction of their output tokens: as many rows live at once, for less time."""
    return [replace(request, n=max(1, round(request.n * fraction))) for request in requests]


def read(path: Path) -> list[Request]:
    """Read the requests of a workload file.

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
    """Return the word problems that the default job runs on."""
    from rollout.arithmetic import problems

    return [problem["prompt"] for problem in problems(count)]


def file_texts(path: Path, column: str) -> list[str]:
    """Read one column of a JSONL file."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line)[column] for line in lines if line.strip()]


def csv_lengths(path: Path, column: str) -> list[int]:
    """Read lengths to draw from: one column of a CSV file."""
    with path.open(encoding="utf-8", newline="") as rows:
        return [int(row[column]) for row in csv.DictReader(rows)]


def tokenised(model: str, texts: Sequence[str]) -> list[list[int]]:
    """Tokenise each text as the only user message of a chat, or as it is without a chat template."""
    from rollout.models.loading.load import ModelSource, load_tokenizer

    tokenizer = load_tokenizer(ModelSource(model))
    if not tokenizer.chat_template:
        return [list(tokenizer(text)["input_ids"]) for text in texts]
    chats = [[{"role": "user", "content": text}] for text in texts]
    encoded: Any = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=True)
    return [list(ids) for ids in encoded["input_ids"]]


def make(model: str, kind: Shape | Field) -> list[Request]:
    """Make a workload from generated word problems and fitted lengths."""
    if isinstance(kind, Shape):
        return build(prompts_for(model, kind), kind)
    return within(kind.requests(Source(problems_for(model, PROBLEMS), kind.seed)), context_of(model))


def within(requests: Sequence[Request], context: int | None) -> list[Request]:
    """Fit requests into a model's context: cut answers to half of it at least, then the ends of prompts."""
    if context is None:
        return list(requests)
    fitting = []
    for request in requests:
        n = min(request.n, max(context - len(request.ids), context // 2))
        fitting.append(replace(request, ids=request.ids[: context - n], n=n))
    return fitting


def context_of(model: str) -> int | None:
    """Return the model's limit on prompt and answer together, or None."""
    from transformers import AutoConfig

    from rollout.models.module.inspect import context_limit

    path = Path(model)
    if path.is_file():
        return context_limit(AutoConfig.from_pretrained(path.parent, gguf_file=path.name))
    return context_limit(AutoConfig.from_pretrained(model))


def without_weights(model: str) -> bool:
    """Return whether a model folder has no weights, so that engines draw them (`random_models`)."""
    return Path(model).is_dir() and not any(Path(model).glob("*.safetensors"))


def prompts_for(model: str, shape: Shape, texts: Sequence[str] | None = None) -> list[list[int]]:
    """Return prompts from ``texts`` or word problems; random tokens for a model without weights."""
    count = shape.requests // shape.samples
    if without_weights(model):
        rng = random.Random(shape.seed)
        vocabulary = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))["vocab_size"]
        # The lengths of GSM8K questions in a chat: 91 tokens on average.
        return [[rng.randrange(vocabulary) for _ in range(rng.randint(46, 136))] for _ in range(count)]
    return tokenised(model, arithmetic_texts(count) if texts is None else texts[:count])


def problems_for(model: str, count: int) -> list[tuple[list[int], list[int]]]:
    """Return word problems as ids of question and answer; random tokens for a model without weights."""
    if without_weights(model):
        rng = random.Random(0)
        vocabulary = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))["vocab_size"]

        def drawn(tokens: int) -> list[int]:
            return [rng.randrange(vocabulary) for _ in range(tokens)]

        return [(drawn(rng.randint(10, 35)), drawn(4)) for _ in range(count)]
    from rollout.arithmetic import problems
    from rollout.models.loading.load import ModelSource, load_tokenizer

    tokenizer = load_tokenizer(ModelSource(model))

    def encoded(texts: list[str]) -> list[list[int]]:
        return [list(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]

    found = problems(count)
    questions = encoded([f"Question: {problem['prompt']}\nAnswer:" for problem in found])
    answers = encoded([f" {problem['answer']}\n\n" for problem in found])
    return list(zip(questions, answers, strict=True))


def describe(requests: Sequence[Request]) -> str:
    """Describe the amount of work in one line."""
    lengths = [len(request.ids) for request in requests]
    prompts = len({request.ids for request in requests})
    return (
        f"{len(requests)} requests over {prompts} prompts, {sum(lengths)} prompt tokens (longest {max(lengths)}), "
        f"{sum(request.n for request in requests)} output tokens"
    )


def main() -> None:
    """Write a workload file."""
    from jobs.bench.lib import random_models  # needs more than the standard library

    standard = Shape()
    parser = argparse.ArgumentParser(description="Writes a workload file for the benchmark.")
    parser.add_argument("model", help="whose tokenizer to use: folder, GGUF file or Hub id; or random:NAME")
    parser.add_argument("out", type=Path)
    parser.add_argument("--named", choices=NAMED, help="one of these, as it is; options below do not count then")
    parser.add_argument("--requests", type=int, default=standard.requests)
    parser.add_argument("--samples", type=int, default=standard.samples)
    parser.add_argument("--max-new", type=int, default=standard.max_new)
    parser.add_argument("--seed", type=int, default=standard.seed)
    parser.add_argument("--prompts", type=Path, help="JSONL file; by default, generated word problems")
    parser.add_argument("--column", default="prompt")
    parser.add_argument("--lengths", type=Path, help="CSV file of output lengths; by default, a lognormal fit")
    parser.add_argument("--lengths-column", default="GeneratedTokens")
    given = parser.parse_args()
    model = random_models.resolve(given.model)
    if given.named:
        requests = make(model, NAMED[given.named])
        write(requests, given.out)
        print(describe(requests))
        return
    shape = Shape(given.requests, given.samples, given.max_new, given.seed)
    texts = file_texts(given.prompts, given.column) if given.prompts else None
    lengths = csv_lengths(given.lengths, given.lengths_column) if given.lengths else None
    requests = build(prompts_for(model, shape, texts), shape, lengths)
    write(requests, given.out)
    print(describe(requests))
