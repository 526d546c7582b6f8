"""``python -m rollout.simulate``: batching policies on recorded or made-up lengths, without a model."""

from __future__ import annotations

import argparse
import csv
import difflib
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import numpy as np

from rollout.batcher.simulation.compare import Comparison, Spec, parse_spec
from rollout.batcher.simulation.simulator import Machine
from rollout.batcher.simulation.workloads import WORKLOADS, Workload, named_workload, workload_of
from rollout.errors import Exit, InputError

_POLICIES = "static:256,memory,sla,paper,watermark:0.02,predictive,oracle"
# What columns of lengths are called, in lower case; Azure's traces have the first of each.
_PROMPT_COLUMNS = ("contexttokens", "prompt_tokens", "prompt", "input_tokens", "input")
_OUTPUT_COLUMNS = ("generatedtokens", "output_tokens", "output", "completion_tokens", "completion")
_HINT_COLUMN = "length_hint"


@dataclass(frozen=True, slots=True)
class Result:
    """One policy on one workload with one seed; the keys of ``--json``."""

    policy: str
    workload: str
    seed: int
    tokens_per_s: float
    vs_best_static: float
    """Tokens a second relative to the best swept static batch (that keeps the budget, where there is one)."""
    vs_oracle: float
    """The same to the policy that knows all lengths and keeps the order of arrival."""
    recompute_share: float
    """Of the time."""
    over_budget_share: float | None
    """Of the steps; None without a budget."""
    rows_mean: float
    rows_max: int
    lower_bound_s: float
    total_s: float


def compare(trial: Comparison, specs: Sequence[Spec], seed: int) -> list[Result]:
    """All policies on one job."""
    static = trial.best_static[1].tokens_per_s
    results = []
    for spec in specs:
        outcome = trial.run(spec)
        results.append(
            Result(
                policy=spec.text,
                workload=trial.workload.name,
                seed=seed,
                tokens_per_s=outcome.tokens_per_s,
                vs_best_static=outcome.tokens_per_s / static,
                vs_oracle=outcome.tokens_per_s / trial.oracle.tokens_per_s,
                recompute_share=outcome.recompute_share,
                over_budget_share=None if trial.budget_ms is None else outcome.over(trial.budget_ms),
                rows_mean=outcome.rows_mean,
                rows_max=outcome.rows_max,
                lower_bound_s=trial.lower_bound_s,
                total_s=outcome.total_s,
            )
        )
    return results


# -- reading -----------------------------------------------------------------------------------------------


