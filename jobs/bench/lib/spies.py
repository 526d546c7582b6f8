"""What the engine does in its steps, watched from outside: graphs that are captured and replayed, and waits."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from rollout.engine.pending_tokens import PendingTokens
from rollout.models.runners.cuda_graphs import CudaGraphRunner
from rollout.models.runners.graph_rungs import Rung


class Spies:
    """Counts forwards by how they ran, and times captures and the host's waits for tokens; see `watched`."""

    def __init__(self) -> None:
        self.captures: list[tuple[Rung, float]] = []
        """Each with its seconds."""
        self.replayed = Counter[bool]()
        """Forwards without and with prefills."""
        self.eager = Counter[bool]()
        self.graph_bytes = 0
        """That graphs shared at most."""
        self.waits: list[float] = []
        """Seconds of each read of a step's tokens."""

    def clear(self) -> None:
        """Forget everything."""
        for found in (self.captures, self.replayed, self.eager, self.waits):
            found.clear()
        self.graph_bytes = 0

    def __str__(self) -> str:
        """Describe forwards and captures."""
        sizes = " ".join(f"{rung.tokens}{f'+{rung.logits}' if rung.mixed else ''}" for rung, _ in self.captures)
        spent = sum(seconds for _, seconds in self.captures)
        kinds = (f"{self.replayed[mixed]} of {self.replayed[mixed] + self.eager[mixed]}" for mixed in (False, True))
        return "replayed {} decodes, {} with prefills".format(*kinds) + (
            f"; {len(self.captures)} captures {spent:.2f} s {self.graph_bytes / 1e6:.0f} MB ({sizes})"
            if self.captures
            else ""
        )


@contextmanager
def watched() -> Iterator[Spies]:
    """Watch all engines of the process inside the block."""
    spies, served = Spies(), False
    runner: Any = CudaGraphRunner
    capture, captured_step, forward = runner._capture, runner._captured_step, runner.forward
    read = PendingTokens.read

    def timed_capture(graphs: Any, rung: Rung, *rest: Any) -> Any:
        began = time.perf_counter()
        captured = capture(graphs, rung, *rest)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        spies.captures.append((rung, time.perf_counter() - began))
        spies.graph_bytes = max(spies.graph_bytes, graphs.bytes_kept)
        return captured

    def noted_step(*args: Any) -> Any:
        nonlocal served
        captured = captured_step(*args)
        served = captured is not None
        return captured

    def counted_forward(graphs: Any, batch: Any) -> Any:
        nonlocal served
        served = False
        logits = forward(graphs, batch)
        (spies.replayed if served else spies.eager)[len(batch.tokens) > len(batch.query_lens)] += 1
        return logits

    def timed_read(pending: PendingTokens) -> Any:
        began = time.perf_counter()
        tokens = read(pending)
        spies.waits.append(time.perf_counter() - began)
        return tokens

    with (
        mock.patch.object(runner, "_capture", timed_capture),
        mock.patch.object(runner, "_captured_step", noted_step),
        mock.patch.object(runner, "forward", counted_forward),
        mock.patch.object(PendingTokens, "read", timed_read),
    ):
        yield spies
