"""``python -m rollout.report DIR``: draws a run from its metrics, as one HTML file that needs nothing else."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rollout.errors import Exit, InputError
from rollout.report.history import read_history
from rollout.report.page import Subject, page
from rollout.report.series import Limits
from rollout.run_dir.paths import RunPaths
from rollout.run_dir.run import read_run, read_run_json
from rollout.run_dir.summary import read_totals


def report(folder: Path) -> str:
    """The page of a run, which may be going on.

    Raises:
        InputError: the folder holds no run, or one without metrics.
    """
    paths = RunPaths(folder)
    run, description = read_run(paths), read_run_json(paths)
    limits = {number: _limits(attempt) for number, attempt in enumerate(description["attempts"])}
    return page(Subject(run, description, read_totals(run), limits), read_history(paths, limits))


def _limits(attempt: object) -> Limits:
    """What an attempt in ``run.json`` was given."""
    try:
        budget, most = attempt["batcher"]["latency_budget_ms"], attempt["memory"]["max_kv_bytes"]  # type: ignore[index]
        return Limits(None if budget is None else float(budget), None if most is None else float(most))
    except (KeyError, TypeError, ValueError):
        return Limits()


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page, print its path, and return 0, or 2 if there is nothing to draw."""
    parser = argparse.ArgumentParser("python -m rollout.report", description=__doc__)
    parser.add_argument("dir", type=Path, help="the output.dir of a run")
    parser.add_argument("--output", type=Path, help="the file to write (default: report.html in the folder)")
    given = parser.parse_args(arguments)
    path = given.output or RunPaths(given.dir).report
    try:
        text = report(given.dir)
        try:
            path.write_text(text, encoding="utf-8", errors="replace")  # half a surrogate pair, say
        except OSError as error:
            raise InputError(
                f"{path} cannot be written ({error.strerror}): name another file with --output."
            ) from error
    except InputError as error:
        print(error, file=sys.stderr)
        return Exit.BAD_INPUT
    print(path)
    return Exit.COMPLETE


if __name__ == "__main__":
    sys.exit(main())
