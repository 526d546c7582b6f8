"""The benchmark of the time left: what is foretold, against what a job then takes."""

from __future__ import annotations

import pytest

from jobs.bench.eta import Foretold, Line, describe, foretold


def lines(*said: tuple[float, str]) -> list[Line]:
    """Return the lines of a job that generates from second 10 to 110, with times left said in between."""
    return [
        Line(0.5, "00:00:00 Reading prompts from x."),
        Line(10.0, "00:00:10 Generating 2,000 samples (2,000 prompts, 1 each)."),
        *(Line(at, f"5/2,000 samples · {left} left · 3 tok/s · 7 live") for at, left in said),
        Line(110.0, "2,000/2,000 samples · 1:40 in all · 3 tok/s"),
    ]


def test_times_left_are_compared_from_the_first_tenth_to_the_last_twentieth() -> None:
    said = lines((15.0, "9:00"), (30.0, "–"), (50.0, "1:00"), (80.0, "0:15"), (107.0, "9:00"))
    assert foretold(said) == [Foretold(None, 80.0), Foretold(60.0, 60.0), Foretold(15.0, 30.0)]


def test_description_has_the_errors_and_counts_lines_without_a_time() -> None:
    described = describe(lines((30.0, "–"), (50.0, "1:00:00"), (80.0, "0:15")))
    assert "median 2975%, maximum 5900% of 2 lines; 1 lines without" in described
    assert "first line after 0.5 s, generation after 10.0 s" in described


@pytest.mark.parametrize("said", [(), ((40.0, "–"),)])
def test_description_says_that_nothing_was_foretold(said: tuple[tuple[float, str], ...]) -> None:
    assert "nothing foretold of 0 lines" in describe(lines(*said))
