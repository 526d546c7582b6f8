"""Draw a run from its metrics and records as one self-contained HTML file: ``python -m rollout.report DIR``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rollout.argument_parser import SentenceParser
from rollout.errors import Exit, InputError
from rollout.logs import say
from rollout.report.data_statistics import read_statistics
from rollout.report.history import read_history
from rollout.report.page import Subject, page
from rollout.report.record_files import record_files
from rollout.report.samples_to_read import SamplePicker
from rollout.report.series import Limits
from rollout.run_dir.attempts import read_attempts
from rollout.run_dir.paths import RunPaths
from rollout.run_dir.run import read_run, read_run_json
from rollout.run_dir.summary import read_totals


def report(folder: Path) -> str:
    """Draw the page of a run, which may still be running.

    Raises:
        InputError: the folder holds no run, or a run without metrics and without finished samples.
    """
    paths = RunPaths(folder)
    run, description = read_run(paths), read_run_json(paths)
    attempts = {attempt["attempt"]: attempt for attempt in read_attempts(run.files, paths)}
    limits = {number: _limits(attempt) for number, attempt in attempts.items()}
    subject = Subject(run=run, description=description, totals=read_totals(run), attempts=attempts, limits=limits)
    history = read_history(paths, limits)
    picker = SamplePicker()
    statistics = read_statistics(record_files(run), picker)
    if not history.spans and not subject.totals.samples:
        raise InputError(
            f"{paths.root} holds a run with nothing to draw: it has no finished sample and no complete line of metrics."
        )
    return page(subject, history, statistics, picker)


def _limits(attempt: object) -> Limits:
    """Read the limits of an attempt; none if they cannot be read."""
    try:
        budget = attempt["batcher"]["latency_budget_ms"]  # type: ignore[index]
        max_kv_bytes = attempt["memory"]["max_kv_bytes"]  # type: ignore[index]
        return Limits(
            latency_budget_ms=None if budget is None else float(budget),
            max_kv_bytes=None if max_kv_bytes is None else float(max_kv_bytes),
        )
    except (KeyError, TypeError, ValueError):
        return Limits()


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page, print its path and return 0; return 2 if there is nothing to draw."""
    parser = SentenceParser("python -m rollout.report", description=__doc__)
    parser.add_argument("dir", metavar="DIR", type=Path, help="the output.dir of a run")
    parser.add_argument("--output", metavar="FILE", type=Path, help="the file to write (default: DIR/report.html)")
    try:
        options = parser.parse_args(arguments)
        path = options.output or RunPaths(options.dir).report
        text = report(options.dir)
        try:
            path.write_text(text, encoding="utf-8", errors="replace")  # "replace" for unpaired surrogates
        except OSError as error:
            raise InputError(
                f"{path} cannot be written ({error.strerror}): choose another file with --output."
            ) from error
    except InputError as error:
        say(str(error), sys.stderr)
        return Exit.BAD_INPUT
    say(str(path))
    return Exit.COMPLETE


if __name__ == "__main__":
    sys.exit(main())
