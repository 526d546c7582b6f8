"""Pages of earlier sequences, and of sequences that are being computed, found again by their tokens."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rollout.models.arrays import IntArray
from rollout.models.kv_cache.page_pool import PagePool
from rollout.models.kv_cache.prefix_tree import TOKEN_BYTES, Node, PrefixTree
from rollout.models.kv_cache.waiting_sequences import WaitingSequences

_NO_PAGES: IntArray = np.zeros(0, np.int64)


class CachedPrefix(NamedTuple):
    """The cached beginning of a sequence. Whoever gets it holds a reference to each of its pages."""

    full: IntArray
    """Pages whose tokens all match, in order."""
    partial: IntArray
    """The page after them if its first tokens match, else empty. It must be copied before it is written to."""
    tokens: int
    """Matching tokens in all of these pages."""


NO_PREFIX = CachedPrefix(full=_NO_PAGES, partial=_NO_PAGES, tokens=0)


class PendingPages:
    """Pages in the tree that one prefill is computing."""

    def __init__(self, cache: PrefixCache, nodes: Sequence[Node], first: int) -> None:
        self._cache = cache
        self._nodes = nodes
        self._first = first
        """Page of the sequence that the first node stands for."""
        self._done = 0

    def computed(self, tokens: int) -> None:
        """Offer the pages within the first ``tokens`` tokens of the sequence to others."""
        pages = min(tokens // self._cache.page_size - self._first, len(self._nodes))
        for node in self._nodes[self._done : pages]:
            node.pending = False
            self._cache._remove_ends(node)
        self._done = max(self._done, pages)

    def drop(self) -> None:
        """Take the pages out of the tree that are not computed, or that only this prefill uses."""
        self._cache._discard(self._nodes)


class PrefixCache:
    """Keeps pages in a tree, and evicts them. A page is freed when it is evicted and no row uses it.

    Args:
        pool: owner of the pages.
    """

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._tree = PrefixTree(pool)
        self.page_size = self._tree.page_size
        self.worthwhile_tokens = self._tree.worthwhile_tokens
        """Tokens that a copy of a page must save, unless it saves all that the page holds."""
        self.waiting = WaitingSequences(pool, self._tree)
        """Sequences that are to be computed."""
        self._evictable, self._counted_at = 0, (-1, -1)

    def __len__(self) -> int:
        """Return the number of pages held."""
        return len(self._tree.nodes)

    @property
    def pages(self) -> IntArray:
        """The page of each node, as a view that may be rewritten when pages move."""
        return self._tree.pages

    @property
    def evictable_pages(self) -> int:
        """Pages that no row uses, so that `evict` can free them."""
        state = (self._pool.reference_changes, self._tree.changes)
        if state != self._counted_at:
            self._evictable = int(np.count_nonzero(self._pool.references(self.pages) == 1))
            self._counted_at = state
        return self._evictable

    # -- matching and inserting ------------------------------------------------------------------------

    def match(self, tokens: IntArray, length: int | None = None) -> CachedPrefix:
        """Return the longest cached prefix of a sequence, without its last token, whose logits must be computed.

        Args:
            tokens: [tokens] the sequence, or its beginning if no more may be shared than that without its last token.
            length: tokens of the whole sequence; None: as many.
        """
        tree = self._tree
        if not tree.nodes:
            return NO_PREFIX
        whole = (len(tokens) - 1) // self.page_size * self.page_size
        root = tree.root(len(tokens) if length is None else length)
        path = tree.walk(tokens[:whole], root)
        while path and path[-1].pending:
            path.pop()
        rest = tokens[len(path) * self.page_size : -1][: self.page_size]
        closest, common = tree.closest(path[-1] if path else root, rest)
        full = tree.page_ids[[node.index for node in path]] if path else _NO_PAGES
        partial = _NO_PAGES if closest is None else tree.page_ids[[closest.index]]
        tree.touch(path if closest is None else [*path, closest])
        self._pool.share(full)
        self._pool.share(partial)
        return CachedPrefix(full=full, partial=partial, tokens=len(path) * self.page_size + common)

    def insert(self, tokens: IntArray, pages: IntArray) -> None:
        """Keep the pages of a sequence, with references of its own to those that it did not hold already.

        Args:
            tokens: [tokens] all of them computed.
            pages: at least those that hold ``tokens``; the first tokens of the last one may not change.
        """
        self._extend(tokens, pages, len(tokens), pending=False)

    def begin(self, tokens: IntArray, pages: IntArray, length: int) -> PendingPages:
        """Enter the full pages of a sequence that is about to be computed, so that others wait for them.

        Args:
            tokens: [tokens] the part that others may share.
            pages: at least those that hold ``tokens``.
            length: tokens of the whole sequence.
        """
        whole = len(tokens) // self.page_size
        nodes = self._extend(tokens[: whole * self.page_size], pages, length, pending=True)
        return PendingPages(self, nodes, whole - len(nodes))

    def _extend(self, tokens: IntArray, pages: IntArray, length: int, *, pending: bool) -> list[Node]:
        """Add nodes for the pages of a sequence that the tree does not have; return them."""
        tree = self._tree
        root = tree.root(length)
        path = tree.walk(tokens, root)
        node, done = path[-1] if path else root, len(path)
        if node.pending:  # nothing may follow a page that might never be computed
            return []
        keys = tree.keys(tokens)[done:]
        if not keys or (node.children and self._is_end_of_other(node, keys[0])):
            return []
        waiters = self.waiting.take(node, keys[0])
        added = tree.add(node, keys, pages[done : done + len(keys)], pending=pending)
        if not pending:
            self._remove_ends(added[0])
        tree.touch([*path, *added])
        self.waiting.advance(waiters, node, done, added)
        return added

    def _is_end_of_other(self, node: Node, key: bytes) -> bool:
        """Return whether a child begins with the tokens of a page that is not full, and would be copied for them."""
        if not self._tree.start_bytes <= len(key) < self._tree.page_bytes:
            return False
        return any(other.key.startswith(key) for other in self._tree.alike(node, key) if not other.pending)

    def _remove_ends(self, node: Node) -> None:
        """Remove the ends of sequences which a computed page continues, and for which it would be copied."""
        parent = node.parent
        if node.index < 0 or parent is None or len(parent.children) == 1:
            return
        for end in range(self._tree.start_bytes, len(node.key), TOKEN_BYTES):
            other = parent.child(node.key[:end])
            if other is not None:
                self._remove(other)

    # -- evicting --------------------------------------------------------------------------------------

    def evict(self, pages: int, *, needed: bool = True) -> None:
        """Free ``pages`` pages, or all that no row uses.

        Ends of sequences go first: those that fewest waiting sequences begin with, and of these the least recently
        used.

        Args:
            needed: free pages as well that waiting sequences begin with.
        """
        left = min(pages, self.evictable_pages) if pages > 0 else 0
        if not left:
            return
        tree = self._tree
        leaves = self._leaves()
        leaves = leaves[self._pool.references(tree.page_ids[leaves]) == 1]
        order = np.lexsort((tree.page_ids[leaves], tree.last_used[leaves], tree.waiting[leaves]))
        queue = [self._eviction_order(tree.nodes[index]) for index in leaves[order[:left]].tolist()]
        heapq.heapify(queue)
        evicted: list[int] = []
        while left > 0 and queue and (needed or not queue[0][1]):
            left -= 1
            *_, page, node = heapq.heappop(queue)
            evicted.append(page)
            parent = self._take_out(node)
            if parent.index >= 0 and not parent.children and not (entry := self._eviction_order(parent))[0]:
                heapq.heappush(queue, entry)
        self._pool.release(np.array(evicted, np.int64))  # at once: there are many
        if left > 0 and needed:
            self._evict_from_under_rows(left)

    def _evict_from_under_rows(self, left: int) -> None:
        """Free ``left`` pages that nobody uses but that come before pages in use, which go to make way."""
        queue = [self._eviction_order(self._tree.nodes[index]) for index in self._leaves().tolist()]
        heapq.heapify(queue)
        while left > 0:
            in_use, *_, node = heapq.heappop(queue)
            parent = self._remove(node)
            left -= not in_use
            if parent.index >= 0 and not parent.children:
                heapq.heappush(queue, self._eviction_order(parent))

    def _leaves(self) -> IntArray:
        """Return the indices of the nodes without children."""
        return np.flatnonzero(self._tree.fanouts[: len(self)] == 0)

    def _eviction_order(self, node: Node) -> tuple[bool, int, int, int, Node]:
        tree, index = self._tree, node.index
        page = tree.page_ids[index]
        in_use = bool(self._pool.references(page[None])[0] > 1)
        # No two nodes hold the same page.
        return in_use, int(tree.waiting[index]), int(tree.last_used[index]), int(page), node

    def discard(self, tokens: IntArray) -> None:
        """Remove the pages of a sequence, from its end, which nobody uses but the row that leaves."""
        for root in self._tree.roots:
            self._discard(self._tree.walk(tokens, root))

    def _discard(self, path: Sequence[Node]) -> None:
        for node in reversed(path):
            if node.index < 0:
                continue
            in_use = self._pool.references(self._tree.page_ids[[node.index]])[0] > 2
            if node.children or (not node.pending and in_use):
                break
            self._remove(node)

    def _remove(self, node: Node) -> Node:
        """Drop a node without children and its reference; return its parent."""
        page = self._tree.page_ids[[node.index]]
        parent = self._take_out(node)
        self._pool.release(page)
        return parent

    def _take_out(self, node: Node) -> Node:
        """Drop a node without children, but not its reference; return its parent, where those who waited wait now."""
        self.waiting.leave(node)
        return self._tree.remove(node)

    def clear(self) -> None:
        """Drop all pages."""
        self._tree.clear()
        self.waiting.return_to_roots()

    def check_integrity(self) -> None:
        """Check the tree and the sequences that wait; for tests.

        Raises:
            AssertionError: they do not fit together.
        """
        self._tree.check_integrity()
        self.waiting.check_integrity()
