"""Beginnings that the prompts of a simulated job have in common, as a tree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from rollout.batcher.types import IntArray


@dataclass(frozen=True, slots=True)
class Prefixes:
    """A tree of beginnings: a node stands for the tokens that all prompts below it begin with."""

    parents: IntArray
    """[nodes] the next shorter beginning, -1 if there is none; parents come before their children."""
    tokens: IntArray
    """[nodes] tokens from the start of the prompt to the end of the node, more than its parent's."""
    nodes: IntArray
    """[rows] the longest beginning that each prompt has in common with another, -1 if there is none."""

    def reordered(self, order: IntArray) -> Prefixes:
        """Return the beginnings of the same rows in another order."""
        return replace(self, nodes=self.nodes[order])

    def paths(self) -> list[list[int]]:
        """[nodes] Return the nodes from the shortest beginning to each node."""
        paths: list[list[int]] = []
        for node, parent in enumerate(self.parents.tolist()):
            paths.append([*(paths[parent] if parent >= 0 else ()), node])
        return paths


def labelled(labels: Sequence[str], tokens: IntArray) -> Prefixes:
    """Return the beginnings of rows that have the first ``tokens`` tokens in common if their labels are equal.

    Args:
        labels: [rows] a label per beginning; "" means that the row shares nothing.
        tokens: [rows] length of the beginning, the same in all rows of a label.
    """
    numbers = {label: number for number, label in enumerate(dict.fromkeys(label for label in labels if label))}
    nodes = np.array([numbers.get(label, -1) for label in labels], np.int64)
    lengths = np.zeros(len(numbers), np.int64)
    lengths[nodes[nodes >= 0]] = tokens[nodes >= 0]
    return Prefixes(parents=np.full(len(numbers), -1, np.int64), tokens=lengths, nodes=nodes)


def common_beginnings(prompts: Sequence[Sequence[int]]) -> Prefixes:
    """Return the beginnings that any two prompts have in common, of all lengths.

    The prompts are sorted, so that each node is an interval of them. One pass over the lengths that neighbours have in
    common makes the tree, with a stack of the nodes that are still open (Kasai et al., 2001, for suffix arrays).
    """
    arrays = [np.asarray(prompt, ">u4") for prompt in prompts]
    order = sorted(range(len(arrays)), key=lambda row: arrays[row].tobytes())
    parents: list[int] = []
    tokens: list[int] = []
    deepest = [-1] * len(arrays)
    open_nodes: list[int] = []
    for before, row in pairwise(order):
        common = _common(arrays[before], arrays[row])
        closed = -1
        while open_nodes and tokens[open_nodes[-1]] > common:
            closed = open_nodes.pop()
        if common and not (open_nodes and tokens[open_nodes[-1]] == common):
            parents.append(open_nodes[-1] if open_nodes else -1)
            tokens.append(common)
            open_nodes.append(len(tokens) - 1)
            if closed >= 0:
                parents[closed] = open_nodes[-1]
        if open_nodes:
            node = open_nodes[-1]
            deepest[row] = node
            if deepest[before] < 0 or tokens[deepest[before]] < common:
                deepest[before] = node
    by_length = np.argsort(np.array(tokens, np.int64), kind="stable")
    # An entry more, so that -1 stays -1.
    numbers = np.full(len(tokens) + 1, -1, np.int64)
    numbers[by_length] = np.arange(len(tokens))
    return Prefixes(
        parents=numbers[np.array(parents, np.int64)[by_length]],
        tokens=np.array(tokens, np.int64)[by_length],
        nodes=numbers[np.array(deepest, np.int64)],
    )


def _common(one: IntArray, other: IntArray) -> int:
    """Return the number of leading tokens that are equal."""
    length = min(len(one), len(other))
    different = one[:length] != other[:length]
    return int(np.argmax(different)) if different.any() else length
