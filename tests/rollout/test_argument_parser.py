"""Mistakes in the arguments of verify, report and simulate end in one sentence and status 2."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

import rollout.report.__main__
import rollout.simulate
import rollout.verify

VERIFY, REPORT, SIMULATE = rollout.verify.main, rollout.report.__main__.main, rollout.simulate.main


@pytest.mark.parametrize(
    ("tool", "arguments", "said"),
    [
        (VERIFY, [], "DIR must be given: write python -m rollout.verify DIR."),
        (VERIFY, ["a", "b"], "'b' is one argument too many"),
        (VERIFY, ["--all", "a"], "--all is no option"),
        (VERIFY, ["nothing"], "nothing holds no run"),
        (REPORT, ["--outptu", "x", "a"], "write --output."),
        (REPORT, ["a", "--output"], "--output has no value"),
        (SIMULATE, [], "write python -m rollout.simulate --lengths FILE.csv|NAME."),
        (SIMULATE, ["--length", "conv"], "write --lengths."),
        (SIMULATE, ["--lengths", "conv", "--seeds", "a"], "'a' is not a whole number"),
    ],
)
def test_mistake_is_one_sentence(
    capsys: pytest.CaptureFixture[str], tool: Callable[[Sequence[str]], int], arguments: list[str], said: str
) -> None:
    assert tool(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert said in printed.err
    assert len(printed.err.splitlines()) == 1


@pytest.mark.parametrize("tool", [VERIFY, REPORT, SIMULATE])
def test_help_is_printed(capsys: pytest.CaptureFixture[str], tool: Callable[[Sequence[str]], int]) -> None:
    with pytest.raises(SystemExit) as ended:
        tool(["--help"])
    assert ended.value.code == 0
    assert "usage: python -m rollout." in capsys.readouterr().out
