"""Promises 2 and 6 for modules that two processes share: gathered for a call, and the trainer's again after it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.forks import output_of_ranks

pytestmark = pytest.mark.long

#: Largest distance of log-probabilities: fp32's and bf16's rounding.
_ROUNDING = {"fsdp2 bf16": 0.5}


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks found."""
    folder = tmp_path_factory.mktemp("sharded")
    output_of_ranks("tests.support.sharded_world", str(folder), ACCELERATE_USE_CPU="true")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("way", ["ddp", "prepared", "fsdp2", "fsdp2 bf16", "fsdp1"])
def test_every_call_between_training_steps_has_the_modules_own_numbers(reports: list[dict[str, Any]], way: str) -> None:
    for report in reports:
        assert max(report[way]["distances"]) < _ROUNDING.get(way, 1e-5)
        losses = report[way]["losses"]
        assert losses[-1] < losses[0]
        assert report[way]["start checks"] == 1


@pytest.mark.parametrize("way", ["prepared", "fsdp2", "fsdp1"])
def test_training_is_the_same_however_the_module_is_shared(reports: list[dict[str, Any]], way: str) -> None:
    for report in reports:
        assert report[way]["losses"] == pytest.approx(report["ddp"]["losses"], abs=1e-4)


def test_training_step_inside_a_stream_is_told_to_let_it_end(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        assert "let a stream end" in report["stream"]
        assert report["stream"].count(". ") == 0
