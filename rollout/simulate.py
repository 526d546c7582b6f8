"""Simulate batching policies on recorded or generated lengths, without a model."""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import numpy as np

from rollout.argument_parser import SentenceParser
from rollout.batcher.simulation.compare import Comparison, Spec, parse_spec
from rollout.batcher.simulation.prefixes import Prefixes, labelled
from rollout.batcher.simulation.simulator import Machine
from rollout.batcher.simulation.workloads import WORKLOADS, Workload, named_workload, workload_of
from rollout.batcher.suggestions import describe_names
from rollout.batcher.types import IntArray
from rollout.errors import Exit, InputError
from rollout.logs import say

_DEFAULT_POLICIES = "static:256,memory,sla,paper,watermark:0.02,predictive,oracle"
# Names of length columns, in lower case; the first of each is that of Azure's traces.
_PROMPT_COLUMNS = ("contexttokens", "prompt_tokens", "prompt", "input_tokens", "input")
_OUTPUT_COLUMNS = ("generatedtokens", "output_tokens", "output", "completion_tokens", "completion")
_HINT_COLUMN = "length_hint"
# A name of the beginning that a prompt has in common with others, and its length.
_PREFIX_COLUMN, _PREFIX_TOKENS_COLUMN = "prefix", "prefix_tokens"


@dataclass(frozen=True, slots=True)
class Result:
    """Result of a policy on a workload with one seed; the fields are the keys of ``--json``."""

    policy: str
    workload: str
    seed: int
    tokens_per_s: float
    vs_best_static: float
    """Tokens per second relative to the best static batch (that keeps the budget, if there is one)."""
    vs_oracle: float
    """Tokens per second relative to the oracle, which knows all lengths and keeps the order of arrival."""
    recompute_share: float
    """Share of the time spent on recomputing tokens."""
    over_budget_share: float | None
    """Share of the steps that exceed the budget; None without a budget."""
    rows_mean: float
    rows_max: int
    lower_bound_s: float
    total_s: float


def compare(comparison: Comparison, specs: Sequence[Spec]) -> list[Result]:
    """Simulate all policies on one job."""
    static = comparison.best_static.outcome.tokens_per_s
    results = []
    for spec in specs:
        outcome = comparison.run(spec)
        results.append(
            Result(
                policy=spec.text,
                workload=comparison.workload.name,
                seed=comparison.seed,
                tokens_per_s=outcome.tokens_per_s,
                vs_best_static=outcome.tokens_per_s / static,
                vs_oracle=outcome.tokens_per_s / comparison.oracle.tokens_per_s,
                recompute_share=outcome.recompute_share,
                over_budget_share=None if comparison.budget_ms is None else outcome.over(comparison.budget_ms),
                rows_mean=outcome.rows_mean,
                rows_max=outcome.rows_max,
                lower_bound_s=comparison.lower_bound_s,
                total_s=outcome.total_s,
            )
        )
    return results


# -- reading -----------------------------------------------------------------------------------------------


