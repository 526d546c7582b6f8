"""Names of files in a run's directory."""

from __future__ import annotations

from rollout.run_dir.paths import numbers


def test_names_that_are_no_numbers_are_left_out() -> None:
    assert numbers(["00003", "12", "notes", "-1", "\u00b2", "4.json", ""]) == {3, 12}
    assert numbers(["00003.json", "00003.parquet", "12", "x.json", "\u00b2.json", ".json"], ".json") == {3}
