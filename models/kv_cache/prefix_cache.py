"""Pages of earlier sequences, and of sequences that are being computed, found again by their tokens."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np

from rollout.models.arrays import IntArray
from rollout.models.kv_cache.page_pool import PagePool

_NO_PAGES: IntArray = np.zeros(0, np.int64)
#: A byte of places in a page that hold no token: -1 as a token.
_NO_TOKEN = b"\xff"
_TOKEN_BYTES = 8
#: Children of a node among which the closest is looked for. Of more, those with the same first tokens, and so many.
_MOST_COMPARED = 64


class CachedPrefix(NamedTuple):
    """The cached beginning of a sequence. Whoever gets it holds a reference to each of its pages."""

    full: IntArray
    """Pages whose tokens all match, in order."""
    partial: IntArray
    """The page after them if its first tokens match, else empty. It must be copied before it is written to."""
    tokens: int
    """Matching tokens in all of these pages."""


NO_PREFIX = CachedPrefix(full=_NO_PAGES, partial=_NO_PAGES, tokens=0)


@dataclass(eq=False, slots=True)
class Waiter:
    """A sequence that is still to be computed. The cache knows the deepest page on its path."""

    tokens: IntArray
    node: _Node
    depth: int
    """Pages on its path, those included that are still being computed."""

    @property
    def is_blocked(self) -> bool:
        """Whether the last page on its path is being computed."""
        return self.node.pending


@dataclass(eq=False, slots=True)
class _Node:
    """A page, known by its own tokens and those of the pages before it.

    Most nodes have one child and nobody waits there, so neither makes a dictionary: Python's collector of garbage
    stops the world in proportion to the objects that refer to others.
    """

    key: bytes
    """The page's tokens; fewer than a page holds at the end of a sequence, and then the node has no children."""
    parent: _Node | None = None
    only: _Node | None = None
    """The child, if there is one."""
    several: dict[bytes, _Node] | None = None
    """The children by their tokens, if there are several."""
    index: int = -1
    """Place in the cache's arrays; -1 once it has left the tree."""
    pending: bool = False
    """Whether the page is still being computed; then the pages below it are as well."""
    waiters: dict[bytes, dict[Waiter, None]] | None = None
    """Sequences whose path ends here, by the tokens of their next page; None: there are none."""
    starts: dict[bytes, dict[_Node, None]] | None = None
    """The children by their first tokens, if there are many."""

    @property
    def children(self) -> Collection[_Node]:
        if self.several is not None:
            return self.several.values()
        return () if self.only is None else (self.only,)

    def child(self, key: bytes) -> _Node | None:
        """Return the child with these tokens."""
        if self.several is not None:
            return self.several.get(key)
        return self.only if self.only is not None and self.only.key == key else None

    def add(self, child: _Node) -> None:
        """Add a child with other tokens than those that there are."""
        if self.several is not None:
            self.several[child.key] = child
        elif self.only is not None:
            self.several = {self.only.key: self.only, child.key: child}
            self.only = None
        else:
            self.only = child

    def remove(self, child: _Node) -> None:
        """Remove a child."""
        if self.several is None:
            self.only = None
            return
        del self.several[child.key]
        if len(self.several) == 1:
            (self.only,) = self.several.values()
            self.several = None


