"""Pages of beginnings that simulated prompts have in common: who holds them, and which are kept for waiting rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from rollout.batcher.simulation.workloads import Workload
from rollout.batcher.types import IntArray, SharedPages


class PrefixPages:
    """The full pages of common beginnings, one piece per node of the workload's tree.

    Live rows and prefills hold the pieces that their prompt begins with. Pieces that nobody holds are kept as long as
    waiting rows need them and memory allows. As in the engine, those that fewest waiting rows need are evicted first,
    and of these the least recently used.

    A row that has part of a page in common with others copies it from one of them if that pays.

    Args:
        workload: all rows of the job.
        page_tokens: tokens per page.
    """

    def __init__(self, workload: Workload, page_tokens: int) -> None:
        self._page_tokens = page_tokens
        self._paths: list[list[int]] = [[] for _ in range(len(workload))]
        """[rows] pieces of each row's prompt, from its start."""
        self._ends: list[int] = []
        """[pieces] pages from the start of the prompt to the end of the piece."""
        self._parents: list[int] = []
        prefixes = workload.prefixes
        if prefixes is not None:
            # The last token of a prompt is computed in any case, so its page is not shared where the prompt ends in it.
            ends = prefixes.tokens // page_tokens
            own = prefixes.nodes >= 0
            np.minimum.at(ends, prefixes.nodes[own], (workload.prompt_tokens[own] - 1) // page_tokens)
            paths = prefixes.paths()
            self._ends, self._parents = ends.tolist(), prefixes.parents.tolist()
            # Nodes that differ within a page share no page.
            paths = [[piece for piece in path if self._pages(piece)] for path in paths]
            self._paths = [paths[node] if node >= 0 else [] for node in prefixes.nodes.tolist()]
        self._groups: list[int] = workload.groups.tolist()
        self._copied = [0] * len(workload)
        """[rows] tokens of a page that each row copies."""
        if prefixes is not None:
            common = np.where(own, prefixes.tokens[prefixes.nodes], 0)
            rest = np.minimum(common, workload.prompt_tokens - 1) - page_tokens * np.array(
                [self.pages_of(row) for row in range(len(workload))]
            )
            pays = (rest >= page_tokens // 4) & np.array([bool(path) for path in self._paths])
            self._copied = np.where(pays, rest, 0).tolist()
        self._holders = [0] * len(self._ends)
        self._waiting = [0] * len(self._ends)
        self._computed = [False] * len(self._ends)
        self._used = [0] * len(self._ends)
        """[pieces] when each was last taken; a clock that counts what rows take."""
        self._clock = 0
        self._kept: set[int] = set()
        """Pieces that nobody holds."""
        self.kept_pages = 0
        """Pages of these."""

    def __bool__(self) -> bool:
        return any(self._paths)

    def _pages(self, piece: int) -> int:
        parent = self._parents[piece]
        return self._ends[piece] - (self._ends[parent] if parent >= 0 else 0)

    # -- what rows find -------------------------------------------------------------------------------

    def pages_of(self, row: int) -> int:
        """Return the pages that the row's prompt begins with and that other prompts may hold too."""
        return self._ends[self._paths[row][-1]] if self._paths[row] else 0

    def held_pages(self, row: int) -> int:
        """Return how many of them a live row or a prefill holds."""
        return max((self._ends[piece] for piece in self._paths[row] if self._holders[piece]), default=0)

    def computed_pages(self, row: int) -> int:
        """Return how many of them are computed."""
        return max((self._ends[piece] for piece in self._paths[row] if self._computed[piece]), default=0)

    def copied_tokens(self, row: int) -> int:
        """Return the tokens after them that the row copies from another, if all of them are computed."""
        path = self._paths[row]
        return self._copied[row] if path and self._computed[path[-1]] else 0

    def is_in_prefill(self, row: int) -> bool:
        """Return True if some of them are being computed; the row waits for them."""
        return any(self._holders[piece] and not self._computed[piece] for piece in self._paths[row])

    # -- who holds pieces -----------------------------------------------------------------------------

    def hold(self, row: int) -> int:
        """Count a holder of the row's pieces; return the pages that nobody held before."""
        pages = 0
        self._clock += 1
        for piece in self._paths[row]:
            if not self._holders[piece]:
                pages += self._pages(piece)
                if self._computed[piece]:
                    self._kept.remove(piece)
                    self.kept_pages -= self._pages(piece)
            self._holders[piece] += 1
            self._used[piece] = self._clock
        return pages

    def release(self, row: int) -> int:
        """Drop a holder of the row's pieces; return the pages that nobody holds any more."""
        pages = 0
        for piece in self._paths[row]:
            self._holders[piece] -= 1
            if self._holders[piece]:
                continue
            pages += self._pages(piece)
            if self._computed[piece] and self._waiting[piece]:
                self._kept.add(piece)
                self.kept_pages += self._pages(piece)
            else:
                self._computed[piece] = False
        return pages

    def compute(self, row: int, tokens: int) -> None:
        """Count the row's pieces within its first ``tokens`` tokens as computed."""
        for piece in self._paths[row]:
            if self._ends[piece] * self._page_tokens <= tokens:
                self._computed[piece] = True

    # -- who waits ------------------------------------------------------------------------------------

    def wait(self, rows: Iterable[int]) -> None:
        """Count rows that wait for admission."""
        for row in rows:
            for piece in self._paths[row]:
                self._waiting[piece] += 1

    def leave_queue(self, row: int) -> None:
        """Count a row that is admitted; it holds its pieces from now on."""
        for piece in self._paths[row]:
            self._waiting[piece] -= 1

    def evict(self, pages: int) -> int:
        """Free at least ``pages`` kept pages, as far as there are; return the tokens to be computed again."""
        freed = 0
        while self._kept and freed < pages:
            ends = self._kept - {self._parents[piece] for piece in self._kept}
            piece = min(ends, key=lambda piece: (self._waiting[piece], self._used[piece], piece))
            self._kept.remove(piece)
            self._computed[piece] = False
            freed += self._pages(piece)
        self.kept_pages -= freed
        return freed * self._page_tokens

    def order(self) -> list[int]:
        """Return all rows in order of arrival, except that those that begin alike follow the first of them."""
        first: dict[int, int] = {}
        first_of_group: dict[int, int] = {}
        for row, (path, group) in enumerate(zip(self._paths, self._groups, strict=True)):
            first_of_group.setdefault(group, row)
            for piece in path:
                first.setdefault(piece, row)
        keys = [
            [*(first[piece] for piece in path), first_of_group[group]]
            for path, group in zip(self._paths, self._groups, strict=True)
        ]
        return sorted(range(len(keys)), key=lambda row: (keys[row], row))

    # -- what policies see ----------------------------------------------------------------------------

    def waiting_tokens(self, rows: Sequence[int]) -> IntArray:
        """[rows] Return the leading tokens of waiting rows that a live row or a row before them holds."""
        seen: set[int] = set()
        tokens = np.zeros(len(rows), np.int64)
        for i, row in enumerate(rows):
            path = self._paths[row]
            held = [self._ends[piece] for piece in path if self._holders[piece] or piece in seen]
            tokens[i] = self._page_tokens * max(held, default=0)
            seen.update(path)
        return tokens

    def shared(self, rows: Iterable[int], groups: Iterable[int], group_pages: Iterable[int]) -> SharedPages:
        """Return the pages that several live rows hold.

        Args:
            rows: [live rows] indices in the workload.
            groups: [live rows] equal for rows that share their whole prompt.
            group_pages: [live rows] pages that each row shares with its group, those of its pieces not included.
        """
        pages: dict[tuple[str, int], int] = {}
        holders: dict[tuple[str, int], list[int]] = {}
        for index, (row, group, others) in enumerate(zip(rows, groups, group_pages, strict=True)):
            for piece in self._paths[row]:
                pages["piece", piece] = self._pages(piece)
                holders.setdefault(("piece", piece), []).append(index)
            if others:
                pages["group", group] = others
                holders.setdefault(("group", group), []).append(index)
        several = [key for key, held_by in holders.items() if len(held_by) > 1]
        return SharedPages(
            tokens=self._page_tokens * np.array([pages[key] for key in several], np.int64),
            rows=np.array([row for key in several for row in holders[key]], np.int64),
            starts=np.cumsum([0, *(len(holders[key]) for key in several)])[:-1].astype(np.int64),
        )
