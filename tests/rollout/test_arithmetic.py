"""Generated problems, and the reward that checks them."""

from __future__ import annotations

import re
from decimal import Decimal

import pytest

from rollout.arithmetic import exact_match, last_number, problem, problems


def test_problems_do_not_depend_on_their_number() -> None:
    assert problems(50)[:7] == problems(7)
    assert problems(50)[33] == problem(33)


def test_problems_differ_and_have_ids() -> None:
    made = problems(500)
    assert len({row["id"] for row in made}) == 500
    assert len({row["prompt"] for row in made}) > 450
    assert all(int(row["answer"]) > 0 for row in made)


def test_answers_follow_from_the_numbers_in_the_problem() -> None:
    checked = 0
    for row in problems(400):
        numbers = [int(n) for n in re.findall(r"\d+", row["prompt"])]
        if "buys" in row["prompt"] and "more" in row["prompt"]:
            assert int(row["answer"]) == sum(numbers)
        elif "shares" in row["prompt"]:
            assert int(row["answer"]) * numbers[1] == numbers[0]
        elif "on a table" in row["prompt"]:
            assert int(row["answer"]) == numbers[0] - numbers[1] - numbers[2]
        elif "bags" in row["prompt"]:
            assert int(row["answer"]) == numbers[0] * numbers[1] + numbers[2]
        else:
            continue
        checked += 1
    assert checked > 100


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 42.", "42"),
        ("3 + 4 = 7, so **7**", "7"),
        ("first 5, then 1,234.50!", "1234.5"),
        ("#### 12", "12"),
        ("It is -3", "-3"),
        ("It is \u22123", "-3"),
        ("7-3", "3"),
        ("costs $1,000", "1000"),
        ("\\boxed{18}", "18"),
        ("3.0", "3"),
        ("x2", None),
        ("none here", None),
        ("", None),
    ],
)
def test_last_number_of_a_text(text: str, number: str | None) -> None:
    assert last_number(text) == (None if number is None else Decimal(number))


def test_exact_match_compares_the_last_numbers() -> None:
    assert exact_match({"answer": "12"}, "So there are 12.0 apples") == 1.0
    assert exact_match({"answer": "12"}, "12 apples, or 13") == 0.0
    assert exact_match({"answer": 12}, "12") == 1.0
    assert exact_match({"answer": "5 + 7 = 12\n#### 12"}, "12") == 1.0
    assert exact_match({"answer": "12"}, "no idea") == 0.0


@pytest.mark.parametrize("row", [{}, {"answer": "many"}])
def test_input_row_without_an_answer_is_an_error(row: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="answer"):
        exact_match(row, "3")
