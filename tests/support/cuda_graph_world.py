"""A stand-in for CUDA graphs on a CPU: replaying a capture computes its step again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from rollout.models.arrays import IntArray
from rollout.models.attention.triton import TritonBackend
from rollout.models.forward_batch import ForwardBatch
from rollout.models.kv_cache.page_pool import PagePool
from rollout.models.runners.cuda_graphs import CudaGraphRunner
from rollout.models.runners.graph_capture import Graphs
from rollout.models.runners.graph_rungs import Rung
from rollout.models.runners.packed import PackedRunner, PackedStrategy
from tests.support.devices import DEVICE
from tests.support.tiny_models import VOCABULARY, tiny


@dataclass
class FakeGraph:
    step: Callable[[], torch.Tensor]
    sharing: list[FakeGraph]
    """The graphs that share memory for outputs."""
    computed: torch.Tensor | None = None
    replays: int = 0
    gone: bool = False

    @property
    def output(self) -> torch.Tensor:
        assert self.computed is not None
        return self.computed

    def replay(self) -> None:
        assert not self.gone
        self.replays += 1
        for graph in self.sharing:
            if graph.computed is not None:
                graph.computed.fill_(torch.nan)
        self.computed = self.step()

    def reset(self) -> None:
        assert not self.gone
        self.gone = True


@dataclass
class FakeGraphs:
    """Fake graphs; the first capture raises ``failure``, if there is one, while it handles ``first_failure``."""

    failure: Exception | None = None
    first_failure: Exception | None = None
    graphs: list[FakeGraph] = field(default_factory=list)
    tried: int = 0
    released: int = 0

    @property
    def bytes_kept(self) -> int:
        return 1000 * sum(not graph.gone for graph in self.graphs)

    def warm_up(self, step: Callable[[], object]) -> None:
        self.tried += 1
        step()

    def capture(self, step: Callable[[], torch.Tensor]) -> FakeGraph:
        failure, self.failure = self.failure, None
        if failure is not None:
            _raise_in_turn(self.first_failure, failure)
        self.graphs.append(FakeGraph(step, self.graphs))
        return self.graphs[-1]

    def release(self) -> None:
        assert all(graph.gone for graph in self.graphs)
        self.released += 1


def _raise_in_turn(first: Exception | None, second: Exception) -> None:
    """Raise ``second`` as torch does where ending a failed capture fails as well."""
    if first is None:
        raise second
    try:
        raise first
    except RuntimeError:
        raise second  # noqa: B904


def llama(layers: int = 2, **changes: Any) -> PreTrainedModel:
    return tiny("llama", num_hidden_layers=layers, **changes)


class World:
    """Sequences on two pools: the graph runner computes in one what the plain runner computes in the other."""

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        texts: int = 6,
        slab_pages: int = 4,
        graphs: Graphs | None = None,
    ) -> None:
        self.model = llama(1) if model is None else model
        self.strategy = PackedStrategy(self.model)
        self.layout = self.strategy.kv_layout()
        self.fake = FakeGraphs()
        self.borrowed = self.strategy._borrowed
        self.pools = [PagePool(self.layout, slab_pages, DEVICE) for _ in range(2)]
        steps = [TritonBackend(pool) for pool in self.pools]
        self.plain, eager = (PackedRunner(self.model, pool, s) for pool, s in zip(self.pools, steps, strict=True))
        self.runner = CudaGraphRunner(eager, self.model, steps[1], self.borrowed, graphs or self.fake)
        self.tokens = np.random.default_rng(3).integers(3, VOCABULARY, (texts, 200))
        self.tables: list[list[IntArray]] = [[np.zeros(0, np.int64)] * texts for _ in range(2)]
        self.lengths = [0] * texts

    def forward(self, parts: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute further tokens of some sequences; return the logits of the eager runner and of the one under test.

        torch's matrix products depend on the batch size, so if one token of each is computed, the eager runner repeats
        the first row as padding.
        """
        logits = []
        for which, runner in enumerate((self.plain, self.runner)):
            batch = self._packed(which, parts)
            if not which and all(count == 1 for _, count in parts):
                batch = self._packed(which, [*parts, *parts[:1] * (Rung.of(batch).tokens - len(parts))])
            with self.strategy.borrow():
                logits.append(runner.forward(batch)[: len(parts)])
        for text, count in parts:
            self.lengths[text] += count
        return logits[0], logits[1]

    def same(self, parts: list[tuple[int, int]]) -> None:
        """Compare: bit by bit if rows decode in a graph of their own size, else up to rounding."""
        expected, found = self.forward(parts)
        assert expected.shape == found.shape
        if all(count == 1 for _, count in parts) and self.rung(parts) in self.rungs:
            assert torch.equal(expected, found)
        else:
            tolerance = 2e-2 if found.dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)

    def rung(self, parts: list[tuple[int, int]]) -> Rung:
        return Rung.of(self._packed(1, [(text, 1) for text, _ in parts]))

    def decode(self, *texts: int) -> None:
        self.same([(text, 1) for text in texts])

    def _packed(self, which: int, parts: list[tuple[int, int]]) -> ForwardBatch:
        pool, tables = self.pools[which], self.tables[which]
        for text, count in parts:
            lacking = self.layout.pages_for(self.lengths[text] + count) - len(tables[text])
            while pool.free_pages < lacking:
                pool.grow()
            tables[text] = np.concatenate([tables[text], pool.allocate(lacking)])
        packed = np.full((len(parts), max(len(tables[text]) for text, _ in parts)), 10**9)
        for row, (text, _) in enumerate(parts):
            packed[row, : len(tables[text])] = tables[text]
        starts = np.array([self.lengths[text] for text, _ in parts])
        new = [self.tokens[text, self.lengths[text] : self.lengths[text] + count] for text, count in parts]
        return ForwardBatch(
            torch.from_numpy(np.concatenate(new)).to(DEVICE), packed, starts, np.array([count for _, count in parts])
        )

    @property
    def rungs(self) -> list[Rung]:
        return list(self.runner._captured)

    @property
    def sizes(self) -> list[int]:
        """Tokens of the captured steps without prefills."""
        return [rung.tokens for rung in self.rungs if not rung.mixed]
