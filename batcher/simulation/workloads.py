"""Simulated jobs: seeded prompt and output lengths, by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rollout.batcher.simulation.prefixes import Prefixes, common_beginnings
from rollout.batcher.types import FloatArray, IntArray, ceil_div

REQUESTS = 2000
"""Default number of rows of a named workload."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Rows of a job in order of arrival, all waiting from the start; arrays with one entry per row."""

    name: str
    prompt_tokens: IntArray
    output_tokens: IntArray
    """True lengths, from 1 to ``max_new_tokens``; only the oracle sees them."""
    max_new_tokens: IntArray
    groups: IntArray
    """Equal for rows with the same prompt, which share its full pages while one of them is live."""
    length_hints: FloatArray | None = None
    """Expected ``output_tokens``, NaN where unknown."""
    prefixes: Prefixes | None = None
    """Beginnings that prompts of different groups have in common; None: they have none."""

    def __len__(self) -> int:
        return len(self.prompt_tokens)

    def reordered(self, order: IntArray) -> Workload:
        """Return the same rows in another order."""
        hints = self.length_hints
        return Workload(
            name=self.name,
            prompt_tokens=self.prompt_tokens[order],
            output_tokens=self.output_tokens[order],
            max_new_tokens=self.max_new_tokens[order],
            groups=self.groups[order],
            length_hints=None if hints is None else hints[order],
            prefixes=None if self.prefixes is None else self.prefixes.reordered(order),
        )


def workload_of(
    name: str,
    prompt_tokens: FloatArray | IntArray,
    output_tokens: FloatArray | IntArray,
    max_new: int | None = None,
    group: int = 1,
    length_hints: FloatArray | None = None,
    prefixes: Prefixes | None = None,
) -> Workload:
    """Build a workload of these lengths, rounded and at least one token.

    Args:
        name: name of the workload.
        prompt_tokens: [rows] prompt lengths.
        output_tokens: [rows] output lengths.
        max_new: limit at which outputs are cut; None: the smallest power of two that holds the longest output.
        group: number of consecutive rows that have the prompt of the first of them.
        length_hints: [rows] expected output lengths, or None.
        prefixes: beginnings that these prompts have in common, or None.
    """
    prompts, outputs = (np.rint(np.maximum(1.0, x)).astype(np.int64) for x in (prompt_tokens, output_tokens))
    if max_new is None:
        max_new = 1 << math.ceil(math.log2(max(2, int(outputs.max(initial=1)))))
    groups = np.arange(len(prompts), dtype=np.int64) // group
    limits = np.full(len(prompts), max_new, np.int64)
    return Workload(
        name=name,
        prompt_tokens=prompts[groups * group],
        output_tokens=np.minimum(outputs, max_new),
        max_new_tokens=limits,
        groups=groups,
        length_hints=length_hints,
        prefixes=None if prefixes is None else prefixes.reordered(groups * group),
    )


def workload_of_prompts(
    name: str, prompts: Sequence[Sequence[int]], output_tokens: Sequence[int], *, shares: bool = True
) -> Workload:
    """Build a workload of these prompts and exactly these outputs.

    Equal prompts that stand next to each other are a group, as in the engine.

    Args:
        name: name of the workload.
        prompts: [rows] token ids.
        output_tokens: [rows] output lengths, which are the limits as well.
        shares: prompts of different groups share their beginnings.
    """
    new = [row == 0 or list(prompts[row]) != list(prompts[row - 1]) for row in range(len(prompts))]
    groups = np.cumsum(new) - 1
    beginnings = common_beginnings([prompt for prompt, first in zip(prompts, new, strict=True) if first])
    outputs = np.array(output_tokens, np.int64)
    return Workload(
        name=name,
        prompt_tokens=np.array([len(prompt) for prompt in prompts], np.int64),
        output_tokens=outputs,
        max_new_tokens=outputs.copy(),
        groups=groups,
        prefixes=beginnings.reordered(groups) if shares and len(beginnings.tokens) else None,
    )


