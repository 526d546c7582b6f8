"""Replay decode steps from CUDA graphs: one graph launch instead of hundreds of kernel launches.

A graph has a fixed batch size, so there is one graph per padded batch size, captured at first use; a step's rows are
padded to the next size. Padding rows read and write nothing (`TritonMetadata`). All that changes from step to step is
read from memory at fixed addresses: token and position ids, the attention metadata and the slab table. So the pool may
grow and shrink between replays.

Forwards that prefill run eagerly, and so do models that a graph cannot capture; see `with_cuda_graphs`.
"""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from rollout.models.arrays import ceil_div, next_power_of_2, upload
from rollout.models.attention import interface
from rollout.models.attention.base import AttentionBackend
from rollout.models.attention.multi_device import MultiDeviceBackend
from rollout.models.attention.triton import TritonAttention, TritonBackend
from rollout.models.attention.triton_metadata import MetadataSizes, TritonMetadata
from rollout.models.device import is_out_of_memory
from rollout.models.errors import clause
from rollout.models.forward_batch import ForwardBatch
from rollout.models.module.borrow import BorrowedModule
from rollout.models.module.inspect import family_name
from rollout.models.module.rope import Rotary
from rollout.models.module.tensor_parallel import tensor_parallel_group
from rollout.models.runners.base import Runner
from rollout.models.runners.graph_capture import CudaGraphs, Graph, Graphs

logger = logging.getLogger(__name__)

MIN_PAGES_PER_ROW = 64
"""Pages per row that a new graph has room for at least; room for a page takes 20 bytes, and partial results."""
_PAUSED_STEPS = 256
"""Steps that run eagerly after memory was short."""

