"""Replay steps from CUDA graphs: one graph launch instead of hundreds of kernel launches.

A graph has a fixed size, so steps are padded to the rungs of a ladder (`rollout.models.runners.graph_rungs`). Padding
reads and writes nothing (`TritonMetadata`). All that changes from step to step is read from memory at fixed addresses:
token and position ids, which logits are wanted, the attention metadata and the slab table. So the pool may grow and
shrink between replays.

A rung is captured once steps of its size have come up often enough to pay for it. Until then the next larger graph
replays them, or they run eagerly. So do long prefills, and models that a graph cannot capture; see `with_cuda_graphs`.
"""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import nn

from rollout.models.arrays import next_power_of_2
from rollout.models.attention import interface
from rollout.models.attention.base import AttentionBackend
from rollout.models.attention.multi_device import MultiDeviceBackend
from rollout.models.attention.triton import TritonAttention, TritonBackend
from rollout.models.attention.triton_metadata import MetadataSizes
from rollout.models.device import is_out_of_memory
from rollout.models.errors import clause
from rollout.models.forward_batch import ForwardBatch
from rollout.models.module.borrow import BorrowedModule
from rollout.models.module.inspect import family_name
from rollout.models.module.rope import Rotary
from rollout.models.module.tensor_parallel import tensor_parallel_group
from rollout.models.runners.base import Runner
from rollout.models.runners.graph_capture import CudaGraphs, Graph, Graphs, root_cause
from rollout.models.runners.graph_rungs import Ladder, Rung, most_mixed_tokens
from rollout.models.runners.step_inputs import StepInputs
from rollout.models.runners.weight_addresses import WeightAddresses

logger = logging.getLogger(__name__)

MIN_PAGES_PER_ROW = 64
"""Pages per row that a new graph has room for at least; room for a page takes 20 bytes, and partial results."""
_PAUSED_STEPS = 256
"""Steps that run eagerly after memory was short."""

_STEPS_PER_SLOW_CAPTURE = 200
"""Steps per capture that may exceed the latency budget."""

#: Models that run without graphs, and the reason.
_refused: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
#: For each model, the kinds of steps that were tried out: without and with prefills.
_tried: WeakKeyDictionary[nn.Module, set[bool]] = WeakKeyDictionary()