def named_workload(
    name: str, requests: int | None = None, seed: int = 0, max_new: int | None = None, group: int | None = None
) -> Workload:
    """Generate one of ``WORKLOADS``.

    Args:
        name: name of the workload.
        requests: number of rows; None: ``REQUESTS``.
        seed: seed of the lengths.
        max_new: limit instead of the workload's own; see ``workload_of``.
        group: group size instead of the workload's own; see ``workload_of``.

    Raises:
        KeyError: the workload is unknown.
    """
    generate = WORKLOADS[name]
    rng = np.random.default_rng([seed, *name.encode()])
    lengths = generate(rng, REQUESTS if requests is None else requests)
    return workload_of(
        name,
        prompt_tokens=lengths.prompts,
        output_tokens=lengths.outputs,
        max_new=max_new or lengths.max_new,
        group=group or lengths.group,
        prefixes=lengths.prefixes,
    )


def with_hints(workload: Workload, sigma: float, seed: int = 0) -> Workload:
    """Add hints with a log-normal error of standard deviation ``sigma`` (of the logarithm); inf means random hints."""
    rng = np.random.default_rng([seed, 7])
    hints: FloatArray = workload.output_tokens.astype(np.float64)
    if math.isinf(sigma):
        hints = rng.permutation(hints)
    else:
        hints *= np.exp(sigma * rng.standard_normal(len(workload)))
    return replace(workload, length_hints=hints)


# -- the named workloads ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Lengths:
    prompts: FloatArray
    outputs: FloatArray
    max_new: int
    group: int = 1
    prefixes: Prefixes | None = None


def _lognormal(rng: np.random.Generator, mean: float, cv: float, count: int) -> FloatArray:
    variance = math.log1p(cv**2)
    return np.exp(math.log(mean) - variance / 2 + math.sqrt(variance) * rng.standard_normal(count))


def _prompts(rng: np.random.Generator, count: int) -> FloatArray:
    """Draw prompts of 200 tokens on average: a question with its instructions."""
    return _lognormal(rng, 200, 0.5, count)


def _constant(rng: np.random.Generator, count: int) -> _Lengths:  # noqa: ARG001 - nothing is random
    return _Lengths(np.full(count, 128.0), np.full(count, 128.0), 512)


def _uniform(rng: np.random.Generator, count: int) -> _Lengths:
    return _Lengths(_prompts(rng, count), rng.uniform(1, 600, count), 1024)


def _geometric(rng: np.random.Generator, count: int) -> _Lengths:
    return _Lengths(_prompts(rng, count), rng.geometric(1 / 300, count).astype(np.float64), 4096)


def _lognormal_narrow(rng: np.random.Generator, count: int) -> _Lengths:
    return _Lengths(_prompts(rng, count), _lognormal(rng, 300, 0.6, count), 4096)


def _lognormal_wide(rng: np.random.Generator, count: int) -> _Lengths:
    return _Lengths(_prompts(rng, count), _lognormal(rng, 300, 1.5, count), 8192)


def _bimodal(rng: np.random.Generator, count: int) -> _Lengths:
    return _Lengths(_prompts(rng, count), np.where(rng.random(count) < 0.8, 200.0, 4000.0), 8192)


def _drifting(rng: np.random.Generator, count: int) -> _Lengths:
    """Draw outputs whose mean grows fourfold from the first row to the last."""
    means = 150 * 4 ** (np.arange(count) / max(1, count - 1))
    return _Lengths(_prompts(rng, count), means * _lognormal(rng, 1, 0.6, count), 4096)


def _groups_of_16(rng: np.random.Generator, count: int) -> _Lengths:
    """Draw outputs with a coefficient of variation of 0.8 between prompts and 0.5 between samples of a prompt."""
    prompt_means = np.repeat(_lognormal(rng, 500, 0.8, ceil_div(count, 16)), 16)[:count]
    return _Lengths(_lognormal(rng, 400, 0.5, count), prompt_means * _lognormal(rng, 1, 0.5, count), 4096, 16)


