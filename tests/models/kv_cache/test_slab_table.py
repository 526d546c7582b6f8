"""The table of slab addresses follows its pool."""

from __future__ import annotations

import numpy as np
import torch

from rollout.models.kv_cache.layout import AttentionLayer, KVLayout, MaskKind
from rollout.models.kv_cache.page_pool import PagePool
from rollout.models.kv_cache.slab_table import SlabTable


def test_table_follows_slabs_that_come_and_go() -> None:
    pool = PagePool(KVLayout((AttentionLayer(None, 1, 4, 4, MaskKind()),), torch.float32, 4), 2, torch.device("cpu"))
    table = SlabTable(pool, 4)

    def check() -> None:
        table.refresh()
        addresses = [0 if slab is None else slab.keys[0].data_ptr() for slab in pool.slabs]
        assert table.addresses.tolist() == addresses + [0] * (4 - len(addresses))
        assert table.live.tolist() == [address > 0 for address in addresses]

    check()
    for _ in range(3):
        pool.grow()
        check()
    pages = pool.allocate(5)
    pool.release(pages[:2])
    assert pool.shrink([pages[2:]])
    assert pool.slabs[0] is None
    check()
    pool.grow()
    check()
    while pool.shrink([np.zeros(0, np.int64)]):
        check()
    pool.check_integrity([pages[2:]])
