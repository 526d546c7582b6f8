"""The prefix cache: the longest prefix of any kept sequence, and pages that are counted, moved and evicted in order."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from rollout.models.arrays import IntArray, ceil_div
from rollout.models.kv_cache.layout import AttentionLayer, KVLayout, MaskKind
from rollout.models.kv_cache.page_pool import PagePool
from rollout.models.kv_cache.prefix_cache import CachedPrefix, PrefixCache

PAGE = 4
LAYOUT = KVLayout((AttentionLayer(nn.Identity(), 1, 1, 1, MaskKind()),), torch.float32, PAGE)


class World:
    """A pool whose pages hold the tokens themselves."""

    def __init__(self, layout: KVLayout = LAYOUT, slabs: int = 40) -> None:
        self.pool = PagePool(layout, slab_pages=4, device=torch.device("cpu"))
        for _ in range(slabs):
            self.pool.grow()
        self.cache = PrefixCache(self.pool)
        self.held: list[IntArray] = []
        """Pages of rows that live."""

    def keep(self, tokens: list[int]) -> None:
        """Compute a sequence on pages of its own, and leave it in the cache."""
        pages = self.pool.allocate(ceil_div(len(tokens), PAGE))
        for position, token in enumerate(tokens):
            slab, page = divmod(int(pages[position // PAGE]), self.pool.slab_pages)
            self.pool.slab(slab).keys[0][page, position % PAGE] = token
        self.cache.insert(np.array(tokens), pages)
        self.pool.release(pages)
        self.check()

    def take(self, tokens: list[int]) -> CachedPrefix:
        """Match a sequence, and check that the pages hold its beginning."""
        found = self.cache.match(np.array(tokens))
        pages = np.concatenate([found.full, found.partial])
        assert self.read(pages)[: found.tokens] == tokens[: found.tokens]
        assert len(found.full) == found.tokens // PAGE
        assert len(found.partial) == bool(found.tokens % PAGE)
        self.held += [found.full, found.partial]
        self.check()
        return found

    def matched(self, tokens: list[int]) -> int:
        found = self.take(tokens)
        self.pool.release(self.held.pop())
        self.pool.release(self.held.pop())
        return found.tokens

    def read(self, pages: IntArray) -> list[int]:
        slabs = [divmod(page, self.pool.slab_pages) for page in pages.tolist()]
        return [int(token) for slab, page in slabs for token in self.pool.slab(slab).keys[0][page].flatten()]

    def check(self) -> None:
        self.cache.check_integrity()
        self.pool.check_integrity([self.cache.pages, *self.held])


def text(*parts: int) -> list[int]:
    """Tokens that count up from each of ``parts``, five of each."""
    return [100 * part + i for part in parts for i in range(5)]


def common(one: list[int], other: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


# -- matching --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9])
def test_a_sequence_matches_up_to_its_last_token_but_one(length: int) -> None:
    world = World()
    world.keep(list(range(length)))
    assert world.matched(list(range(length))) == length - 1
    assert world.matched([*range(length), 77]) == length
    assert world.matched([*range(length), 77, 78, 79, 80, 81]) == length


def test_the_longest_of_several_beginnings_is_found() -> None:
    world = World()
    for kept in (text(1, 2, 3), text(1, 2, 4), text(1, 5), text(6)):
        world.keep(kept)
    assert world.matched([*text(1, 2, 4)[:13], 7, 7]) == 13
    assert world.matched([*text(1, 5)[:8], 7]) == 8
    assert world.matched([7, 7, 7]) == 0
    assert World().matched([7]) == 0


def test_equal_pages_are_kept_once_and_a_continued_end_is_replaced() -> None:
    world = World()
    world.keep(list(range(10)))
    world.keep(list(range(10)))
    world.keep(list(range(9)))
    assert len(world.cache) == world.pool.used_pages == 3
    world.keep(list(range(11)))  # the last page of three tokens takes the place of that of two
    assert len(world.cache) == world.pool.used_pages == 3
    world.keep([*range(9), 50, 51])
    assert len(world.cache) == world.pool.used_pages == 4
    assert world.matched([*range(11), 12]) == 11
    assert world.matched([*range(9), 50, 51, 12]) == 11


def test_random_sequences_match_as_far_as_any_kept_one() -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    rng, world, kept = random.Random(seed), World(slabs=200), [[0]]
    for _ in range(120):
        base = rng.choice(kept)
        tokens = base[: rng.randint(0, len(base))] + [rng.randrange(3) for _ in range(rng.randint(1, 9))]
        assert world.matched(tokens) == max([common(tokens[:-1], other) for other in kept[1:]], default=0)
        world.keep(tokens)
        kept.append(tokens)


def test_sequences_on_two_sides_of_the_longrope_boundary_share_nothing() -> None:
    world = World(replace(LAYOUT, boundary=8))
    world.keep(list(range(8)))
    assert world.matched(list(range(8))) == 7
    assert world.matched(list(range(9))) == 0
    world.keep(list(range(9)))
    assert world.matched(list(range(10))) == 9
    assert world.matched(list(range(5))) == 4
    assert len(world.cache) == 2 + 3


# -- evicting --------------------------------------------------------------------------------------------


def test_the_least_recently_used_goes_first_and_from_its_end() -> None:
    world = World()
    for kept in (text(1, 2), text(3, 4), text(5)):
        world.keep(kept)
    world.matched(text(1, 2))
    world.cache.evict(2)
    assert (world.matched(text(1, 2)), world.matched(text(3, 4)), world.matched(text(5))) == (9, 4, 4)
    world.check()
    world.cache.evict(10**6)
    assert len(world.cache) == world.pool.used_pages == 0


def test_evicted_pages_are_released_together() -> None:
    world = World()
    world.keep(text(1, 2, 3))
    changes = world.pool.reference_changes
    world.cache.evict(3)
    world.check()
    assert len(world.cache) == 1
    assert world.pool.reference_changes == changes + 1
    world.cache.evict(0)
    assert world.pool.reference_changes == changes + 1


def test_a_page_in_use_is_evicted_only_where_it_stands_in_the_way() -> None:
    world = World()
    world.keep(text(1, 2))
    found = world.take(text(1, 2))
    world.keep(text(3))  # used later, but by no row
    assert world.cache.evictable_pages == 2
    world.cache.evict(1)
    assert world.matched(text(1, 2)) == 9
    world.cache.evict(10**6)
    assert world.cache.evictable_pages == 0
    assert world.read(found.full) == text(1, 2)[:8]
    world.check()


def test_a_page_in_use_makes_way_for_one_before_it_that_nobody_uses() -> None:
    """Two rows computed the same first page, and the one that lives hangs below the page of the other.

    Its own first page is not in the cache.
    """
    world = World()
    world.keep(text(1)[:4])
    pages = world.pool.allocate(2)
    world.held.append(pages)
    world.cache.insert(np.array(text(1, 2)[:8]), pages)
    assert (len(world.cache), world.cache.evictable_pages) == (2, 1)
    world.cache.evict(1)
    assert (len(world.cache), world.pool.used_pages) == (0, 2)
    world.check()


def test_pages_are_found_where_they_moved_to() -> None:
    world = World(slabs=6)
    for kept in (text(1, 2), text(3, 4), text(5)):
        world.keep(kept)
    world.cache.evict(3)
    while world.pool.shrink([world.cache.pages]):
        world.check()
    assert world.pool.live_slabs == 2
    assert sum(world.matched(text(*parts)) for parts in ((1, 2), (3, 4), (5,))) == 0 + 9 + 4
    world.cache.clear()
    world.check()
    assert world.matched(text(1)) == 0


def test_the_end_of_a_sequence_stays_while_a_page_that_continues_it_is_being_computed() -> None:
    world = World()
    world.keep([1, 2, 3, 4, 5, 6])
    pages = world.pool.allocate(2)
    world.held.append(pages)
    pending = world.cache.begin(np.array([1, 2, 3, 4, 5, 6, 7, 8]), pages, 8)
    assert world.matched([1, 2, 3, 4, 5, 6, 9]) == 6
    world.keep([1, 2, 3, 4, 5, 6, 7])
    assert world.matched([1, 2, 3, 4, 5, 6, 7, 9]) == 7
    kept = len(world.cache)
    pending.computed(8)
    world.check()
    assert len(world.cache) == kept - 1, "the full page is copied instead"
