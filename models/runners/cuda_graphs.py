"""Decode steps as CUDA graphs: a step of some hundreds of launches is captured once, and from then on is one launch.

A graph is of a fixed number of rows, so there is one for each rung of a ladder, captured when it is first needed, and
the rows of a step are padded to the next rung. Padding writes nowhere and reads nothing (`TritonMetadata`). All that
varies from step to step is read from memory that stays in its place: token and position ids, the plan of the step, and
the table of slabs, so the pool may grow and shrink between replays.

Forwards with prompts in them run as ever; so do models whose forward a graph cannot hold, see `with_cuda_graphs`.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from rollout.models.arrays import upload
from rollout.models.attention import interface
from rollout.models.attention.base import AttentionBackend
from rollout.models.attention.multi_device import MultiDeviceBackend
from rollout.models.attention.triton import TritonAttention, TritonBackend
from rollout.models.attention.triton_metadata import MetadataSizes, TritonMetadata
from rollout.models.device import is_out_of_memory
from rollout.models.forward_batch import ForwardBatch
from rollout.models.module.borrow import BorrowedModule
from rollout.models.module.inspect import family_name
from rollout.models.module.rope import Rotary
from rollout.models.module.tensor_parallel import tensor_parallel_group
from rollout.models.runners.base import Runner
from rollout.models.runners.graph_capture import CudaGraphs, Graph, Graphs

logger = logging.getLogger(__name__)

LEAST_PAGES = 64
"""Pages a row that a graph has room for at first, if not more. Room for a page takes 20 bytes, and partial results."""
_PAUSE = 256
"""Steps without graphs after memory was short."""

#: Models that go on without graphs, and why.
_refused: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def padded_batch_size(rows: int) -> int:
    """Rows of the graph that serves so many: powers of two up to 8, multiples of 8 up to 64, then four a doubling.

    Each is captured anew in every call, and while a batch runs empty each may serve no more than a few steps. Padding
    costs less: it attends to nothing, and of more than 64 rows it is less than a fifth.
    """
    power = _power(rows)
    step = power if power <= 8 else max(8, power // 8)
    return -(-rows // step) * step


def with_cuda_graphs(eager: Runner, model: nn.Module, steps: AttentionBackend, borrowed: BorrowedModule) -> Runner:
    """A runner that captures decode steps; ``eager`` itself where that cannot be, and the log says why, once a model.

    Not captured are models whose rotary embeddings depend on the text's length, dynamic scaling or longrope: they
    look positions or lengths up on the host to choose among frequencies, and a graph would replay one choice for ever.
    Nor models on several devices: a graph is of one. Nor those that several processes hold together: each could find on
    its own that a step cannot be captured, while the others wait in it.

    Args:
        eager: serves all other forwards.
        model: what it runs.
        steps: of the pool, and the attention that ``eager`` uses: Triton's, on one device or on each of several.
        borrowed: on which the model is while it runs.
    """
    if model not in _refused:
        devices = {tensor.device for tensors in (model.parameters(), model.buffers()) for tensor in tensors}
        if Rotary(model).depends_on_length:
            _refuse(model, "its rotary embeddings depend on the length of a text")
        elif len(devices) > 1 or isinstance(steps, MultiDeviceBackend):
            _refuse(model, "it lies on several devices")
        elif tensor_parallel_group(model) is not None:
            _refuse(model, "several processes hold it together")
    if model in _refused:
        return eager
    assert isinstance(steps, TritonBackend)
    return CudaGraphRunner(eager, model, steps, borrowed, CudaGraphs(steps.slabs.pool.device))


def _refuse(model: nn.Module, reason: str) -> None:
    _refused[model] = reason
    logger.warning("Decode steps of %s are not captured in CUDA graphs: %s.", family_name(model), reason.rstrip("."))


class CudaGraphRunner(Runner):
    """Replays a graph for a forward in which all rows decode; all others, and all under autocast, are ``eager``'s.

    Under autocast torch keeps cast weights in memory that goes when autocast ends, which a graph would go on reading.

    A graph has room for so many pages of all rows together: twice those that they hold when it is captured, or
    `LEAST_PAGES` each, rounded up to a power of two. Rows that outgrow it are captured anew, so at most once each time
    that what they hold has doubled: four times between 512 and 8,192 tokens a row.

    Weights may change in place between forwards. Those that lie elsewhere after the model was its owner's are captured
    anew; modules that its owner replaces while a call of the engine runs are not noticed.

    Args:
        eager, model, steps, borrowed: see `with_cuda_graphs`.
        graphs: how steps are captured.
    """

    def __init__(
        self, eager: Runner, model: nn.Module, steps: TritonBackend, borrowed: BorrowedModule, graphs: Graphs
    ) -> None:
        self._eager, self._model, self._steps, self._borrowed, self._graphs = eager, model, steps, borrowed, graphs
        self.attention = eager.attention
        self._pool = steps.slabs.pool
        self._captured: dict[int, _Captured] = {}
        self._logits: dict[int, torch.Tensor] = {}
        self._weights: _Weights | None = None
        self._times_borrowed = borrowed.times_borrowed
        self._paused = 0
        self._count, self._seconds = 0, 0.0

    @property
    def bytes_kept(self) -> int:
        """See `Runner.bytes_kept`."""
        return self._graphs.bytes_kept

    def forward(self, packed: ForwardBatch) -> torch.Tensor:
        """See `Runner.forward`. Where a graph serves, the next call overwrites the logits that this one returns."""
        if not self._serves(packed):
            return self._eager.forward(packed)
        self._follow_weights()
        try:
            captured = self._filled(packed)
        except RuntimeError as error:
            # Eagerly everything that a failed attempt may have written is written again.
            self._give_up(_cause(error))
            return self._eager.forward(packed)
        captured.graph.replay()
        return captured.logits[: len(packed.query_lens)]

    def shed(self) -> bool:
        """See `Runner.shed`."""
        if not self._captured:
            return False
        self._drop()
        self._paused = _PAUSE
        logger.info("Memory is short: %d decode steps go on without CUDA graphs, which are given back.", _PAUSE)
        return True

    def close(self) -> None:
        """See `Runner.close`."""
        if self._count:
            logger.info(
                "%d decode step(s) were captured in CUDA graphs, in %.1f s; they shared %.1f MB.",
                self._count,
                self._seconds,
                self._graphs.bytes_kept / 1e6,
            )
        self._drop()

    def _serves(self, packed: ForwardBatch) -> bool:
        if self._model in _refused or not len(packed.query_lens) or (packed.query_lens != 1).any():
            return False
        if torch.is_autocast_enabled(self._pool.device.type):
            return False
        self._paused = max(0, self._paused - 1)
        return not self._paused

    def _follow_weights(self) -> None:
        """What its owner did to the model can only be since it was last lent."""
        if self._borrowed.times_borrowed != self._times_borrowed:
            self._times_borrowed = self._borrowed.times_borrowed
            if self._weights is not None and self._weights.moved:
                logger.info("The model's weights lie elsewhere now: decode steps are captured anew.")
                self._drop()

    def _filled(self, packed: ForwardBatch) -> _Captured:
        """The step that serves a forward, with that forward in its memory."""
        size, needs = padded_batch_size(len(packed.query_lens)), MetadataSizes.of(packed, self._pool.layout.page_size)
        captured = self._captured.get(size)
        if captured is not None and captured.inputs.buffers.room.holds(needs):
            captured.inputs.fill(packed)
            return captured
        self._forget(size)
        captured = self._captured[size] = self._capture(size, needs.entries, packed)
        return captured

    def _capture(self, size: int, entries: int, packed: ForwardBatch) -> _Captured:
        started = time.perf_counter()
        room = MetadataSizes(size, 0, size, _power(max(2 * entries, LEAST_PAGES * size)))
        inputs = _Inputs(self._steps.make_metadata(room))
        inputs.fill(packed)

        def step() -> torch.Tensor:
            with interface.use_attention(TritonAttention(self._pool, packed, inputs.buffers)):
                output = self._model(
                    input_ids=inputs.tokens, position_ids=inputs.positions, use_cache=False, logits_to_keep=0
                )
            found: torch.Tensor = output.logits[0]
            return found

        logits = self._memory_for(self._graphs.warm_up(step))
        graph = self._graphs.capture(lambda: logits.copy_(step()))
        self._weights = self._weights or _Weights(self._model)
        self._count += 1
        self._seconds += time.perf_counter() - started
        logger.debug("A decode step of %d rows was captured, with room for %d pages.", size, room.entries)
        return _Captured(inputs, graph, logits)

    def _memory_for(self, logits: torch.Tensor) -> torch.Tensor:
        """[rows, V] like ``logits``: one memory for all rungs up to a power of two, since one is in use at a time.

        Logits of each rung's own would add up to gigabytes for large vocabularies.
        """
        most = _power(len(logits))
        if most not in self._logits:
            self._logits[most] = torch.empty(most, logits.shape[1], dtype=logits.dtype, device=self._pool.device)
        return self._logits[most][: len(logits)]

    def _give_up(self, error: BaseException) -> None:
        """On graphs: for a while if memory is short, else for good."""
        self._drop()
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        if is_out_of_memory(error):
            self._paused = _PAUSE
            logger.warning("Memory is short: %d decode steps go on without CUDA graphs (%s).", _PAUSE, reason)
        else:
            _refuse(self._model, reason)

    def _forget(self, size: int) -> None:
        captured = self._captured.pop(size, None)
        if captured is not None:
            captured.graph.reset()
            if not self._captured:
                # torch takes memory that graphs shared for no new graph once the last of them is gone.
                self._graphs.release()

    def _drop(self) -> None:
        for captured in self._captured.values():
            captured.graph.reset()
        self._captured.clear()
        self._logits.clear()
        self._weights = None
        self._graphs.release()


class _Inputs:
    """What a captured step reads, at addresses that stay."""

    def __init__(self, buffers: TritonMetadata) -> None:
        self.buffers = buffers
        self._host = np.zeros((1, buffers.room.tokens), np.int64)
        self.tokens, self.positions = torch.zeros(
            (2, 1, buffers.room.tokens), dtype=torch.int64, device=buffers.slabs.pool.device
        )
        """[1, rows] each; 0 for padding."""

    def fill(self, packed: ForwardBatch) -> None:
        """Takes a forward in which all rows decode."""
        self.buffers.fill(packed)
        rows = len(packed.tokens)
        self._host[0, :rows], self._host[0, rows:] = packed.prefix_lens, 0
        upload(self._host, self.positions)
        # Tokens are on the device; the host may not know them yet.
        self.tokens[0, :rows] = packed.tokens
        self.tokens[0, rows:] = 0


@dataclass(frozen=True, slots=True)
class _Captured:
    inputs: _Inputs
    graph: Graph
    logits: torch.Tensor
    """[rows, V], written by a replay."""


class _Weights:
    """Where a model's parameters and buffers lie."""

    def __init__(self, model: nn.Module) -> None:
        self._holders: list[tuple[dict[str, Any], str]] = [
            (holder, name)
            for module in model.modules()
            for holder in (module._parameters, module._buffers)
            for name in holder
        ]
        self._places = self._now()

    @property
    def moved(self) -> bool:
        return self._now() != self._places

    def _now(self) -> list[int]:
        tensors = (holder.get(name) for holder, name in self._holders)
        return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _power(size: int) -> int:
    """The power of two that is not below ``size``."""
    return 1 << (size - 1).bit_length()


def _cause(error: BaseException) -> BaseException:
    """What went wrong first, want of memory before all else: ending a capture that has failed raises once more."""
    chain = [error]
    while (before := chain[-1].__context__) is not None:
        chain.append(before)
    return next(filter(is_out_of_memory, chain), chain[-1])


# -- on a GPU --------------------------------------------------------------------------------------------
