"""Log lines of a job: time and sentence, with the rank where there are several."""

from __future__ import annotations

import logging

import pytest

from rollout.logs import LineFormatter


def line(level: int) -> str:
    return LineFormatter().format(logging.LogRecord("rollout.x", level, "x.py", 1, "It is %s.", ("so",), None))


def test_line_is_a_time_and_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert line(logging.INFO)[8:] == " It is so."
    assert line(logging.WARNING)[8:] == " Warning: It is so."


@pytest.mark.parametrize(("ranks", "rank"), [("WORLD_SIZE", "RANK"), ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID")])
def test_line_of_one_of_several_ranks_names_it(monkeypatch: pytest.MonkeyPatch, ranks: str, rank: str) -> None:
    monkeypatch.setenv(ranks, "2")
    monkeypatch.setenv(rank, "1")
    assert line(logging.INFO).startswith("[rank 1] ")
