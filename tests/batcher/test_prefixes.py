"""Beginnings that prompts have in common, against comparing all pairs."""

from __future__ import annotations

import numpy as np
import pytest

from rollout.batcher.simulation.prefixes import Prefixes, common_beginnings, labelled


def spelled(prompts: list[list[int]], found: Prefixes) -> list[list[tuple[int, ...]]]:
    """The beginnings on the path to each prompt's node."""
    paths, tokens = found.paths(), found.tokens.tolist()
    return [
        [tuple(prompt[: tokens[piece]]) for piece in (paths[node] if node >= 0 else [])]
        for prompt, node in zip(prompts, found.nodes.tolist(), strict=True)
    ]


def test_turns_of_a_conversation_nest():
    prompts = [[1, 2, 3], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6], [1, 9], [7, 7]]
    found = common_beginnings(prompts)
    assert spelled(prompts, found) == [
        [(1,), (1, 2, 3)],
        [(1,), (1, 2, 3), (1, 2, 3, 4, 5)],
        [(1,), (1, 2, 3), (1, 2, 3, 4, 5)],
        [(1,)],
        [],
    ]


@pytest.mark.parametrize("seed", range(30))
def test_beginnings_equal_those_of_all_pairs(seed: int):
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, 3, rng.integers(0, 9)).tolist() for _ in range(rng.integers(1, 40))]
    common: list[set[tuple[int, ...]]] = [set() for _ in prompts]
    for one, prompt in enumerate(prompts):
        for other, others in enumerate(prompts):
            equal = [a == b for a, b in zip(prompt, others, strict=False)]
            length = equal.index(False) if False in equal else len(equal)
            if one != other and length:
                common[one].add(tuple(prompt[:length]))
    found = common_beginnings(prompts)
    assert spelled(prompts, found) == [sorted(beginnings, key=len) for beginnings in common]
    assert len(set(zip(found.parents.tolist(), found.tokens.tolist(), strict=True))) <= len(found.tokens)
    assert (found.parents < np.arange(len(found.parents))).all()


def test_equal_prompts_have_all_of_it_in_common():
    assert spelled([[5, 6], [5, 6]], common_beginnings([[5, 6], [5, 6]])) == [[(5, 6)]] * 2


def test_labels_name_beginnings():
    found = labelled(["a", "", "b", "a"], np.array([30, 0, 20, 30]))
    assert found.nodes.tolist() == [0, -1, 1, 0]
    assert found.tokens.tolist() == [30, 20]
    assert found.reordered(np.array([2, 1])).nodes.tolist() == [1, -1]
