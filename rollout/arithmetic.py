"""``builtin:arithmetic``: generated word problems with one right number, and the reward that checks it."""

from __future__ import annotations

import random
import re
from decimal import Decimal
from typing import Any

DEFAULT_PROBLEMS = 1024

_NAMES = ("Ada", "Ben", "Chen", "Dora", "Emil", "Fatima", "Goran", "Hana")
_THINGS = ("apples", "books", "coins", "marbles", "pencils", "shells", "stamps", "stickers")

# A template, and which of the quantities below is its answer.
_TEMPLATES = (
    ("What is {a} plus {b}?", "a_and_b"),
    ("What is {a} times {b}?", "product"),
    ("{name} has {a} {things} and buys {b} more. How many {things} does {name} have now?", "a_and_b"),
    ("{name} has {all} {things} and gives {a} away. How many {things} are left?", "b_and_c"),
    ("{name} fills {a} boxes with {b} {things} each. How many {things} are in the boxes?", "product"),
    ("{name} has {a} {things}, finds {b} more and then {c} more. How many {things} does {name} have?", "all"),
    ("{name} shares {product} {things} equally among {a} friends. How many {things} does each friend get?", "b"),
    ("{name} buys {a} bags of {b} {things}, and had {c} before. How many {things} are that in all?", "product_and_c"),
    ("There are {all} {things} on a table. {name} takes {a} and then {b} of them. How many {things} stay there?", "c"),
    ("A shop sells {a} {things} a day. How many {things} does it sell in {b} days?", "product"),
)


def problem(index: int) -> dict[str, str]:
    """The problem with this index: the same in every process, and whatever number of problems is asked for."""
    rng = random.Random(f"arithmetic-{index}")
    # Small numbers, so that a model of a hundred million parameters gets some of the answers right.
    a, b, c = (rng.randint(2, 9) for _ in range(3))
    quantities = {"a": a, "b": b, "c": c, "a_and_b": a + b, "b_and_c": b + c, "all": a + b + c}
    quantities |= {"product": a * b, "product_and_c": a * b + c}
    template, answer = rng.choice(_TEMPLATES)
    text = template.format(name=rng.choice(_NAMES), things=rng.choice(_THINGS), **quantities)
    return {"id": f"arithmetic-{index:05d}", "prompt": text, "answer": str(quantities[answer])}


def problems(count: int) -> list[dict[str, str]]:
    """The first ``count`` problems."""
    return [problem(index) for index in range(count)]


# No letter, digit or point before it: the 2 of "x2" is no number, and the minus of "7-3" subtracts.
_NUMBER = re.compile(r"(?<![\w.])-?\$?(\d{1,3}(?:,\d{3})+|\d+)(\.\d+)?(?!\d)")


def last_number(text: str) -> Decimal | None:
    """The last number in a text: ``1,234.50`` is one; None where there is none."""
    found = None
    for match in _NUMBER.finditer(text.replace("−", "-")):
        found = match
    return None if found is None else Decimal(found.group().replace(",", "").replace("$", ""))


def exact_match(prompt_row: dict[str, Any], completion_text: str) -> float:
    """1.0 where the last number of the completion equals the last number of the row's ``answer``, else 0.0.

    The last number of an answer, so that the ``... #### 42`` of GSM8K is read as 42.

    Raises:
        ValueError: the row has no ``answer``, or that holds no number.
    """
    if "answer" not in prompt_row:
        raise ValueError("the row has no column 'answer'")
    wanted = last_number(str(prompt_row["answer"]))
    if wanted is None:
        raise ValueError(f"the row's answer {prompt_row['answer']!r} holds no number")
    return float(last_number(completion_text) == wanted)
