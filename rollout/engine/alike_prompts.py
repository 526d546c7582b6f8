"""The order of waiting prompts that puts those next to each other that begin alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rollout.batcher.types import IntArray


class AlikePrompts(NamedTuple):
    """Prompts in an order, and what each has in common with the one before it in that order."""

    order: list[int]
    """Indices of the prompts."""
    common_tokens: list[int]
    """Leading tokens, in full pages, that a prompt has in common with the one before it; 0 for the first."""


def alike_order(prompts: Sequence[IntArray], page_tokens: int) -> AlikePrompts:
    """Return the prompts in order of arrival, except that those that begin alike follow the first of them.

    The same holds among the prompts that begin alike, for those whose next page is the same, and so on: the order is
    that of a walk through the tree of their pages, depth first, whose branches are in order of arrival. Takes time in
    proportion to the tokens that prompts have in common, and to the number of prompts.

    Args:
        prompts: token ids, [tokens] each, in order of arrival.
        page_tokens: tokens per page.
    """
    found = AlikePrompts([], [])
    stack = [(list(range(len(prompts))), 0, 0)]
    while stack:
        members, depth, common = stack.pop()
        if len(members) == 1:
            found.order.append(members[0])
            found.common_tokens.append(common)
            continue
        branches: dict[bytes | int, list[int]] = {}
        for index in members:
            page = prompts[index][depth : depth + page_tokens]
            # A prompt that has no such page is a branch of its own.
            branches.setdefault(page.tobytes() if len(page) == page_tokens else index, []).append(index)
        # The last entry of the stack is the next: the first branch, which follows what came before all of them.
        for number, branch in reversed(list(enumerate(branches.values()))):
            stack.append((branch, _common_pages(prompts, branch, depth, page_tokens), depth if number else common))
    return found


def _common_pages(prompts: Sequence[IntArray], members: Sequence[int], depth: int, page_tokens: int) -> int:
    """Return the leading tokens, in full pages, that all members have in common, at least ``depth``."""
    first = prompts[members[0]]
    end = len(first)
    for index in members[1:]:
        end = depth + common_tokens(first[depth:end], prompts[index][depth:end])
    return max(depth, end // page_tokens * page_tokens) if len(members) > 1 else depth


def common_tokens(one: IntArray, other: IntArray) -> int:
    """Return how many leading tokens two sequences have in common."""
    count = min(len(one), len(other))
    differs = one[:count] != other[:count]
    first = int(differs.argmax()) if count else 0
    return first if count and differs[first] else count
