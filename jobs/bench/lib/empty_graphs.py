"""A runner of CUDA graphs that hold no launch, to measure what the host does for each step."""

from __future__ import annotations

from collections.abc import Callable

import torch

from rollout.models.attention.triton import TritonBackend
from rollout.models.forward_batch import ForwardBatch
from rollout.models.kv_cache.page_pool import PagePool
from rollout.models.module.inspect import vocabulary_size
from rollout.models.runners.base import Runner
from rollout.models.runners.cuda_graphs import CudaGraphRunner
from rollout.models.runners.packed import PackedStrategy

_MOST_ROWS = 1024


class _EmptyGraph:
    """Replays nothing.

    Args:
        output: what each replay is taken to compute.
    """

    def __init__(self, output: torch.Tensor) -> None:
        self.output = output

    def replay(self) -> None:
        """See `Graph.replay`."""

    def reset(self) -> None:
        """See `Graph.reset`."""


class EmptyGraphs:
    """Implements `rollout.models.runners.graph_capture.Graphs`, without computing.

    Args:
        logits: [rows, V] what the largest step returns.
    """

    bytes_kept = 0

    def __init__(self, logits: torch.Tensor) -> None:
        self._logits = logits
        self.captures = 0

    def warm_up(self, step: Callable[[], object]) -> None:
        """See `Graphs.warm_up`; the step is not run."""

    def capture(self, step: Callable[[], torch.Tensor]) -> _EmptyGraph:  # noqa: ARG002 - it is not run
        """See `Graphs.capture`."""
        self.captures += 1
        return _EmptyGraph(self._logits)

    def release(self) -> None:
        """See `Graphs.release`."""


class _EmptyRunner(Runner):
    """Returns zeros for logits."""

    attention = "none"

    def __init__(self, logits: torch.Tensor) -> None:
        self._logits = logits

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """See `Runner.forward`."""
        return self._logits.expand(int(batch.wanted_lens.sum()), -1).clone()


def runner_of_empty_graphs(strategy: PackedStrategy, pool: PagePool) -> CudaGraphRunner:
    """Return what `PackedStrategy.runner` returns on a GPU, with forwards and graphs that compute nothing."""
    logits = torch.zeros(1, vocabulary_size(strategy.model))
    return CudaGraphRunner(
        eager=_EmptyRunner(logits),
        model=strategy.model,
        backend=TritonBackend(pool),
        borrowed=strategy._borrowed,
        graphs=EmptyGraphs(logits.expand(_MOST_ROWS, -1).clone()),
    )
