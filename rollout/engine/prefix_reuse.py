"""Which pages a row can share: those that others have computed, or are computing, for what its context begins with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rollout.batcher.types import IntArray
from rollout.engine.batch_row import BatchRow, Group, Prefill
from rollout.engine.kv_memory import KVMemory
from rollout.engine.waiting_queue import WaitingQueue
from rollout.models.kv_cache.prefix_cache import NO_PREFIX, CachedPrefix
from rollout.stats import Tally

_NO_PAGES: IntArray = np.zeros(0, np.int64)


class PartialCopy(NamedTuple):
    """A page to copy because its first tokens are those of another sequence."""

    source: int
    target: int
    tokens: int
    prefill: Prefill
    """Counts these tokens as computed."""


class PrefixReuse:
    """Finds the pages that a row can share when it is admitted, and offers those of prefills to others.

    The pages of a prompt stand in the cache from the time that its prefill begins. Rows that begin alike wait until
    they are computed. The cache keeps them after the row has ended, as long as memory allows.

    In a model with recurrent states, whose state after a prefix is not kept, nothing is shared.

    Args:
        kv: the page pool and the cache.
        queue: rows that wait. The cache knows their prompts until `close`.
        tally: counters to update.
    """

    def __init__(self, kv: KVMemory, queue: WaitingQueue, tally: Tally) -> None:
        self._pool = kv.pool
        self._cache = kv.cache
        self._queue = queue
        self._tally = tally
        self._keeps_rows = kv.keeps_rows
        self._shares = not kv.pool.layout.states
        self._page_size = kv.pool.layout.page_size
        self._decodes_apart = kv.pool.layout.decodes_apart
        self._copies: list[PartialCopy] = []
        if self._shares:
            queue.watch(self)

    # -- rows that wait --------------------------------------------------------------------------------

    def waits(self, group: Group) -> None:
        """Count a prompt that rows wait with."""
        group.waiter = self._cache.waiting.add(group.prompt_ids)

    def waits_no_more(self, group: Group) -> None:
        """Forget a prompt that no row waits with any more."""
        if group.waiter is not None:
            self._cache.waiting.remove(group.waiter)
            group.waiter = None

    @property
    def page_tokens(self) -> int:
        """Tokens per page."""
        return self._page_size

    @property
    def changes(self) -> int:
        """Counts up whenever pages in use gain or lose references."""
        return self._pool.reference_changes

    def held_tokens(self, groups: Sequence[Group]) -> IntArray:
        """Return [groups] the leading tokens of prompts that rows wait with, in full pages, which live rows hold."""
        waiters = [group.waiter for group in groups]
        return self._page_size * np.array(
            [0 if w is None else self._cache.waiting.used_depth(w) for w in waiters], np.int64
        )

    @staticmethod
    def is_blocked(row: BatchRow) -> bool:
        """Return whether another prefill is computing what the row begins with."""
        waiter = row.group.waiter
        return waiter is not None and waiter.is_blocked

    def close(self) -> None:
        """Forget the prompts of all rows that wait."""
        if self._shares:
            self._queue.watch(None)
            self._cache.waiting.clear()

    # -- rows that begin -------------------------------------------------------------------------------

    def take(self, context: IntArray, prompt: int) -> CachedPrefix:
        """Take references to the longest beginning of ``context`` in memory; its last token's logits are needed.

        Args:
            context: of a row.
            prompt: how many of its tokens are the prompt's.
        """
        if not self._shares:
            return NO_PREFIX
        return self._cache.match(context[: prompt + 1] if self._decodes_apart else context, len(context))

    def drop(self, prefix: CachedPrefix) -> None:
        """Give the references back."""
        self._pool.release(prefix.full)
        self._pool.release(prefix.partial)

    def begin(self, row: BatchRow, prefix: CachedPrefix, own: IntArray, state: IntArray) -> Prefill:
        """Return the prefill of a row that continues ``prefix`` in its ``own`` pages; see `copy_partial_pages`.

        Args:
            state: page of its recurrent state, if the model has any.
        """
        context, prompt = row.context, row.group.prompt_ids
        full = len(prefix.full) * self._page_size
        pages = np.concatenate([prefix.full, own])
        self._tally.reused_tokens += prefix.tokens
        self._tally.prefix_hits += prefix.tokens > 0
        self._tally.pages_saved += len(prefix.full)
        prefill = Prefill(
            group=row.group,
            context=context,
            pages=pages,
            states=state,
            computed=prefix.tokens,
            rows=[row],
            taken_pages=len(prefix.full),
            offered=self._cache.begin(prompt, pages, len(context)) if self._shares else None,
        )
        self._copies.extend(
            PartialCopy(source, target, prefix.tokens - full, prefill)
            for source, target in zip(prefix.partial.tolist(), own.tolist(), strict=False)
        )
        return prefill

    def copy_partial_pages(self) -> None:
        """Copy the cached pages that rows share in part; due before a forward, and before pages move.

        If that fails for lack of memory, the rows compute these tokens themselves.
        """
        copies, self._copies = self._copies, []
        try:
            for tokens in sorted({copy.tokens for copy in copies}):
                pairs = [(copy.source, copy.target) for copy in copies if copy.tokens == tokens]
                source, target = np.array(pairs, np.int64).T
                # No more than these tokens: those after them are unchecked, and a number that is not finite spoils a
                # row even where it is masked.
                self._pool.copy(source, target, tokens)
        except BaseException:
            for copy in copies:
                copy.prefill.computed -= copy.tokens
                self._tally.reused_tokens -= copy.tokens
            raise
        finally:
            for copy in copies:  # one by one: several rows may share a page
                self._pool.release(np.array([copy.source], np.int64))

    def offer(self, prefill: Prefill) -> None:
        """Offer the last page of a prompt that has been computed, as far as the prompt fills it."""
        prompt = prefill.group.prompt_ids
        pays = len(prompt) % self._page_size >= self._cache.worthwhile_tokens
        if self._shares and pays and len(prompt) == len(prefill.context):
            self._cache.insert(prompt, prefill.pages)

    # -- rows that end ---------------------------------------------------------------------------------

    def keep(self, group: Group, generated: IntArray, pages: IntArray) -> None:
        """Leave the pages of a row that ends in the cache, if this call keeps them; else only the prompt's stay.

        Args:
            group: of the row.
            generated: [tokens] of its completion; the last one has not been computed.
            pages: of the row.
        """
        if self._keeps_rows and not self._decodes_apart:
            self._cache.insert(np.concatenate([group.prompt_ids, generated])[:-1], pages)

    def discard(self, group: Group) -> None:
        """Take the pages of a prompt out of the cache that only a row uses which leaves numbers that are not finite."""
        if self._shares:
            self._cache.discard(group.prompt_ids)