#: Models that run without graphs, and the reason.
_refused: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def padded_batch_size(rows: int) -> int:
    """Round rows up to a graph's batch size: powers of two to 8, multiples of 8 to 64, then four sizes per doubling.

    Every call of the engine captures its graphs again, and while a batch drains, each size may serve only a few steps.
    So there are few sizes. Padding is cheaper: it attends to nothing and is under a fifth of more than 64 rows.
    """
    power = next_power_of_2(rows)
    step = power if power <= 8 else max(8, power // 8)
    return ceil_div(rows, step) * step


def with_cuda_graphs(eager: Runner, model: nn.Module, backend: AttentionBackend, borrowed: BorrowedModule) -> Runner:
    """Return a runner that captures decode steps, or ``eager`` for a model that graphs do not support.

    Three kinds of models are unsupported, with one warning each:

    - Rotary embeddings that depend on the sequence length (dynamic scaling, longrope): they choose frequencies on the
      host, and a graph would replay one choice for every step.
    - Several devices: a graph runs on one.
    - Tensor parallelism: a rank could fail to capture a step while the other ranks are blocked in its collectives.

    Args:
        eager: runs all other forwards.
        model: the model of ``eager``.
        backend: the attention backend of ``eager``: Triton, on one device or on each of several.
        borrowed: the borrowed ``model``.
    """
    if model not in _refused:
        devices = {tensor.device for tensors in (model.parameters(), model.buffers()) for tensor in tensors}
        if Rotary(model).depends_on_length:
            _refuse(model, "its rotary embeddings depend on the length of a sequence")
        elif len(devices) > 1 or isinstance(backend, MultiDeviceBackend):
            _refuse(model, "it lies on several devices")
        elif tensor_parallel_group(model) is not None:
            _refuse(model, "it is tensor-parallel")
    if model in _refused:
        return eager
    assert isinstance(backend, TritonBackend)
    return CudaGraphRunner(
        eager=eager,
        model=model,
        backend=backend,
        borrowed=borrowed,
        graphs=CudaGraphs(backend.slabs.pool.device),
    )


def _refuse(model: nn.Module, reason: str) -> None:
    """Run a model without graphs from now on, with one warning."""
    _refused[model] = reason
    logger.warning(
        "Decode steps of %s are not captured in CUDA graphs and run slower: %s.",
        family_name(model),
        reason.rstrip("."),
    )


class CudaGraphRunner(Runner):
    """Replays a graph for forwards in which all sequences decode; all others, and all under autocast, run eagerly.

    Autocast caches cast weights in memory that it frees when it ends, and a graph would keep reading that memory.

    A graph has room for a total number of pages: twice the pages of its rows at capture or `MIN_PAGES_PER_ROW` each,
    rounded up to a power of two. Rows that outgrow it are captured again, so at most once per doubling of their
    pages: four times between 512 and 8,192 tokens per row.

    Weights may change in place between forwards. If their memory has moved since the model was last borrowed, steps are
    captured again. Submodules that the caller replaces during a call of the engine are not noticed.

    Args:
        eager, model, backend, borrowed: see `with_cuda_graphs`.
        graphs: captures steps.
    """

    def __init__(
        self, eager: Runner, model: nn.Module, backend: TritonBackend, borrowed: BorrowedModule, graphs: Graphs
    ) -> None:
        self._eager = eager
        self._model = model
        self._backend = backend
        self._borrowed = borrowed
        self._graphs = graphs
        self.attention = eager.attention
        self._pool = backend.slabs.pool
        self._captured: dict[int, _CapturedStep] = {}
        self._logits: dict[int, torch.Tensor] = {}
        self._weights: _WeightAddresses | None = None
        self._times_borrowed = borrowed.times_borrowed
        self._paused = 0
        self._captures = 0
        self._capture_seconds = 0.0

    @property
    def bytes_kept(self) -> int:
        """See `Runner.bytes_kept`."""
        return self._graphs.bytes_kept

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """See `Runner.forward`; the next call overwrites the logits of a replayed step."""
        if not self._can_replay(batch):
            return self._eager.forward(batch)
        self._drop_if_weights_moved()
        handled = sys.exception()
        try:
            captured = self._captured_step(batch)
        except RuntimeError as error:
            # The eager forward writes everything again that the failed attempt may have written.
            self._handle_failure(_root_cause(error, handled))
            return self._eager.forward(batch)
        captured.graph.replay()
        return captured.logits[: len(batch.query_lens)]

    def shed(self) -> bool:
        """See `Runner.shed`."""
        if not self._captured:
            return False
        self._drop_all()
        self._paused = _PAUSED_STEPS
        logger.debug(
            "Memory is short: the CUDA graphs are freed and the next %d decode steps run eagerly.", _PAUSED_STEPS
        )
        return True

    def close(self) -> None:
        """See `Runner.close`."""
        if self._captures:
            logger.debug(
                "%d decode step(s) were captured in CUDA graphs, in %.1f s; they shared %.1f MB.",
                self._captures,
                self._capture_seconds,
                self._graphs.bytes_kept / 1e6,
            )
        self._drop_all()

    def _can_replay(self, batch: ForwardBatch) -> bool:
        if self._model in _refused or len(batch.logits_lens):
            return False
        if not len(batch.query_lens) or (batch.query_lens != 1).any():
            return False
        if torch.is_autocast_enabled(self._pool.device.type):
            return False
        self._paused = max(0, self._paused - 1)
        return not self._paused

    def _drop_if_weights_moved(self) -> None:
        """Drop all graphs if weights have moved; they can only move between two times that the model is borrowed."""
        if self._borrowed.times_borrowed == self._times_borrowed:
            return
        self._times_borrowed = self._borrowed.times_borrowed
        if self._weights is not None and self._weights.moved:
            logger.debug("The model's weights moved in memory: decode steps are captured again.")
            self._drop_all()

    def _captured_step(self, batch: ForwardBatch) -> _CapturedStep:
        """Return the captured step for a batch, with its inputs filled; capture the step if needed."""
        size = padded_batch_size(len(batch.query_lens))
        needed = MetadataSizes.of(batch, self._pool.layout.page_size)
        captured = self._captured.get(size)
        if captured is not None and captured.inputs.metadata.capacity.holds(needed):
            captured.inputs.fill(batch)
            return captured
        self._drop(size)
        captured = self._captured[size] = self._capture(size, needed.entries, batch)
        return captured

    def _capture(self, size: int, entries: int, batch: ForwardBatch) -> _CapturedStep:
        """Capture a step of ``size`` rows, with room for at least twice ``entries`` pages."""
        start = time.perf_counter()
        pages = next_power_of_2(max(2 * entries, MIN_PAGES_PER_ROW * size))
        inputs = _StepInputs(
            self._backend.make_metadata(MetadataSizes(decodes=size, prefills=0, tokens=size, entries=pages))
        )
        inputs.fill(batch)

        def step() -> torch.Tensor:
            with interface.use_attention(TritonAttention(self._pool, batch, inputs.metadata)):
                output = self._model(
                    input_ids=inputs.tokens, position_ids=inputs.positions, use_cache=False, logits_to_keep=0
                )
            step_logits: torch.Tensor = output.logits[0]
            return step_logits

        logits = self._logits_buffer(self._graphs.warm_up(step))
        graph = self._graphs.capture(lambda: logits.copy_(step()))
        self._weights = self._weights or _WeightAddresses(self._model)
        self._captures += 1
        self._capture_seconds += time.perf_counter() - start
        logger.debug("A decode step of %d rows was captured, with room for %d pages.", size, pages)
        return _CapturedStep(inputs, graph, logits)

    def _logits_buffer(self, logits: torch.Tensor) -> torch.Tensor:
        """Return memory [rows, V] for logits, shared by all batch sizes up to the same power of two.

        Only one graph's logits are in use at a time, and buffers of their own would add up to gigabytes for large
        vocabularies.
        """
        rows = next_power_of_2(len(logits))
        if rows not in self._logits:
            self._logits[rows] = torch.empty(rows, logits.shape[1], dtype=logits.dtype, device=self._pool.device)
        return self._logits[rows][: len(logits)]

    def _handle_failure(self, error: BaseException) -> None:
        """Pause graphs if memory is short; otherwise run the model without graphs from now on."""
        self._drop_all()
        reason = clause(error)
        if is_out_of_memory(error):
            self._paused = _PAUSED_STEPS
            logger.warning(
                "Memory is short: the next %d decode steps run without CUDA graphs (%s).", _PAUSED_STEPS, reason
            )
        else:
            _refuse(self._model, reason)

    def _drop(self, size: int) -> None:
        """Destroy the graph of one batch size, if there is one."""
        captured = self._captured.pop(size, None)
        if captured is not None:
            captured.graph.reset()
            if not self._captured:
                # Once no graph is left, torch lets no new graph join their memory pool.
                self._graphs.release()

    def _drop_all(self) -> None:
        """Destroy all graphs and free their memory."""
        for captured in self._captured.values():
            captured.graph.reset()
        self._captured.clear()
        self._logits.clear()
        self._weights = None
        self._graphs.release()


class _StepInputs:
    """Inputs of a captured step, at fixed addresses."""

    def __init__(self, metadata: TritonMetadata) -> None:
        self.metadata = metadata
        shape = (1, metadata.capacity.tokens)
        device = metadata.slabs.pool.device
        self._host_positions = np.zeros(shape, np.int64)
        self.tokens = torch.zeros(shape, dtype=torch.int64, device=device)
        """[1, rows] token ids; 0 for padding."""
        self.positions = torch.zeros(shape, dtype=torch.int64, device=device)
        """[1, rows] position ids; 0 for padding."""

    def fill(self, batch: ForwardBatch) -> None:
        """Copy in a batch in which all sequences decode."""
        self.metadata.fill(batch)
        rows = len(batch.tokens)
        self._host_positions[0, :rows] = batch.prefix_lens
        self._host_positions[0, rows:] = 0
        upload(self._host_positions, self.positions)
        # A copy on the device: the host may not know the token ids yet.
        self.tokens[0, :rows] = batch.tokens
        self.tokens[0, rows:] = 0


@dataclass(frozen=True, slots=True)
class _CapturedStep:
    inputs: _StepInputs
    graph: Graph
    logits: torch.Tensor
    """[rows, V], written by a replay."""


class _WeightAddresses:
    """Addresses of a model's parameters and buffers."""

    def __init__(self, model: nn.Module) -> None:
        self._holders: list[tuple[dict[str, Any], str]] = [
            (holder, name)
            for module in model.modules()
            for holder in (module._parameters, module._buffers)
            for name in holder
        ]
        self._addresses = self._current()

    @property
    def moved(self) -> bool:
        return self._current() != self._addresses

    def _current(self) -> list[int]:
        tensors = (holder.get(name) for holder, name in self._holders)
        return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _root_cause(error: BaseException, handled: BaseException | None) -> BaseException:
    """Return the first error of a chain, out-of-memory errors before all others.

    Ending a failed capture raises a second error.

    Args:
        handled: what the caller was handling before the capture began; it and what led to it are no cause.
    """
    chain = [error]
    while (context := chain[-1].__context__) not in (None, handled):
        assert context is not None
        chain.append(context)
    return next(filter(is_out_of_memory, chain), chain[-1])
