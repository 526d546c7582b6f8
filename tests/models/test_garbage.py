"""Blocks in which Python's garbage collector does not run."""

from __future__ import annotations

import gc
from contextlib import ExitStack

import pytest

from rollout.models.garbage import without_collections


@pytest.mark.parametrize("first_ends_first", [True, False])
def test_collections_stay_off_until_the_last_of_overlapping_blocks_ends(first_ends_first: bool) -> None:
    """As where two threads capture graphs."""
    assert gc.isenabled()
    first, second = ExitStack(), ExitStack()
    for block in (first, second):
        block.enter_context(without_collections())
    for block in (first, second) if first_ends_first else (second, first):
        assert not gc.isenabled()
        block.close()
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with without_collections():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