def with_cuda_graphs(eager: Runner, model: nn.Module, backend: AttentionBackend, borrowed: BorrowedModule) -> Runner:
    """Return a runner that captures steps, or ``eager`` for a model that graphs do not support.

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
        "Steps of %s are not captured in CUDA graphs and run slower: %s.",
        family_name(model),
        reason.rstrip("."),
    )


class CudaGraphRunner(Runner):
    """Replays graphs; what no graph serves, and all under autocast, runs eagerly.

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
        self._ladder = Ladder(most_mixed_tokens(model, len(self._pool.layout.layers)))
        self._captured: dict[Rung, _CapturedStep] = {}
        self._weights: WeightAddresses | None = None
        self._times_borrowed = borrowed.times_borrowed
        self._paused = 0
        self._steps = 0
        self._captures = 0
        self._capture_seconds = 0.0
        self._slowest_capture = 0.0
        self._prepared = False

    @property
    def bytes_kept(self) -> int:
        """See `Runner.bytes_kept`."""
        return self._graphs.bytes_kept

    @property
    def prepared(self) -> bool:
        """See `Runner.prepared`."""
        return self._prepared

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """See `Runner.forward`; the next call overwrites the logits of a replayed step."""
        self._prepared = False
        self._steps += 1
        captured = self._captured_step(batch) if self._can_replay(batch) else None
        if captured is None:
            return self._eager.forward(batch)
        captured.graph.replay()
        return captured.graph.output[: len(batch.query_lens)]

    def shed(self) -> bool:
        """See `Runner.shed`."""
        if not self._captured:
            return False
        self._drop_all()
        self._paused = _PAUSED_STEPS
        logger.debug("Memory is short: the CUDA graphs are freed and the next %d steps run eagerly.", _PAUSED_STEPS)
        return True

    def rest(self, most_bytes: float) -> int:
        """See `Runner.rest`."""
        held = self._graphs.bytes_kept + sum(captured.inputs.bytes_held for captured in self._captured.values())
        if held <= most_bytes:
            return held
        self.close()
        return 0

    def close(self) -> None:
        """See `Runner.close`."""
        if self._captures:
            logger.debug(
                "%d step(s) were captured in CUDA graphs, in %.1f s; they shared %.1f MB.",
                self._captures,
                self._capture_seconds,
                self._graphs.bytes_kept / 1e6,
            )
        self._captures, self._capture_seconds = 0, 0.0
        self._drop_all()

    def _can_replay(self, batch: ForwardBatch) -> bool:
        if self._model in _refused or len(batch.logits_lens) or not len(batch.query_lens):
            return False
        if not self._backend.prefills_in_kernels and Rung.of(batch).mixed:
            return False
        if (batch.decode_lens > 1).any():  # graphs have room for the splits of one token per sequence
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
            logger.debug("The model's weights moved in memory: steps are captured again.")
            self._drop_all()

    def _captured_step(self, batch: ForwardBatch) -> _CapturedStep | None:
        """Return a captured step for a batch, with its inputs filled; None if the batch is to run eagerly."""
        self._drop_if_weights_moved()
        handled = sys.exception()
        try:
            rung = Rung.of(batch)
            needed = MetadataSizes.of(batch, self._pool.layout.page_size)
            captured = self._serving(rung, needed)
            due = self._ladder.is_due(rung, served=captured is not None)
            if due and rung not in self._captured and self._ladder.captures(rung) and self._may_capture:
                captured = self._captured[rung] = self._capture(rung, needed.entries, batch)
            elif captured is not None:
                captured.inputs.fill(batch)
        except RuntimeError as error:
            # The eager forward writes everything again that the failed attempt may have written.
            self._handle_failure(root_cause(error, handled))
            return None
        return captured

    @property
    def _may_capture(self) -> bool:
        """Whether a capture would leave enough steps within the latency budget, if there is one.

        Captures that take most of the budget may be one step in 200: with them, and half as many others, 99 % of the
        steps keep it.
        """
        if self.latency_budget_ms is None or 0 < 2e3 * self._slowest_capture < self.latency_budget_ms:
            return True
        return self._captures <= self._steps // _STEPS_PER_SLOW_CAPTURE

    def _serving(self, rung: Rung, needed: MetadataSizes) -> _CapturedStep | None:
        """Return the smallest captured step that serves a batch of this size; drop its own rung's if outgrown."""
        own = self._captured.get(rung)
        if own is not None:
            if own.inputs.metadata.capacity.holds(needed):
                return own
            self._drop(rung)
        served = [
            captured
            for captured, step in self._captured.items()
            if self._ladder.serves(captured, rung) and step.inputs.metadata.capacity.holds(needed)
        ]
        return self._captured[min(served)] if served else None

    def _capture(self, rung: Rung, entries: int, batch: ForwardBatch) -> _CapturedStep:
        """Capture a step, with room for at least twice ``entries`` pages and its inputs filled from ``batch``.

        The first step of each kind is tried out eagerly, to load kernels and to find what a graph cannot capture. Steps
        of other sizes may use kernels that have not been loaded, which some cannot be during a capture, so a step that
        cannot be captured is tried out too, and captured again.
        """
        start, handled = time.perf_counter(), sys.exception()
        self._prepared = True
        tried = _tried.setdefault(self._model, set())
        untried = rung.mixed not in tried
        try:
            captured = self._capture_once(rung, entries, batch, try_out=untried)
        except RuntimeError as error:
            if untried or is_out_of_memory(root_cause(error, handled)):
                raise
            if not self._captured:
                self._graphs.release()
            captured = self._capture_once(rung, entries, batch, try_out=True)
        tried.add(rung.mixed)
        self._weights = self._weights or WeightAddresses(self._model)
        self._captures += 1
        seconds = time.perf_counter() - start
        self._capture_seconds += seconds
        self._slowest_capture = max(self._slowest_capture, seconds)
        room = captured.inputs.metadata.capacity.entries
        logger.debug("A step of up to %d tokens was captured, with room for %d pages.", rung.tokens, room)
        return captured

    def _capture_once(self, rung: Rung, entries: int, batch: ForwardBatch, try_out: bool) -> _CapturedStep:
        def step(inputs: StepInputs) -> torch.Tensor:
            with interface.use_attention(TritonAttention(self._pool, batch, inputs.metadata)):
                output = self._model(
                    input_ids=inputs.tokens,
                    position_ids=inputs.positions,
                    use_cache=False,
                    logits_to_keep=inputs.wanted if rung.mixed else 0,
                )
            step_logits: torch.Tensor = output.logits[0]
            return step_logits

        if try_out:
            tried = self._filled_inputs(rung, entries, batch)
            self._graphs.warm_up(lambda: step(tried))
        # Only now does the backend know which tiles the model's prefills make up.
        inputs = self._filled_inputs(rung, entries, batch)
        inputs.metadata.sealed = True
        return _CapturedStep(inputs, self._graphs.capture(lambda: step(inputs)))

    def _filled_inputs(self, rung: Rung, entries: int, batch: ForwardBatch) -> StepInputs:
        """Return inputs of a rung, with room for at least twice ``entries`` pages, filled from a batch."""
        pages = next_power_of_2(max(2 * entries, MIN_PAGES_PER_ROW * rung.logits))
        prefills = rung.logits if rung.mixed else 0
        sizes = MetadataSizes(decodes=rung.logits, prefills=prefills, tokens=rung.tokens, entries=pages)
        inputs = StepInputs(rung, self._backend.make_metadata(sizes))
        inputs.fill(batch)
        return inputs

    def _handle_failure(self, error: BaseException) -> None:
        """Pause graphs if memory is short; otherwise run the model without graphs from now on."""
        self._drop_all()
        reason = clause(error)
        if is_out_of_memory(error):
            self._paused = _PAUSED_STEPS
            logger.warning("Memory is short: the next %d steps run without CUDA graphs (%s).", _PAUSED_STEPS, reason)
        else:
            _refuse(self._model, reason)

    def _drop(self, rung: Rung) -> None:
        """Destroy the graph of one rung."""
        self._captured.pop(rung).graph.reset()
        if not self._captured:
            self._graphs.release()

    def _drop_all(self) -> None:
        """Destroy all graphs and free their memory."""
        for captured in self._captured.values():
            captured.graph.reset()
        self._captured.clear()
        self._weights = None
        self._graphs.release()


@dataclass(frozen=True, slots=True)
class _CapturedStep:
    inputs: StepInputs
    graph: Graph
    """Its output is logits [rows, V]."""