def read_lengths(path: Path, requests: int | None, max_new: int | None, group: int) -> Workload:
    """Read rows from a CSV file with a column of prompt tokens and one of output tokens.

    Two further columns, ``prefix`` and ``prefix_tokens``, name the beginning of each prompt: prompts that begin alike
    have the same name.

    Raises:
        InputError: the file cannot be read, a column is missing, or a value is not a number of tokens.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            header = reader.fieldnames or []
            prompt = _find_column(path, header, _PROMPT_COLUMNS)
            output = _find_column(path, header, _OUTPUT_COLUMNS)
            hint, prefix, prefix_tokens = (
                _find_optional(header, name) for name in (_HINT_COLUMN, _PREFIX_COLUMN, _PREFIX_TOKENS_COLUMN)
            )
            lines = [line for line, _ in zip(reader, range(requests or sys.maxsize), strict=False)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"--lengths {path} cannot be read: {error}.") from error
    if not lines:
        raise InputError(f"--lengths {path} has no rows: give a file with one line per request.")
    # The header is line 1.
    numbered = list(enumerate(lines, start=2))
    hints = None
    if hint is not None:
        hints = np.array([_parse_hint(path, number, hint, line[hint]) for number, line in numbered])
    prompts = np.array([_parse_tokens(path, number, prompt, line[prompt]) for number, line in numbered])
    if (prefix is None) != (prefix_tokens is None):
        raise InputError(
            f"--lengths {path} has a column {prefix or prefix_tokens!r} alone, but needs both {_PREFIX_COLUMN!r} and "
            f"{_PREFIX_TOKENS_COLUMN!r}, or none of them."
        )
    prefixes = None
    if prefix is not None and prefix_tokens is not None:
        prefixes = _parse_prefixes(path, numbered, prefix, prefix_tokens, prompts)
    return workload_of(
        path.stem,
        prompt_tokens=prompts,
        output_tokens=np.array([_parse_tokens(path, number, output, line[output]) for number, line in numbered]),
        max_new=max_new,
        group=group,
        length_hints=hints,
        prefixes=prefixes,
    )


def _find_optional(header: Sequence[str], name: str) -> str | None:
    return next((column for column in header if column.strip().lower() == name), None)


def _find_column(path: Path, header: Sequence[str], names: Sequence[str]) -> str:
    found = next((name for name in header if name.strip().lower() in names), None)
    if found is None:
        raise InputError(
            f"--lengths {path} has no column {names[0]!r} or {names[1]!r}, only {', '.join(header) or 'an empty line'}."
        )
    return found


def _parse_tokens(path: Path, line: int, column: str, text: str | None) -> int:
    try:
        tokens = int(text or "")
    except ValueError:
        tokens = -1
    if tokens < 0:
        raise InputError(f"--lengths {path}, line {line}: {column} is {text!r}, but must be a number of tokens.")
    return tokens


def _parse_hint(path: Path, line: int, column: str, text: str | None) -> float:
    try:
        hint = float(text) if text else math.nan
        if hint < 0 or math.isinf(hint):
            raise ValueError
        return hint
    except ValueError:
        message = f"--lengths {path}, line {line}: {column} is {text!r}, but must be a number of tokens or empty."
        raise InputError(message) from None


def _parse_prefixes(
    path: Path, numbered: Sequence[tuple[int, Mapping[str, str]]], prefix: str, tokens: str, prompts: IntArray
) -> Prefixes | None:
    """Return the beginnings that rows name; None if no row names one."""
    first_lines: dict[str, tuple[int, int]] = {}
    labels, lengths = [], np.zeros(len(numbered), np.int64)
    for row, (number, line) in enumerate(numbered):
        label = (line[prefix] or "").strip()
        labels.append(label)
        if not label:
            if (line[tokens] or "").strip() not in ("", "0"):
                raise InputError(
                    f"--lengths {path}, line {number}: {tokens} is {line[tokens]!r}, but {prefix} is empty."
                )
            continue
        length = _parse_tokens(path, number, tokens, line[tokens])
        if not 1 <= length <= prompts[row]:
            raise InputError(
                f"--lengths {path}, line {number}: {tokens} is {length}, but must be from 1 to the prompt's "
                f"{prompts[row]} tokens."
            )
        first, first_length = first_lines.setdefault(label, (number, length))
        if length != first_length:
            raise InputError(
                f"--lengths {path}, line {number}: {tokens} of {prefix} {label!r} is {length}, but {first_length} in "
                f"line {first}."
            )
        lengths[row] = length
    return labelled(labels, lengths) if first_lines else None


def _make_workload(arguments: argparse.Namespace, seed: int) -> Workload:
    """Generate the named workload of ``--lengths``, or read its file."""
    name = arguments.lengths
    if name in WORKLOADS:
        return named_workload(
            name, requests=arguments.requests, seed=seed, max_new=arguments.max_new, group=arguments.group
        )
    if not Path(name).is_file():
        raise InputError(f"--lengths {name} is neither a file nor a workload; {describe_names(name, WORKLOADS)}.")
    return read_lengths(Path(name), requests=arguments.requests, max_new=arguments.max_new, group=arguments.group or 1)


# -- printing ----------------------------------------------------------------------------------------------


def table(results: Sequence[Result]) -> str:
    """Format one line per policy, with means over the seeds."""
    budget = results[0].over_budget_share is not None
    lines = [("policy", "tok/s", "/ best static", "/ oracle", "recompute", "over budget", "rows mean", "rows max")]
    for policy in dict.fromkeys(result.policy for result in results):
        own = [result for result in results if result.policy == policy]
        over = f"{fmean(result.over_budget_share or 0.0 for result in own):.1%}" if budget else "-"
        lines.append(
            (
                policy,
                f"{fmean(result.tokens_per_s for result in own):.0f}",
                f"{fmean(result.vs_best_static for result in own):.3f}",
                f"{fmean(result.vs_oracle for result in own):.3f}",
                f"{fmean(result.recompute_share for result in own):.1%}",
                over,
                f"{fmean(result.rows_mean for result in own):.1f}",
                str(max(result.rows_max for result in own)),
            )
        )
    return "\n".join(_aligned(lines))


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Pad the first column to the left and all other columns to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = []
    for line in lines:
        first, *others = line
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        aligned.append("  ".join(cells).rstrip())
    return aligned


def _report(results: Sequence[Result], best_static: Sequence[str]) -> str:
    """Format the table, the best static batches, and the lower bound as the mean over seeds."""
    bounds = {result.seed: result.lower_bound_s for result in results}
    fastest = fmean(min(result.total_s for result in results if result.seed == seed) for seed in bounds)
    return (
        f"{table(results)}\nbest static: {', '.join(dict.fromkeys(best_static))}\n"
        f"lower bound on time: {fmean(bounds.values()):.1f} s (fastest here: {fastest:.1f} s)"
    )


# -- the command line --------------------------------------------------------------------------------------


def _parse_costs(text: str) -> tuple[float, float, float, float]:
    try:
        c0, c1, c2, c3 = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not four numbers c0,c1,c2,c3 in milliseconds") from None
    if not all(0 <= cost < math.inf for cost in (c0, c1, c2, c3)) or c0 + c1 <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} has a negative or endless cost, or steps that cost nothing")
    return c0, c1, c2, c3


def _parse_positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def _parse_milliseconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of milliseconds above 0")
    return value


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = SentenceParser("python -m rollout.simulate", description=__doc__)
    parser.add_argument(
        "--lengths",
        required=True,
        metavar="FILE.csv|NAME",
        help="lengths of rows: a file with columns prompt_tokens and output_tokens, and if wanted length_hint, or "
        "prefix and prefix_tokens (name and length of a beginning that prompts have in common); or one of "
        f"{', '.join(WORKLOADS)}",
    )
    parser.add_argument(
        "--policies", default=_DEFAULT_POLICIES, metavar="NAME[:VALUE],…", help=f"default: {_DEFAULT_POLICIES}"
    )
    parser.add_argument("--kv-tokens", type=_parse_positive, default=100_000, help="tokens that memory holds")
    parser.add_argument(
        "--step-ms", type=_parse_costs, default=(5.5, 0.02, 4.4e-5, 0.02), metavar="c0,c1,c2,c3",
        help="milliseconds per step, per decoding row, per attended token, per prefilled token",
    )  # fmt: skip
    parser.add_argument("--budget-ms", type=_parse_milliseconds, help="most milliseconds per step")
    parser.add_argument(
        "--requests", type=_parse_positive, help="rows; default: all of a file, 2000 of a named workload"
    )
    parser.add_argument("--group", type=_parse_positive, help="number of consecutive rows that share a prompt")
    parser.add_argument("--max-new", type=_parse_positive, help="most output tokens; longer outputs are cut")
    parser.add_argument("--seeds", type=_parse_positive, default=1, help="number of runs, with seeds from 0")
    parser.add_argument("--json", type=Path, metavar="OUT", help="file to write the results to")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Simulate and print; return 0, or 2 after one sentence on stderr if an argument is wrong."""
    try:
        given = _parse_arguments(arguments)
        specs = [parse_spec(text) for text in given.policies.split(",")]
        results: list[Result] = []
        best_static: list[str] = []
        for seed in range(given.seeds):
            comparison = Comparison(
                workload=_make_workload(given, seed),
                machine=Machine(kv_tokens=given.kv_tokens, step_ms=given.step_ms),
                seed=seed,
                budget_ms=given.budget_ms,
            )
            results += compare(comparison, specs)
            bounds = comparison.best_static.bounds
            chunk = "" if given.budget_ms is None else f" with prefills of {bounds.prefill_tokens}"
            best_static.append(f"{bounds.max_rows} rows{chunk}")
        if given.json is not None:
            given.json.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        say(f"--json {given.json} cannot be written: {error.strerror}.", sys.stderr)
        return Exit.BAD_INPUT
    except ValueError as error:
        say(str(error), sys.stderr)
        return Exit.BAD_INPUT
    say(_report(results, best_static))
    return Exit.COMPLETE


if __name__ == "__main__":
    sys.exit(main())