def read_lengths(path: Path, requests: int | None, max_new: int | None, group: int) -> Workload:
    """The rows of a CSV file with a column of prompt tokens and one of output tokens.

    Raises:
        InputError: the file cannot be read, a column is missing, or a value is not a number of tokens.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            header = reader.fieldnames or []
            prompt, output = (_column(path, header, names) for names in (_PROMPT_COLUMNS, _OUTPUT_COLUMNS))
            hint = next((name for name in header if name.strip().lower() == _HINT_COLUMN), None)
            lines = [line for line, _ in zip(reader, range(requests or sys.maxsize), strict=False)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"--lengths {path} cannot be read: {error}.") from error
    if not lines:
        raise InputError(f"--lengths {path} has no rows: give a file with a line a request.")
    values = {
        name: np.array([_tokens(path, number, name, line[name]) for number, line in enumerate(lines, 2)])
        for name in (prompt, output)
    }
    hints = None if hint is None else np.array([_hint(path, n, hint, line[hint]) for n, line in enumerate(lines, 2)])
    return workload_of(path.stem, values[prompt], values[output], max_new, group, hints)


def _column(path: Path, header: Sequence[str], names: Sequence[str]) -> str:
    found = next((name for name in header if name.strip().lower() in names), None)
    if found is None:
        raise InputError(
            f"--lengths {path} has no column {names[0]!r} or {names[1]!r}, only {', '.join(header) or 'an empty line'}."
        )
    return found


def _tokens(path: Path, line: int, column: str, text: str | None) -> int:
    try:
        tokens = int(text or "")
    except ValueError:
        tokens = -1
    if tokens < 0:
        raise InputError(f"--lengths {path}, line {line}: {column} is {text!r}, but must be a number of tokens.")
    return tokens


def _hint(path: Path, line: int, column: str, text: str | None) -> float:
    try:
        hint = float(text) if text else math.nan
        if hint < 0 or math.isinf(hint):
            raise ValueError
        return hint
    except ValueError:
        message = f"--lengths {path}, line {line}: {column} is {text!r}, but must be a number of tokens or empty."
        raise InputError(message) from None


def _workload(arguments: argparse.Namespace, seed: int) -> Workload:
    name = arguments.lengths
    if name in WORKLOADS:
        return named_workload(name, arguments.requests, seed, arguments.max_new, arguments.group)
    if not Path(name).is_file():
        nearest = difflib.get_close_matches(name, WORKLOADS, n=1, cutoff=0.0)[0]
        known = ", ".join(WORKLOADS)
        raise InputError(
            f"--lengths {name} is neither a file nor a workload; the nearest workload is {nearest} (known: {known})."
        )
    return read_lengths(Path(name), arguments.requests, arguments.max_new, arguments.group or 1)


# -- printing ----------------------------------------------------------------------------------------------


def table(results: Sequence[Result]) -> str:
    """A line a policy, means over the seeds, and the lower bound below."""
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
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    printed = [
        "  ".join(cell.rjust(width) if at else cell.ljust(width) for at, (cell, width) in enumerate(row)).rstrip()
        for row in (zip(line, widths, strict=True) for line in lines)
    ]
    return "\n".join(printed)


def _report(results: Sequence[Result], statics: Sequence[str]) -> str:
    bounds = {result.seed: result.lower_bound_s for result in results}
    totals = fmean(min(r.total_s for r in results if r.seed == seed) for seed in bounds)
    return (
        f"{table(results)}\nbest static: {', '.join(dict.fromkeys(statics))}\n"
        f"lower bound on time: {fmean(bounds.values()):.1f} s (fastest here: {totals:.1f} s)"
    )


# -- the command line --------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the usage."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise InputError(f"{message[:1].upper()}{message[1:].rstrip('.')}.")


def _costs(text: str) -> tuple[float, float, float, float]:
    try:
        c0, c1, c2, c3 = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not four numbers c0,c1,c2,c3 in milliseconds") from None
    if min(c0, c1, c2, c3) < 0 or c0 + c1 <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} has a negative cost, or steps that cost nothing")
    return c0, c1, c2, c3


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def _milliseconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of milliseconds above 0")
    return value


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser("python -m rollout.simulate", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--lengths", required=True, metavar="FILE.csv|NAME", help=f"lengths of rows; names: {', '.join(WORKLOADS)}"
    )
    parser.add_argument("--policies", default=_POLICIES, metavar="NAME[:VALUE],…", help=f"default: {_POLICIES}")
    parser.add_argument("--kv-tokens", type=_positive, default=100_000, help="tokens that memory holds")
    parser.add_argument(
        "--step-ms", type=_costs, default=(5.5, 0.02, 4.4e-5, 0.02), metavar="c0,c1,c2,c3",
        help="milliseconds of a step, a decoding row, a token attended to, a prefilled token",
    )  # fmt: skip
    parser.add_argument("--budget-ms", type=_milliseconds, help="most milliseconds of a step")
    parser.add_argument("--requests", type=_positive, help="rows; default: all of a file, 2000 of a named workload")
    parser.add_argument("--group", type=_positive, help="so many rows after each other have one prompt")
    parser.add_argument("--max-new", type=_positive, help="outputs are cut at so many tokens")
    parser.add_argument("--seeds", type=_positive, default=1, help="runs, with seeds from 0")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the results there")
    return parser.parse_args(given)


def main(arguments: Sequence[str] | None = None) -> int:
    """Simulates and prints; 0 when done, 2 when something given is wrong, said in one sentence."""
    try:
        given = _arguments(arguments)
        specs = [parse_spec(text) for text in given.policies.split(",")]
        results: list[Result] = []
        statics: list[str] = []
        for seed in range(given.seeds):
            workload = _workload(given, seed)
            trial = Comparison(workload, Machine(given.kv_tokens, given.step_ms), seed, given.budget_ms)
            results += compare(trial, specs, seed)
            bounds, _ = trial.best_static
            chunk = "" if given.budget_ms is None else f" with prefills of {bounds.prefill_tokens}"
            statics.append(f"{bounds.max_rows} rows{chunk}")
        if given.json is not None:
            given.json.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        print(f"--json {given.json} cannot be written: {error.strerror}.", file=sys.stderr)
        return Exit.BAD_INPUT
    except ValueError as error:
        print(error, file=sys.stderr)
        return Exit.BAD_INPUT
    print(_report(results, statics))
    return Exit.COMPLETE


if __name__ == "__main__":
    sys.exit(main())
