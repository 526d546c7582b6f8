"""Commands whose reader has gone, as behind ``| head``, end as they would have."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

import pytest

from rollout import rescore, retry, score, simulate, verify
from rollout.errors import Exit
from rollout.report import __main__ as report


@pytest.mark.parametrize(
    ("main", "arguments", "status"),
    [
        (simulate.main, ["--lengths", "const", "--requests", "20", "--policies", "static:4"], Exit.COMPLETE),
        (simulate.main, ["--lengths", "cons"], Exit.BAD_INPUT),
        (verify.main, ["no-run"], Exit.BAD_INPUT),
        (report.main, ["no-run"], Exit.BAD_INPUT),
        (retry.main, ["no-run"], Exit.BAD_INPUT),
        (rescore.main, ["no-run"], Exit.BAD_INPUT),
        (score.main, ["no-run", "--model", "none", "--output", "none"], Exit.BAD_INPUT),
    ],
    ids=["simulate", "simulate refused", "verify", "report", "retry", "rescore", "score"],
)
def test_status_is_the_same(
    main: Callable[[Sequence[str]], int], arguments: list[str], status: Exit, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("stdout", "stderr"):
        reader, writer = os.pipe()
        os.close(reader)
        monkeypatch.setattr(sys, name, os.fdopen(writer, "w"))
    assert main(arguments) == status
    # As the interpreter does at its end.
    sys.stdout.flush()
    sys.stderr.flush()
