"""Sequences that wait to be computed, each at the last page of a prefix tree that lies on its path."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from rollout.models.arrays import IntArray
from rollout.models.kv_cache.page_pool import PagePool
from rollout.models.kv_cache.prefix_tree import Node, PrefixTree, Waiter


class WaitingSequences:
    """Keeps sequences where the next page of their path finds them.

    So it is known without a search whether another sequence is computing what one begins with, and how many sequences
    need a page.

    Args:
        pool: owner of the pages.
        tree: where they wait.
    """

    def __init__(self, pool: PagePool, tree: PrefixTree) -> None:
        self._pool = pool
        self._tree = tree
        self._waiters: dict[Waiter, None] = {}

    def add(self, tokens: IntArray) -> Waiter:
        """Add a sequence, [tokens] int64, that is to be computed."""
        node, depth = self._end_of_path(tokens)
        waiter = Waiter(tokens, node, depth)
        self._waiters[waiter] = None
        self._arrive(waiter)
        return waiter

    def remove(self, waiter: Waiter) -> None:
        """Remove a sequence that `add` returned."""
        del self._waiters[waiter]
        node, key = waiter.node, self._next_key(waiter)
        assert node.waiters is not None
        alike = node.waiters[key]
        del alike[waiter]
        if not alike:
            self.take(node, key)
        if node.index >= 0:
            self._tree.waiting[node.index] -= 1

    def clear(self) -> None:
        """Remove all sequences."""
        for waiter in self._waiters:
            waiter.node.waiters = None
        self._waiters.clear()
        self._tree.waiting[:] = 0

    def used_depth(self, waiter: Waiter) -> int:
        """Return the leading pages of a sequence that rows use."""
        node, depth = waiter.node, waiter.depth
        while node.parent is not None and self._pool.references(self._tree.page_ids[[node.index]])[0] == 1:
            node, depth = node.parent, depth - 1
        return depth

    # -- while the tree changes ------------------------------------------------------------------------

    @staticmethod
    def take(node: Node, key: bytes) -> Collection[Waiter]:
        """Take the sequences from a node whose next page has these tokens."""
        if node.waiters is None:
            return ()
        waiters = node.waiters.pop(key, {})
        if not node.waiters:
            node.waiters = None
        return waiters

    def advance(self, waiters: Collection[Waiter], node: Node, depth: int, added: Sequence[Node]) -> None:
        """Move sequences taken from ``node``, ``depth`` pages deep, to the last of the pages added below it."""
        width, path = self._tree.page_bytes, b"".join(page.key for page in added)
        page_size = self._tree.page_size
        full = len(path) // width
        counts = [0] * (full + 1)
        common = 0  # mostly that of the sequence before
        for waiter in waiters:
            start = depth * page_size
            data = waiter.tokens[start : start + (common + 1) * page_size].tobytes()
            if data[: common * width] != path[: common * width] or (
                common < full and data[common * width :] == path[common * width : (common + 1) * width]
            ):
                data = waiter.tokens[start : start + (full + 1) * page_size].tobytes()
                common = _common_bytes(data, path) // width
                data = data[: (common + 1) * width]
            counts[common] += 1
            at = added[common - 1] if common else node
            waiter.node, waiter.depth = at, depth + common
            if at.waiters is None:
                at.waiters = {}
            alike = at.waiters.get(key := data[common * width :])
            if alike is None:
                at.waiters[key] = {waiter: None}
            else:
                alike[waiter] = None
        if node.index >= 0:
            self._tree.waiting[node.index] += counts[0] - len(waiters)
        self._tree.waiting[[page.index for page in added[:full]]] = counts[1:]

    def leave(self, node: Node) -> None:
        """Move the sequences of a node that is about to be removed to the page before it."""
        waiters, node.waiters = node.waiters or {}, None
        for alike in waiters.values():
            for waiter in alike:
                assert node.parent is not None
                self._tree.waiting[node.index] -= 1
                waiter.node, waiter.depth = node.parent, waiter.depth - 1
                self._arrive(waiter)

    def return_to_roots(self) -> None:
        """Move all sequences to the roots of a tree that was cleared."""
        for waiter in self._waiters:
            waiter.node, waiter.depth = self._tree.root(len(waiter.tokens)), 0
            self._arrive(waiter)

    def _arrive(self, waiter: Waiter) -> None:
        """Enter a sequence at its node."""
        node = waiter.node
        if node.waiters is None:
            node.waiters = {}
        node.waiters.setdefault(self._next_key(waiter), {})[waiter] = None
        if node.index >= 0:
            self._tree.waiting[node.index] += 1

    def _next_key(self, waiter: Waiter) -> bytes:
        """Return the tokens of the page after its path; no page has those of an incomplete one."""
        start = waiter.depth * self._tree.page_size
        return waiter.tokens[start : start + self._tree.page_size].tobytes()

    def _end_of_path(self, tokens: IntArray) -> tuple[Node, int]:
        """Return the last node on a sequence's path, and the pages to it."""
        whole = len(tokens) // self._tree.page_size * self._tree.page_size
        root = self._tree.root(len(tokens))
        path = self._tree.walk(tokens[:whole], root)
        return path[-1] if path else root, len(path)

    def check_integrity(self) -> None:
        """Check that each sequence is found at the end of its path, and nothing else is; for tests.

        Raises:
            AssertionError: it is not so.
        """
        for waiter in self._waiters:
            node, depth = self._end_of_path(waiter.tokens)
            alike = (node.waiters or {}).get(self._next_key(waiter), {})
            if (waiter.node, waiter.depth) != (node, depth) or waiter not in alike:
                raise AssertionError(f"a sequence of {len(waiter.tokens)} tokens waits at the wrong page")
        places = [*self._tree.roots, *self._tree.nodes]
        waiting = sum(len(alike) for node in places for alike in (node.waiters or {}).values())
        if waiting != len(self._waiters):
            raise AssertionError(f"{waiting} sequences wait at pages, not {len(self._waiters)}")


def _common_bytes(one: bytes, other: bytes) -> int:
    """Return how many leading bytes two strings have in common."""
    count = min(len(one), len(other))
    differs = np.frombuffer(one, np.uint8, count) != np.frombuffer(other, np.uint8, count)
    first = int(differs.argmax()) if count else 0
    return first if count and differs[first] else count
