"""A tree of pages: the path to a node spells the beginning of some sequence, page by page."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from rollout.models.arrays import IntArray
from rollout.models.kv_cache.page_pool import PagePool

TOKEN_BYTES = 8
#: A byte of places in a page that hold no token: -1 as a token.
_NO_TOKEN = b"\xff"
#: Children of a node among which the closest is looked for. Of more, those with the same first tokens, and so many.
_MOST_COMPARED = 64


@dataclass(eq=False, slots=True)
class Waiter:
    """A sequence that is still to be computed. It knows the deepest page on its path."""

    tokens: IntArray
    node: Node
    depth: int
    """Pages on its path, those included that are still being computed."""

    @property
    def is_blocked(self) -> bool:
        """Whether the last page on its path is being computed."""
        return self.node.pending


@dataclass(eq=False, slots=True)
class Node:
    """A page, known by its own tokens and those of the pages before it.

    Most nodes have one child and nobody waits there, so neither makes a dictionary: Python's collector of garbage
    stops the world in proportion to the objects that refer to others.
    """

    key: bytes
    """The page's tokens; fewer than a page holds at the end of a sequence, and then the node has no children."""
    parent: Node | None = None
    only: Node | None = None
    """The child, if there is one."""
    several: dict[bytes, Node] | None = None
    """The children by their tokens, if there are several."""
    index: int = -1
    """Place in the tree's arrays; -1 once it has left the tree."""
    pending: bool = False
    """Whether the page is still being computed; then the pages below it are as well."""
    waiters: dict[bytes, dict[Waiter, None]] | None = None
    """Sequences whose path ends here, by the tokens of their next page; None: there are none."""
    starts: dict[bytes, dict[Node, None]] | None = None
    """The children by their first tokens, if there are many."""

    @property
    def children(self) -> Collection[Node]:
        if self.several is not None:
            return self.several.values()
        return () if self.only is None else (self.only,)

    def child(self, key: bytes) -> Node | None:
        """Return the child with these tokens."""
        if self.several is not None:
            return self.several.get(key)
        return self.only if self.only is not None and self.only.key == key else None

    def add(self, child: Node) -> None:
        """Add a child with other tokens than those that there are."""
        if self.several is not None:
            self.several[child.key] = child
        elif self.only is not None:
            self.several = {self.only.key: self.only, child.key: child}
            self.only = None
        else:
            self.only = child

    def remove(self, child: Node) -> None:
        """Remove a child."""
        if self.several is None:
            self.only = None
            return
        del self.several[child.key]
        if len(self.several) == 1:
            (self.only,) = self.several.values()
            self.several = None


