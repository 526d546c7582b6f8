"""The padded strategy: the model's own attention over keys and values gathered from pages."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from rollout.models.arrays import ceil_div
from rollout.models.errors import UnsupportedModel
from rollout.models.forward_batch import ForwardBatch
from rollout.models.kv_cache.page_pool import PagePool
from rollout.models.runners.padded import PaddedRunner, PaddedStrategy
from tests.support.tiny_models import PADDED, VOCABULARY, tiny

_SIZE = 16


class Sequences:
    """Random sequences with pages scattered over a pool of several slabs, computed step by step."""

    def __init__(self, model: PreTrainedModel, ends: list[int], slab_pages: int = 3) -> None:
        rng = np.random.default_rng(5)
        self.model, self.strategy = model, PaddedStrategy(model)
        self.pool = PagePool(self.strategy.kv_layout(), slab_pages, torch.device("cpu"))
        counts = [ceil_div(end, _SIZE) for end in ends]
        while self.pool.live_slabs * slab_pages < sum(counts) + 2:
            self.pool.grow()
        pages = rng.permutation(self.pool.live_slabs * slab_pages)
        self.tables = np.full((len(ends), max(counts)), pages[-1])  # entries past a sequence's end must not be read
        for table, count, first in zip(self.tables, counts, np.cumsum(counts) - counts, strict=True):
            table[:count] = pages[first : first + count]
        self.tokens = [rng.integers(3, VOCABULARY, end) for end in ends]
        self.done = np.zeros(len(ends), np.int64)

    def fill(self, value: float) -> None:
        """Fill all memory of the pool."""
        for slab in self.pool.slabs:
            assert slab is not None
            for memory in (*slab.keys, *slab.values):
                memory.fill_(value)

    def advance(self, numbers: list[int], lengths: list[int]) -> torch.Tensor:
        """Compute the next ``lengths`` tokens of sequences ``numbers``."""
        starts = self.done[numbers]
        self.done[numbers] += lengths
        tokens = [self.tokens[i][start : self.done[i]] for i, start in zip(numbers, starts, strict=True)]
        batch = ForwardBatch(torch.from_numpy(np.concatenate(tokens)), self.tables[numbers], starts, np.array(lengths))
        with self.strategy.borrow():
            return self.strategy.runner(self.pool).forward(batch)

    def own(self, numbers: list[int]) -> torch.Tensor:
        """Return the logits of plain forwards at the last computed token of each sequence."""
        with torch.no_grad():
            return torch.cat(
                [
                    self.model(input_ids=torch.from_numpy(self.tokens[i][: self.done[i]])[None]).logits[:, -1]
                    for i in numbers
                ]
            )


@pytest.mark.parametrize("family", PADDED)
def test_mixed_prefills_chunks_and_decodes_match_plain_forwards(family: str) -> None:
    """Some lengths are batched with padding, others are not, and all slots hold NaN at first."""
    sequences = Sequences(tiny(family), [60, 41, 40, 33, 9, 2])
    sequences.fill(torch.nan)
    for numbers, lengths in (
        ([0, 1, 2, 4], [20, 19, 12, 7]),
        ([3, 0, 1, 4, 2], [31, 20, 13, 1, 12]),
        ([5, 0, 1, 2, 3, 4], [1, 1, 8, 6, 1, 1]),
        ([0, 1, 2, 3, 5], [19, 1, 10, 1, 1]),
    ):
        found = sequences.advance(numbers, lengths)
        torch.testing.assert_close(found, sequences.own(numbers), atol=2e-5, rtol=1e-5)
    assert sequences.done.tolist() == [60, 41, 40, 33, 9, 2]


def test_nan_in_one_sequence_does_not_spread_to_others() -> None:
    sequences = Sequences(tiny("bloom"), [40, 38, 30])
    sequences.advance([0, 1, 2], [39, 37, 29])
    slab, page = divmod(int(sequences.tables[1, 0]), sequences.pool.slab_pages)
    sequences.pool.slab(slab).values[2][page].fill_(torch.nan)
    found = sequences.advance([0, 1, 2], [1, 1, 1])
    assert not found[1].isfinite().any()
    torch.testing.assert_close(found[[0, 2]], sequences.own([0, 2]), atol=2e-5, rtol=1e-5)


def test_keys_are_stored_in_the_dtype_of_autocast() -> None:
    sequences = Sequences(tiny("codegen"), [30, 25])
    with torch.autocast("cpu", torch.bfloat16):
        layout = sequences.strategy.kv_layout()
        assert layout.dtype == torch.bfloat16
        sequences.pool = PagePool(layout, 20, torch.device("cpu"))
        sequences.pool.grow()
        sequences.advance([0, 1], [29, 24])
        found, own = sequences.advance([0, 1], [1, 1]), sequences.own([0, 1])
    assert float((found - own).float().norm() / own.float().norm()) < 0.1


def test_batches_hold_every_sequence_once_with_little_padding() -> None:
    sequences = Sequences(tiny("bloom"), [40])
    runner = PaddedRunner(sequences.model, sequences.pool)
    rng = np.random.default_rng(3)
    starts = rng.integers(0, 900, 300)
    lengths = np.where(rng.random(300) < 0.8, 1, rng.integers(1, 400, 300))
    tokens = torch.zeros(int(lengths.sum()), dtype=torch.int64)
    batch = ForwardBatch(tokens, np.zeros((300, 100), np.int64), starts, lengths)
    batches = list(runner._batches(batch))
    assert sorted(np.concatenate(batches).tolist()) == list(range(300))
    assert len(batches) < 40
    for group in batches:
        ends = batch.seq_lens[group]
        assert ends.min() >= 0.6 * ends.max()
        assert lengths[group].min() >= 0.6 * lengths[group].max()


def test_batches_keep_to_the_limit_on_gathered_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = Sequences(tiny("bloom"), [40])
    token_bytes = sequences.pool.layout.bytes_per_token // len(sequences.pool.layout.layers)
    monkeypatch.setattr("rollout.models.runners.padded._BATCH_BYTES", 100 * token_bytes)
    runner = PaddedRunner(sequences.model, sequences.pool)
    ones = np.ones(10, np.int64)
    batch = ForwardBatch(
        torch.ones(10, dtype=torch.int64), np.zeros((10, 20), np.int64), np.array([29] * 8 + [31, 200]), ones
    )
    assert sorted(len(group) for group in runner._batches(batch)) == [1, 3, 3, 3]


def test_layout_has_shapes_and_leaves_masks_to_the_model() -> None:
    layout = PaddedStrategy(tiny("falcon", multi_query=True, new_decoder_architecture=False)).kv_layout()
    assert [(layer.module, layer.kv_heads, layer.key_dim) for layer in layout.layers] == [(None, 1, 16)] * 4
    assert {layer.mask_kind.kind for layer in PaddedStrategy(tiny("gpt_neo")).kv_layout().layers} == {"full"}


class Altered:
    """Hooks that change how a bloom layer uses its cache."""

    def __init__(self, model: PreTrainedModel, change: str, layers: slice = slice(1, 2)) -> None:
        self.change = change
        for layer in model.transformer.h[layers]:
            layer.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, _module: object, inputs: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        cache = keywords["layer_past"]
        states = torch.zeros(1, 4, inputs[0].shape[1], 16)
        if self.change == "stores more":
            cache.update(states, states, 1)
        elif self.change == "stores three dimensions":
            cache.update(states[0], states[0], 1)
        elif self.change == "values of another dtype":
            cache.update(states, states.double(), 1)
        elif self.change == "no cache":
            keywords["layer_past"] = None
        return inputs, keywords


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("stores three dimensions", r"'bloom'\) stores keys and values of unknown shape: \(4, \d+, 16\)\."),
        ("values of another dtype", "values of several dtypes"),
    ],
)
def test_states_that_pages_cannot_hold_are_refused(change: str, reason: str) -> None:
    model = tiny("bloom")
    Altered(model, change)
    with pytest.raises(UnsupportedModel, match=reason):
        PaddedStrategy(model).kv_layout()


def test_model_that_stores_nothing_is_refused() -> None:
    model = tiny("bloom")
    Altered(model, "no cache", slice(None))
    with pytest.raises(UnsupportedModel, match="stores no keys and values"):
        PaddedStrategy(model).kv_layout()


@pytest.mark.parametrize(
    ("change", "message"), [("stores more", "more often than the 4 times"), ("no cache", "3 times, not 4")]
)
def test_forward_with_other_calls_than_the_probe_raises(change: str, message: str) -> None:
    sequences = Sequences(tiny("bloom"), [20])
    Altered(sequences.model, change)
    with pytest.raises(RuntimeError, match=message):
        sequences.advance([0], [9])


def test_recurrent_models_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="recurrent state"):
        PaddedStrategy(tiny("mamba"))
