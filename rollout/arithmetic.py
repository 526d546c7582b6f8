"""The dataset ``builtin:arithmetic``: generated word problems, and the reward that checks their answers."""

from __future__ import annotations

import random
import re
from decimal import Decimal
from typing import Any

DEFAULT_PROBLEMS = 1024

_NAMES = ("Ada", "Ben", "Chen", "Dora", "Emil", "Fatima", "Goran", "Hana")
_THINGS = ("apples", "books", "coins", "marbles", "pencils", "shells", "stamps", "stickers")

# Each template, and the name of the quantity in `problem` that answers it.
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
    """Generate the problem with this index; it is the same in every process, for any number of problems."""
    rng = random.Random(f"arithmetic-{index}")
    # Numbers small enough for a model of 100 million parameters to get some answers right.
    a, b, c = (rng.randint(2, 9) for _ in range(3))
    quantities = {"a": a, "b": b, "c": c, "a_and_b": a + b, "b_and_c": b + c, "all": a + b + c}
    quantities |= {"product": a * b, "product_and_c": a * b + c}
    template, answer = rng.choice(_TEMPLATES)
    text = template.format(name=rng.choice(_NAMES), things=rng.choice(_THINGS), **quantities)
    return {"id": f"arithmetic-{index:05d}", "prompt": text, "answer": str(quantities[answer])}


def problems(count: int) -> list[dict[str, str]]:
    """Generate the first ``count`` problems."""
    return [problem(index) for index in range(count)]


# Not after a letter, digit or point: the 2 of "x2" is not a number, and the minus of "7-3" is not a sign.
_NUMBER = re.compile(r"(?<![\w.])-?\$?(\d{1,3}(?:,\d{3})+|\d+)(\.\d+)?(?!\d)")


def last_number(text: str) -> Decimal | None:
    """Return the last number in a text, such as ``1,234.50``; None if it has none."""
    last = None
    for match in _NUMBER.finditer(text.replace("−", "-")):
        last = match
    return None if last is None else Decimal(last.group().replace(",", "").replace("$", ""))


def exact_match(prompt_row: dict[str, Any], completion_text: str) -> float:
    """Return 1.0 if the completion's last number equals the last number of the column ``answer``, else 0.0.

    Taking the last number of the answer reads GSM8K's ``... #### 42`` as 42.

    Raises:
        ValueError: the input row has no ``answer``, or an answer without a number.
    """
    if "answer" not in prompt_row:
        raise ValueError("the input row has no column 'answer'")
    expected = last_number(str(prompt_row["answer"]))
    if expected is None:
        raise ValueError(f"the answer {prompt_row['answer']!r} of the input row holds no number")
    return 1.0 if last_number(completion_text) == expected else 0.0