_LEVELS = (0, .05, .1, .2, .3, .4, .5, .6, .65, .7, .75, .8, .85, .9, .95, .975, .99, .999, 1)  # fmt: skip
# Quantiles at these levels of the two traces of 2023 in AzurePublicDataset (Patel et al., Splitwise, 2024; CC-BY 4.0).
# Prompts and outputs are drawn independently, because their rank correlation is only 0.07 and -0.02.
_CONVERSATION = (
    (2, 181, 207, 387, 403, 703, 1020, 1071, 1097, 1130, 1189, 1315, 1876, 2734, 4083, 4092, 4142, 6179, 14050),
    (7, 41, 54, 77, 91, 103, 129, 177, 217, 384, 395, 400, 411, 424, 451, 522, 601, 954, 1000),
)
_CODE = (
    (3, 75, 147, 386, 770, 1075, 1469, 1909, 2164, 2433, 2744, 3192, 3920, 5188, 7303, 7435, 7436, 7437, 7437),
    (6, 6, 7, 8, 9, 11, 13, 16, 18, 20, 24, 29, 39, 55, 90, 145, 251, 825, 1899),
)


def _azure(rng: np.random.Generator, count: int, quantiles: tuple[tuple[int, ...], ...], max_new: int) -> _Lengths:
    prompts, outputs = (np.interp(rng.random(count), _LEVELS, values) for values in quantiles)
    return _Lengths(prompts, outputs, max_new)


def _conversation(rng: np.random.Generator, count: int) -> _Lengths:
    return _azure(rng, count, _CONVERSATION, 1024)


def _code(rng: np.random.Generator, count: int) -> _Lengths:
    return _azure(rng, count, _CODE, 2048)


_TASK_ROWS = 100
_SYSTEM_TOKENS = 300
_TURNS = 4


def _few_shot(rng: np.random.Generator, count: int) -> _Lengths:
    """Draw tasks of 100 questions, all of which begin with the same 1,000 tokens on average: an evaluation."""
    tasks = np.arange(count) // _TASK_ROWS
    shots = np.maximum(16, np.rint(_lognormal(rng, 1000, 0.5, ceil_div(count, _TASK_ROWS)))).astype(np.int64)
    return _Lengths(
        prompts=shots[tasks].astype(np.float64) + np.maximum(1.0, _lognormal(rng, 80, 0.5, count)),
        outputs=_lognormal(rng, 100, 1.0, count),
        max_new=1024,
        prefixes=Prefixes(parents=np.full(len(shots), -1, np.int64), tokens=shots, nodes=tasks),
    )


def _turns(rng: np.random.Generator, count: int) -> _Lengths:
    """Draw conversations of four turns under one system text: each prompt begins with the whole prompt before."""
    conversations = ceil_div(count, _TURNS)
    prompts = _SYSTEM_TOKENS + rng.integers(100, 500, (conversations, _TURNS)).cumsum(1)
    # Node 0 is the system text; the others are the prompts with which another turn begins.
    nodes = 1 + np.arange(conversations * (_TURNS - 1)).reshape(conversations, _TURNS - 1)
    parents = np.concatenate((np.zeros((conversations, 1), np.int64), nodes[:, :-1]), axis=1)
    return _Lengths(
        prompts=prompts.ravel()[:count].astype(np.float64),
        outputs=_lognormal(rng, 150, 0.8, count),
        max_new=1024,
        prefixes=Prefixes(
            parents=np.append(-1, parents.ravel()),
            tokens=np.append(_SYSTEM_TOKENS, prompts[:, :-1].ravel()),
            nodes=np.concatenate((nodes, nodes[:, -1:]), axis=1).ravel()[:count],
        ),
    )


WORKLOADS: Mapping[str, Callable[[np.random.Generator, int], _Lengths]] = {
    "const": _constant,
    "unif": _uniform,
    "geom": _geometric,
    "ln0.6": _lognormal_narrow,
    "ln1.5": _lognormal_wide,
    "bimod": _bimodal,
    "drift": _drifting,
    "conv": _conversation,
    "code": _code,
    "grpo": _groups_of_16,
    "shots": _few_shot,
    "turns": _turns,
}
"""Generators of the named workloads; prompts of the last two begin alike."""