class PrefixTree:
    """Nodes and what is known of each, in arrays.

    Each node holds one reference to its page. Sequences are matched by their tokens alone, so several may share a page,
    and each may continue in many ways. Sequences on different sides of the longrope boundary share nothing.

    Args:
        pool: owner of the pages.
    """

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self.page_size = pool.layout.page_size
        self.page_bytes = TOKEN_BYTES * self.page_size
        self.worthwhile_tokens = max(1, self.page_size // 4)
        """Tokens that a copy of a page must save, unless it saves all that the page holds."""
        self.start_bytes = TOKEN_BYTES * self.worthwhile_tokens
        self.changes = 0
        """How often nodes were added or removed."""
        self._clock = 0
        self._forget()

    def _forget(self) -> None:
        self._roots = {True: Node(b""), False: Node(b"")}
        self.nodes: list[Node] = []
        # One entry per node, without gaps; `add` lists all of them.
        self.page_ids: IntArray = np.zeros(0, np.int64)
        self.last_used: IntArray = np.zeros(0, np.int64)
        self.fanouts: IntArray = np.zeros(0, np.int64)
        self.waiting: IntArray = np.zeros(0, np.int64)
        """Sequences that wait at each node."""
        self.changes += 1

    @property
    def roots(self) -> Collection[Node]:
        """The roots for sequences of all lengths."""
        return self._roots.values()

    @property
    def pages(self) -> IntArray:
        """The page of each node, as a view that may be rewritten when pages move."""
        return self.page_ids[: len(self.nodes)]

    # -- finding ---------------------------------------------------------------------------------------

    def root(self, tokens: int) -> Node:
        """Return the root for sequences of that length."""
        return self._roots[self._pool.layout.alike(tokens, 0)]

    def walk(self, tokens: IntArray, root: Node) -> list[Node]:
        """Return the nodes of the leading pages of ``tokens`` that are in the tree."""
        path, node = list[Node](), root
        data, width = tokens.astype(np.int64, copy=False).tobytes(), self.page_bytes
        for start in range(0, len(data), width):
            child = node.child(data[start : start + width])
            if child is None:
                break
            path.append(child)
            node = child
        return path

    def keys(self, tokens: IntArray) -> list[bytes]:
        """Return the tokens of each page as bytes; the last page may hold fewer."""
        data, width = tokens.astype(np.int64, copy=False).tobytes(), self.page_bytes
        return [data[start : start + width] for start in range(0, len(data), width)]

    def closest(self, node: Node, tokens: IntArray) -> tuple[Node | None, int]:
        """Return the child that has most of the first ``tokens`` in common, and how many; None if no copy would pay."""
        if not len(tokens) or not node.children:
            return None, 0
        data, start = tokens.tobytes(), self.start_bytes
        children = [
            child
            for child in self.alike(node, data)
            # A copy of any other saves too little.
            if (child.key[:start] == data[:start] or data.startswith(child.key)) and not child.pending
        ]
        if not children:
            return None, 0
        keys = b"".join(child.key.ljust(self.page_bytes, _NO_TOKEN) for child in children)
        same = np.frombuffer(keys, np.int64).reshape(len(children), -1)[:, : len(tokens)] == tokens
        common = np.cumprod(same, axis=1).sum(axis=1)
        sizes = np.array([len(child.key) // TOKEN_BYTES for child in children], np.int64)
        common[common < np.minimum(self.worthwhile_tokens, sizes)] = 0
        best = int(common.argmax())
        return (children[best], int(common[best])) if common[best] else (None, 0)

    def alike(self, node: Node, key: bytes) -> Iterable[Node]:
        """Return the children that may have tokens in common with a page, or some of them if there are many."""
        if node.starts is None:
            return node.children
        same = islice(node.starts.get(key[: self.start_bytes], ()), _MOST_COMPARED)
        ends = (node.child(key[:end]) for end in range(TOKEN_BYTES, self.start_bytes, TOKEN_BYTES))
        return [*same, *(end for end in ends if end is not None)]

    def touch(self, path: list[Node]) -> None:
        """Note that nodes are used now."""
        self._clock += 1
        self.last_used[[node.index for node in path]] = self._clock

    # -- changing --------------------------------------------------------------------------------------

    def add(self, parent: Node, keys: Sequence[bytes], pages: IntArray, *, pending: bool) -> list[Node]:
        """Add a chain of nodes below ``parent``: one for each of ``keys``, with a reference to its page."""
        first, end = len(self.nodes), len(self.nodes) + len(keys)
        if end > len(self.page_ids):
            room = max(64, 2 * end)
            self.page_ids = _longer(self.page_ids, room)
            self.last_used = _longer(self.last_used, room)
            self.fanouts = _longer(self.fanouts, room)
            self.waiting = _longer(self.waiting, room)
        self.page_ids[first:end] = pages
        self._pool.share(pages)
        self.fanouts[first:end] = 1
        self.fanouts[end - 1] = 0
        self.waiting[first:end] = 0
        if parent.index >= 0:
            self.fanouts[parent.index] += 1
        added, node = list[Node](), parent
        for index, key in enumerate(keys, first):
            child = Node(key, node, index=index, pending=pending)
            node.add(child)
            added.append(child)
            node = child
        if parent.starts is not None:
            parent.starts.setdefault(keys[0][: self.start_bytes], {})[added[0]] = None
        elif len(parent.children) > _MOST_COMPARED:
            parent.starts = {}
            for child in parent.children:
                parent.starts.setdefault(child.key[: self.start_bytes], {})[child] = None
        self.nodes += added
        self.changes += 1
        return added

    def remove(self, node: Node) -> Node:
        """Drop a node without children where nobody waits; return its parent. The reference to its page stays."""
        parent, index = node.parent, node.index
        assert parent is not None
        parent.remove(node)
        if parent.starts is not None:
            start = node.key[: self.start_bytes]
            del parent.starts[start][node]
            if not parent.starts[start]:
                del parent.starts[start]
        if parent.index >= 0:
            self.fanouts[parent.index] -= 1
        last = self.nodes.pop()
        if last is not node:
            self.nodes[index] = last
            for array in (self.page_ids, self.last_used, self.fanouts, self.waiting):
                array[index] = array[last.index]
            last.index = index
        node.index = -1
        self.changes += 1
        return parent

    def clear(self) -> None:
        """Drop all nodes and their references."""
        self._pool.release(self.pages)
        for node in self.nodes:
            node.index = -1
        self._forget()

    def check_integrity(self) -> None:
        """Check the nodes and the arrays; for tests.

        Raises:
            AssertionError: they do not fit together.
        """
        for index, node in enumerate(self.nodes):
            size = len(node.key) // TOKEN_BYTES
            if node.index != index or node.parent is None or node.parent.child(node.key) is not node:
                raise AssertionError(f"node {index} has lost its place")
            if self.fanouts[index] != len(node.children) or (node.children and size < self.page_size):
                raise AssertionError(f"node {index} has children that are not counted, or that it must not have")
            if node.parent.pending and not node.pending:
                raise AssertionError(f"node {index} is said to be computed, and the page before it is not")
            if self.waiting[index] != sum(map(len, (node.waiters or {}).values())):
                raise AssertionError(f"node {index} counts other sequences than wait there")
        reached, nodes = 0, list(self.roots)
        while nodes:
            node = nodes.pop()
            reached += len(node.children)
            nodes.extend(node.children)
            if node.starts is not None and {n for part in node.starts.values() for n in part} != {*node.children}:
                raise AssertionError("children are not found by their first tokens")
        if reached != len(self.nodes) or len(set(self.pages.tolist())) != len(self.nodes):
            raise AssertionError(f"{reached} nodes with {len(set(self.pages.tolist()))} pages, not {len(self.nodes)}")


def _longer(array: IntArray, length: int) -> IntArray:
    """Return a copy with ``length`` entries, the new ones 0."""
    longer = np.zeros(length, np.int64)
    longer[: len(array)] = array
    return longer
