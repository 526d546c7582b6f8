"""Prompts that begin alike stand together, branch by branch, in order of arrival otherwise."""

from __future__ import annotations

import random

import numpy as np
import pytest

from rollout.batcher.types import IntArray
from rollout.engine.alike_prompts import alike_order, common_tokens

PAGE = 4


def prompts(*texts: str) -> list[IntArray]:
    """A token for each letter."""
    return [np.array([ord(letter) for letter in text], np.int64) for text in texts]


def test_the_turns_of_conversations_follow_each_other() -> None:
    texts = ["sysaAAAA", "sysaBBBB", "sysaAAAACCCC", "xxxxxxxx", "sysaBBBBDDDDE", "sysaAAAAFFFF"]
    order, common = alike_order(prompts(*texts), PAGE)
    assert [texts[i] for i in order] == [
        "sysaAAAA", "sysaAAAACCCC", "sysaAAAAFFFF", "sysaBBBB", "sysaBBBBDDDDE", "xxxxxxxx",
    ]  # fmt: skip
    assert common == [0, 8, 8, 4, 8, 0]


def test_prompts_that_have_no_full_page_in_common_stay_where_they_are() -> None:
    assert alike_order(prompts("abcX1", "abcY1", "abc", "abcZ", "abc", "abW"), PAGE).order == [0, 1, 2, 3, 4, 5]
    assert alike_order(prompts("abcX1", "abcY1", "abc", "abcZ", "abcY", "abcX"), PAGE).order == [0, 5, 1, 4, 2, 3]
    assert alike_order([], PAGE) == ([], [])
    assert alike_order(prompts("a"), PAGE) == ([0], [0])


def test_equal_prompts_stand_together_whatever_their_length() -> None:
    order, common = alike_order(prompts("aaaabbbb", "c", "aaaabbbb", "c", "aaaabbbbc"), PAGE)
    assert (order, common) == ([0, 2, 4, 1, 3], [0, 8, 8, 0, 0])


@pytest.mark.parametrize("seed", range(5))
def test_random_prompts_are_ordered_as_by_the_definition(seed: int) -> None:
    rng = random.Random(seed)
    texts = ["".join(rng.choice("ab") * rng.choice([1, 4]) for _ in range(rng.randint(1, 7))) for _ in range(60)]
    order, common = alike_order(prompts(*texts), PAGE)

    def pages(text: str) -> list[str]:
        return [text[start : start + PAGE] for start in range(0, len(text) - PAGE + 1, PAGE)]

    def branch(index: int) -> list[int]:
        """For each page of a prompt, which prompt came first that begins with all pages up to it; then itself."""
        own = pages(texts[index])
        beginnings = [own[:depth] for depth in range(1, len(own) + 1)]
        return [*(next(i for i, t in enumerate(texts) if pages(t)[: len(b)] == b) for b in beginnings), index]

    assert order == sorted(range(60), key=branch)
    for before, after, tokens in zip(order, order[1:], common[1:], strict=False):
        one, other = prompts(texts[before], texts[after])
        assert tokens == common_tokens(one, other) // PAGE * PAGE


def test_a_long_beginning_in_common_does_not_nest_calls() -> None:
    beginning = np.arange(20_000)
    order, common = alike_order([np.append(beginning, [i, 1, 2, 3]) for i in (7, 8, 7)], PAGE)
    assert (order, common) == ([0, 2, 1], [0, 20_004, 20_000])