class PendingPages:
    """Pages in the tree that one prefill is computing."""

    def __init__(self, cache: PrefixCache, nodes: Sequence[_Node], first: int) -> None:
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
    """A tree of pages: the path to a node spells a prefix of some sequence, page by page.

    Each node holds one reference to its page. A page is freed when it is evicted and no row uses it. Sequences are
    matched by their tokens alone, so several may share a page, and each may continue in many ways. Sequences on
    different sides of the longrope boundary share nothing.

    The tree also knows the sequences that wait to be computed: each stands at the last page on its path, where the next
    page of that path finds it. So it is known without a search whether another sequence is computing what it begins
    with, and how many sequences need a page.

    Args:
        pool: owner of the pages.
    """

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self.page_size = pool.layout.page_size
        self._page_bytes = _TOKEN_BYTES * self.page_size
        self.worthwhile_tokens = max(1, self.page_size // 4)
        """Tokens that a copy of a page must save, unless it saves all that the page holds."""
        self._start_bytes = _TOKEN_BYTES * self.worthwhile_tokens
        self._clock = 0
        self._changes = 0
        self._evictable, self._counted_at = 0, (-1, -1)
        self._waiters: dict[Waiter, None] = {}
        self._forget()

    def __len__(self) -> int:
        """Return the number of pages held."""
        return len(self._nodes)

    @property
    def pages(self) -> IntArray:
        """The page of each node, as a view that may be rewritten when pages move."""
        return self._pages[: len(self)]

    @property
    def evictable_pages(self) -> int:
        """Pages that no row uses, so that `evict` can free them."""
        state = (self._pool.reference_changes, self._changes)
        if state != self._counted_at:
            self._evictable = int(np.count_nonzero(self._pool.references(self.pages) == 1))
            self._counted_at = state
        return self._evictable

    # -- matching and inserting ------------------------------------------------------------------------

    def match(self, tokens: IntArray) -> CachedPrefix:
        """Return the longest cached prefix of a sequence, without its last token, whose logits must be computed."""
        if not self._nodes:
            return NO_PREFIX
        whole = (len(tokens) - 1) // self.page_size * self.page_size
        root = self._root(len(tokens))
        path = self._walk(tokens[:whole], root)
        while path and path[-1].pending:
            path.pop()
        rest = tokens[len(path) * self.page_size : -1][: self.page_size]
        closest, common = self._closest(path[-1] if path else root, rest)
        full = self._pages[[node.index for node in path]] if path else _NO_PAGES
        partial = _NO_PAGES if closest is None else self._pages[[closest.index]]
        self._touch(path if closest is None else [*path, closest])
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

    def _extend(self, tokens: IntArray, pages: IntArray, length: int, *, pending: bool) -> list[_Node]:
        """Add nodes for the pages of a sequence that the tree does not have; return them."""
        root = self._root(length)
        path = self._walk(tokens, root)
        node, done = path[-1] if path else root, len(path)
        if node.pending:  # nothing may follow a page that might never be computed
            return []
        keys = self._keys(tokens)[done:]
        if not keys or (node.children and self._is_end_of_other(node, keys[0])):
            return []
        waiters = self._take_waiters(node, keys[0])
        added = self._add(node, keys, pages[done : done + len(keys)], pending=pending)
        if not pending:
            self._remove_ends(added[0])
        self._pool.share(pages[done : done + len(added)])
        self._touch([*path, *added])
        self._advance(waiters, node, done, added)
        return added

    def _advance(self, waiters: Collection[Waiter], node: _Node, depth: int, added: Sequence[_Node]) -> None:
        """Move sequences that waited at ``node``, ``depth`` pages deep, to the last of the pages added below it."""
        width, path = self._page_bytes, b"".join(page.key for page in added)
        full = len(path) // width
        counts = [0] * (full + 1)
        common = 0  # mostly that of the sequence before
        for waiter in waiters:
            start = depth * self.page_size
            data = waiter.tokens[start : start + (common + 1) * self.page_size].tobytes()
            if data[: common * width] != path[: common * width] or (
                common < full and data[common * width :] == path[common * width : (common + 1) * width]
            ):
                data = waiter.tokens[start : start + (full + 1) * self.page_size].tobytes()
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
            self._waiting[node.index] += counts[0] - len(waiters)
        self._waiting[[page.index for page in added[:full]]] = counts[1:]

    def _is_end_of_other(self, node: _Node, key: bytes) -> bool:
        """Return whether a child begins with the tokens of a page that is not full, and would be copied for them."""
        if not self._start_bytes <= len(key) < self._page_bytes:
            return False
        return any(other.key.startswith(key) for other in self._alike(node, key) if not other.pending)

    def _remove_ends(self, node: _Node) -> None:
        """Remove the ends of sequences which a computed page continues, and for which it would be copied."""
        parent = node.parent
        if node.index < 0 or parent is None or len(parent.children) == 1:
            return
        for end in range(self._start_bytes, len(node.key), _TOKEN_BYTES):
            other = parent.child(node.key[:end])
            if other is not None:
                self._remove(other)

    def _root(self, tokens: int) -> _Node:
        """Return the root for sequences of that length."""
        return self._roots[self._pool.layout.alike(tokens, 0)]

    def _walk(self, tokens: IntArray, root: _Node) -> list[_Node]:
        """Return the nodes of the leading pages of ``tokens`` that are cached."""
        path, node = list[_Node](), root
        data, width = tokens.astype(np.int64, copy=False).tobytes(), self._page_bytes
        for start in range(0, len(data), width):
            child = node.child(data[start : start + width])
            if child is None:
                break
            path.append(child)
            node = child
        return path

    def _keys(self, tokens: IntArray) -> list[bytes]:
        """Return the tokens of each page as bytes; the last page may hold fewer."""
        data, width = tokens.astype(np.int64, copy=False).tobytes(), self._page_bytes
        return [data[start : start + width] for start in range(0, len(data), width)]

    def _closest(self, node: _Node, tokens: IntArray) -> tuple[_Node | None, int]:
        """Return the child that has most of the first ``tokens`` in common, and how many; None if no copy would pay."""
        if not len(tokens) or not node.children:
            return None, 0
        data, start = tokens.tobytes(), self._start_bytes
        children = [
            child
            for child in self._alike(node, data)
            # A copy of any other saves too little.
            if (child.key[:start] == data[:start] or data.startswith(child.key)) and not child.pending
        ]
        if not children:
            return None, 0
        keys = b"".join(child.key.ljust(self._page_bytes, _NO_TOKEN) for child in children)
        same = np.frombuffer(keys, np.int64).reshape(len(children), -1)[:, : len(tokens)] == tokens
        common = np.cumprod(same, axis=1).sum(axis=1)
        sizes = np.array([len(child.key) // _TOKEN_BYTES for child in children], np.int64)
        common[common < np.minimum(self.worthwhile_tokens, sizes)] = 0
        best = int(common.argmax())
        return (children[best], int(common[best])) if common[best] else (None, 0)

    def _alike(self, node: _Node, key: bytes) -> Iterable[_Node]:
        """Return the children that may have tokens in common with a page, or some of them if there are many."""
        if node.starts is None:
            return node.children
        same = islice(node.starts.get(key[: self._start_bytes], ()), _MOST_COMPARED)
        ends = (node.child(key[:end]) for end in range(_TOKEN_BYTES, self._start_bytes, _TOKEN_BYTES))
        return [*same, *(end for end in ends if end is not None)]

    def _touch(self, path: list[_Node]) -> None:
        self._clock += 1
        self._used[[node.index for node in path]] = self._clock

    # -- sequences that wait ---------------------------------------------------------------------------

    def wait(self, tokens: IntArray) -> Waiter:
        """Add a sequence, [tokens] int64, that is to be computed."""
        root = self._root(len(tokens))
        path = self._walk(tokens[: len(tokens) // self.page_size * self.page_size], root)
        waiter = Waiter(tokens, path[-1] if path else root, len(path))
        self._waiters[waiter] = None
        self._arrive(waiter)
        return waiter

    def stop_waiting(self, waiter: Waiter) -> None:
        """Remove a sequence that `wait` added."""
        del self._waiters[waiter]
        node, key = waiter.node, self._next_key(waiter)
        assert node.waiters is not None
        alike = node.waiters[key]
        del alike[waiter]
        if not alike:
            self._take_waiters(node, key)
        if node.index >= 0:
            self._waiting[node.index] -= 1

    def stop_all_waiting(self) -> None:
        """Remove all sequences that wait."""
        for waiter in self._waiters:
            waiter.node.waiters = None
        self._waiters.clear()
        self._waiting[:] = 0

    def used_depth(self, waiter: Waiter) -> int:
        """Return the leading pages of a sequence that rows use."""
        node, depth = waiter.node, waiter.depth
        while node.parent is not None and self._pool.references(self._pages[[node.index]])[0] == 1:
            node, depth = node.parent, depth - 1
        return depth

    def _arrive(self, waiter: Waiter) -> None:
        """Enter a sequence at its node."""
        node = waiter.node
        if node.waiters is None:
            node.waiters = {}
        node.waiters.setdefault(self._next_key(waiter), {})[waiter] = None
        if node.index >= 0:
            self._waiting[node.index] += 1

    @staticmethod
    def _take_waiters(node: _Node, key: bytes) -> Collection[Waiter]:
        """Take the sequences from a node whose next page has these tokens."""
        if node.waiters is None:
            return ()
        waiters = node.waiters.pop(key, {})
        if not node.waiters:
            node.waiters = None
        return waiters

    def _move(self, waiter: Waiter, node: _Node, depth: int) -> None:
        """Enter a sequence at another node; those that wait beside it have been taken from theirs already."""
        if waiter.node.index >= 0:
            self._waiting[waiter.node.index] -= 1
        waiter.node, waiter.depth = node, depth
        self._arrive(waiter)

    def _next_key(self, waiter: Waiter) -> bytes:
        """Return the tokens of the page after its path; no page has those of an incomplete one."""
        start = waiter.depth * self.page_size
        return waiter.tokens[start : start + self.page_size].tobytes()

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
        leaves = np.flatnonzero(self._fanouts[: len(self)] == 0)
        leaves = leaves[self._pool.references(self._pages[leaves]) == 1]
        order = np.lexsort((self._pages[leaves], self._used[leaves], self._waiting[leaves]))
        queue = [self._eviction_order(self._nodes[index]) for index in leaves[order[:left]].tolist()]
        heapq.heapify(queue)
        while left > 0 and queue and (needed or not queue[0][1]):
            left -= 1
            parent = self._remove(heapq.heappop(queue)[-1])
            if parent.index >= 0 and not parent.children and not (entry := self._eviction_order(parent))[0]:
                heapq.heappush(queue, entry)
        if left > 0 and needed:
            self._evict_from_under_rows(left)

    def _evict_from_under_rows(self, left: int) -> None:
        """Free ``left`` pages that nobody uses but that come before pages in use, which go to make way."""
        leaves = np.flatnonzero(self._fanouts[: len(self)] == 0).tolist()
        queue = [self._eviction_order(self._nodes[index]) for index in leaves]
        heapq.heapify(queue)
        while left > 0:
            in_use, *_, node = heapq.heappop(queue)
            parent = self._remove(node)
            left -= not in_use
            if parent.index >= 0 and not parent.children:
                heapq.heappush(queue, self._eviction_order(parent))

    def _eviction_order(self, node: _Node) -> tuple[bool, int, int, int, _Node]:
        in_use = bool(self._pool.references(self._pages[[node.index]])[0] > 1)
        # No two nodes hold the same page.
        return in_use, int(self._waiting[node.index]), int(self._used[node.index]), int(self._pages[node.index]), node

    def discard(self, tokens: IntArray) -> None:
        """Remove the pages of a sequence, from its end, which nobody uses but the row that leaves."""
        for root in self._roots.values():
            self._discard(self._walk(tokens, root))

    def _discard(self, path: Sequence[_Node]) -> None:
        for node in reversed(path):
            if node.index < 0:
                continue
            if node.children or (not node.pending and self._pool.references(self._pages[[node.index]])[0] > 2):
                break
            self._remove(node)

    def clear(self) -> None:
        """Drop all pages."""
        self._pool.release(self.pages)
        for node in self._nodes:
            node.index = -1
        self._forget()
        for waiter in self._waiters:
            waiter.node, waiter.depth = self._root(len(waiter.tokens)), 0
            self._arrive(waiter)

    def _forget(self) -> None:
        self._roots = {True: _Node(b""), False: _Node(b"")}
        self._nodes: list[_Node] = []
        # One entry per node, without gaps; `_add` lists all of them.
        self._pages: IntArray = np.zeros(0, np.int64)
        self._used: IntArray = np.zeros(0, np.int64)
        self._fanouts: IntArray = np.zeros(0, np.int64)
        self._waiting: IntArray = np.zeros(0, np.int64)
        self._changes += 1

    # -- nodes -----------------------------------------------------------------------------------------

    def _add(self, parent: _Node, keys: Sequence[bytes], pages: IntArray, *, pending: bool) -> list[_Node]:
        """Add a chain of nodes below ``parent``: one for each of ``keys``."""
        first, end = len(self._nodes), len(self._nodes) + len(keys)
        if end > len(self._pages):
            room = max(64, 2 * end)
            self._pages = _longer(self._pages, room)
            self._used = _longer(self._used, room)
            self._fanouts = _longer(self._fanouts, room)
            self._waiting = _longer(self._waiting, room)
        self._pages[first:end] = pages
        self._fanouts[first:end] = 1
        self._fanouts[end - 1] = 0
        self._waiting[first:end] = 0
        if parent.index >= 0:
            self._fanouts[parent.index] += 1
        added, node = list[_Node](), parent
        for index, key in enumerate(keys, first):
            child = _Node(key, node, index=index, pending=pending)
            node.add(child)
            added.append(child)
            node = child
        if parent.starts is not None:
            parent.starts.setdefault(keys[0][: self._start_bytes], {})[added[0]] = None
        elif len(parent.children) > _MOST_COMPARED:
            parent.starts = {}
            for child in parent.children:
                parent.starts.setdefault(child.key[: self._start_bytes], {})[child] = None
        self._nodes += added
        self._changes += 1
        return added

    def _remove(self, node: _Node) -> _Node:
        """Drop a node without children; return its parent."""
        parent, index = node.parent, node.index
        assert parent is not None
        parent.remove(node)
        if parent.starts is not None:
            start = node.key[: self._start_bytes]
            del parent.starts[start][node]
            if not parent.starts[start]:
                del parent.starts[start]
        if parent.index >= 0:
            self._fanouts[parent.index] -= 1
        waiters, node.waiters = node.waiters or {}, None
        for alike in waiters.values():
            for waiter in alike:
                self._move(waiter, parent, waiter.depth - 1)
        self._pool.release(self._pages[[index]])
        last = self._nodes.pop()
        if last is not node:
            self._nodes[index] = last
            for array in (self._pages, self._used, self._fanouts, self._waiting):
                array[index] = array[last.index]
            last.index = index
        node.index = -1
        self._changes += 1
        return parent

    def check_integrity(self) -> None:
        """Check the tree and its arrays; for tests.

        Raises:
            AssertionError: they do not fit together.
        """
        for index, node in enumerate(self._nodes):
            size = len(node.key) // _TOKEN_BYTES
            if node.index != index or node.parent is None or node.parent.child(node.key) is not node:
                raise AssertionError(f"node {index} has lost its place")
            if self._fanouts[index] != len(node.children) or (node.children and size < self.page_size):
                raise AssertionError(f"node {index} has children that are not counted, or that it must not have")
            if node.parent.pending and not node.pending:
                raise AssertionError(f"node {index} is said to be computed, and the page before it is not")
            if self._waiting[index] != sum(map(len, (node.waiters or {}).values())):
                raise AssertionError(f"node {index} counts other sequences than wait there")
        reached, nodes, waiting = 0, list(self._roots.values()), 0
        while nodes:
            node = nodes.pop()
            reached += len(node.children)
            waiting += sum(map(len, (node.waiters or {}).values()))
            nodes.extend(node.children)
            if node.starts is not None and {n for part in node.starts.values() for n in part} != {*node.children}:
                raise AssertionError("children are not found by their first tokens")
        if reached != len(self) or len(set(self.pages.tolist())) != len(self):
            raise AssertionError(f"{reached} nodes with {len(set(self.pages.tolist()))} pages, not {len(self)}")
        for waiter in self._waiters:
            root, whole = self._root(len(waiter.tokens)), len(waiter.tokens) // self.page_size * self.page_size
            path = self._walk(waiter.tokens[:whole], root)
            node = path[-1] if path else root
            if (waiter.node, waiter.depth) != (node, len(path)) or waiter not in (node.waiters or {})[
                self._next_key(waiter)
            ]:
                raise AssertionError(f"a sequence of {len(waiter.tokens)} tokens waits at the wrong page")
        if waiting != len(self._waiters):
            raise AssertionError(f"{waiting} sequences wait at pages, not {len(self._waiters)}")


def _longer(array: IntArray, length: int) -> IntArray:
    """Return a copy with ``length`` entries, the new ones 0."""
    longer = np.zeros(length, np.int64)
    longer[: len(array)] = array
    return longer


def _common_bytes(one: bytes, other: bytes) -> int:
    """Return how many leading bytes two strings have in common."""
    count = min(len(one), len(other))
    differs = np.frombuffer(one, np.uint8, count) != np.frombuffer(other, np.uint8, count)
    first = int(differs.argmax()) if count else 0
    return first if count and differs[first] else count
