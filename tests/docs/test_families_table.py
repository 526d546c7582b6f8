"""The script that tries all families: its verdicts, and the page it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from jobs.bench import families_table
from jobs.bench.families_table import Result, table, tried, write
from jobs.bench.lib.family_configs import tiny_config
from tests.support.parity import greedy
from tests.support.tiny_models import REFUSED, SERVED


def test_served_family_is_right() -> None:
    result = tried("arcee")
    assert (result.state, result.strategy, result.equal, result.rows) == ("right", "packed", 7, 7)
    assert 0 < result.gap < 1e-5
    assert result.half_gap is not None
    assert result.half_gap > result.gap


@pytest.mark.parametrize(("flip", "gap", "equal"), [(0, 0.0, 7), (1, 0.0, 6), (0, 2e-5, 7)])
def test_other_tokens_or_log_probabilities_are_wrong(
    flip: int, gap: float, equal: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def generated(model: PreTrainedModel, prompts: Any) -> Any:
        first, *others = [greedy(model, prompt, 3) for prompt in prompts]
        return [[*first[:-1], first[-1] ^ flip], *others], torch.tensor([gap])

    monkeypatch.setattr(families_table, "_NEW_TOKENS", 3)
    monkeypatch.setattr(families_table, "_generated", generated)
    result = tried("arcee")
    assert (result.state, result.equal) == ("wrong" if flip or gap else "right", equal)


def test_generate_that_contradicts_the_forward_is_not_our_error() -> None:
    result = tried("moshi")
    assert result.state == "generate fails"
    assert result.equal < result.rows
    assert result.gap < 1e-5


def test_refused_and_unbuilt_families_have_a_reason() -> None:
    assert tried("rwkv").state == "refused"
    assert "'rwkv'" in tried("rwkv").reason
    assert tried("gemma4_assistant").state == "not built"
    assert "Error: " in tried("gemma4_assistant").reason


def test_windows_are_shorter_than_the_sequences() -> None:
    for family in ("cohere2_moe", "exaone4", "gemma3"):
        assert tiny_config(family).get_text_config().sliding_window == 12


RESULTS = [
    Result("a", "right", "packed", 7, 7, 2e-6, 3e-3),
    Result("b", "right", "recurrent", 7, 7, 2e-6, None),
    Result("c", "wrong", "packed", 3, 7, 2e-2, None, "off"),
    Result("d", "refused", reason="this | that"),
    Result("e", "not built", reason="too large"),
]


def test_table_counts_and_names_every_family() -> None:
    text = table(RESULTS)
    assert text.startswith(
        "Of 5 families, 4 could be built tiny. Right: 2 (1 packed, 1 recurrent). Wrong: 1. Refused: 1. "
    )
    for line in (
        "| a | packed | 7/7 | 2e-06 | 3e-03 |",
        "| b | recurrent | 7/7 | 2e-06 | – |",
        "| c | packed | 3/7 **wrong** off | 2e-02 | – |",
        "| d | this / that |",
        "| e | too large |",
    ):
        assert line in text.splitlines()


def test_write_replaces_text_between_markers_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "families.md"
    monkeypatch.setattr(families_table, "_PAGE", page)
    page.write_text(
        f"before\n{families_table._MARKERS[0]}\nold\n{families_table._MARKERS[1]}\nafter\n", encoding="utf-8"
    )
    write("new")
    write("newer")
    expected = f"before\n{families_table._MARKERS[0]}\n\nnewer\n\n{families_table._MARKERS[1]}\nafter\n"
    assert page.read_text(encoding="utf-8") == expected


def test_page_lists_the_families_of_the_tests_and_none_is_wrong() -> None:
    text = families_table._PAGE.read_text(encoding="utf-8")
    between = text.split(families_table._MARKERS[0])[1].split(families_table._MARKERS[1])[0]
    listed = {line.split("|")[1].strip() for line in between.splitlines() if line.startswith("| ")}
    assert listed >= {family.partition("/")[0] for family in (*SERVED, *REFUSED)}
    assert "**wrong**" not in between
