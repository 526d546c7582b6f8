"""The caller's live module as the engine runs it: its strategy, and the patches that make it faster."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from rollout.engine.patches import Patches
from rollout.engine.tp_sync import sync_for
from rollout.engine.weight_version import WeightVersion
from rollout.models.attention.names import AUTO
from rollout.models.csrc.build import begin as begin_compiling
from rollout.models.device import is_out_of_memory
from rollout.models.errors import UnsupportedModel, clause
from rollout.models.kv_cache.layout import KVLayout
from rollout.models.module.adapters import refuse_adapters
from rollout.models.module.attention_choice import drops_out
from rollout.models.module.borrow import BorrowedModule, exclusive
from rollout.models.module.changes import Change, ModuleWatch
from rollout.models.module.inspect import output_device, refuse_other_models
from rollout.models.module.sharding import ShardedWeights, refuse_missing_weights, without_wrappers
from rollout.models.module.signals import deliver_signals
from rollout.models.patches.shared_inputs import shared_inputs
from rollout.models.runners.base import RunStrategy
from rollout.models.runners.parity_check import check_invariance, check_parity
from rollout.models.runners.select import select_strategy

logger = logging.getLogger(__name__)


class Seen(NamedTuple):
    """Counters of what has happened to a module; a stream compares them with those of its last step."""

    changes: int = 0
    """Changes of the weights: keys and values computed at another count are of other weights."""
    moves: int = 0
    """Changes of tensors, modules or settings: pages and runners made at another count are stale."""
    calls: int = 0
    """Calls begun: one inside a stream may leave patches that are not the stream's."""


class LiveModule:
    """Borrows a module for steps, and leaves it as its owner had it in between.

    What depends on the module's structure alone is kept from call to call, and what depends on its weights until they
    change. `look` notices both.

    Args:
        model: a transformers causal LM, wrapped or not.
        attention: name of a backend, or ``auto``.
        free_bytes: reads the memory that copies of weights may take their share of.
        batch_invariant: refuse a model whose logits depend on the other rows of a step.

    Raises:
        UnsupportedModel: the model, or the model with that attention, is not supported; the message says why.
    """

    def __init__(
        self,
        model: nn.Module,
        attention: str = AUTO,
        free_bytes: Callable[[], float] = lambda: 0.0,
        *,
        batch_invariant: bool = False,
    ) -> None:
        refuse_other_models(model)
        self.model = without_wrappers(model)
        self._weights = ShardedWeights(self.model)
        self._choice = attention
        self._free_bytes = free_bytes
        self._batch_invariant = batch_invariant
        self._layouts: dict[object, KVLayout] = {}
        self._patches: Patches | None = None
        # Another thread may be inside a step, with patches of its own.
        with self.gathered(), exclusive(self.model):
            refuse_missing_weights(self.model)
            self.device = output_device(self.model)
            if self.device.type == "cpu":
                begin_compiling()
            self.sync = sync_for(self.model)
            self._watch = ModuleWatch(self.model)
            self.strategy = select_strategy(self.model, attention, self._check)
            """How the module is run."""
        self.version = WeightVersion()
        """What the next tokens carry."""
        self.seen = Seen()
        """What has happened so far."""
        self._open_calls = 0
        self._declared = False
        self._used = False
        self._taken_over = True
        """Whether all that the last look has seen was made anew; an error may have ended it."""
        self._said_dropout = False

    def _checked_anew(self) -> RunStrategy:
        """Return a strategy for the module as it is now: of the same kind, if that still passes the check."""
        refuse_adapters(self.model)
        self._layouts.clear()
        self._patches = None
        try:
            strategy = type(self.strategy)(self.model, self._choice)
            self._check(strategy)
        except UnsupportedModel:
            return select_strategy(self.model, self._choice, self._check)
        return strategy

    def _check(self, strategy: RunStrategy) -> None:
        """Check a strategy with the patches, and without them if that fails.

        Raises:
            UnsupportedModel: the strategy fails without patches too.
        """
        deliver_signals()
        with shared_inputs(self.model, on_gpu=self._batch_invariant) as groups:
            layout = self._layout_of(strategy)
        self._patches = Patches(
            self.model, groups, has_states=bool(layout.states), batch_invariant=self._batch_invariant
        )
        self._patches.fit(self._free_bytes())
        try:
            check_parity(strategy, layout, self._patches.applied)
        except Exception as error:
            if is_out_of_memory(error) or self._batch_invariant:
                raise
            self._patches = None
            check_parity(strategy, layout)
            logger.warning("The model runs without the engine's faster layers, and slower: %s.", clause(error))
        if self._batch_invariant:
            assert self._patches is not None
            check_invariance(strategy, layout, self._patches.applied)
        self._layouts[self.autocast] = layout

    @property
    def autocast(self) -> object:
        """What the dtypes of activations depend on besides the module."""
        kind = self.device.type
        return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)

    def layout(self) -> KVLayout:
        """Return what the module stores per token and per row."""
        if self.autocast not in self._layouts:
            self._layouts[self.autocast] = self._layout_of(self.strategy)
        return self._layouts[self.autocast]

    def _layout_of(self, strategy: RunStrategy) -> KVLayout:
        return replace(strategy.kv_layout(), decodes_apart=self._batch_invariant and self.device.type == "cuda")

    @property
    def may_keep_graphs(self) -> bool:
        """Whether CUDA graphs of one call may serve the next: on a GPU, unless each call gathers the weights anew."""
        return self.device.type == "cuda" and not self._weights.gathers

    def declare_changed(self) -> None:
        """Take it that all weights differ when they are next looked at."""
        self._declared = True

    def look(self) -> Change:
        """Return what has changed since the last look, make everything anew that depends on it, and count the change.

        Raises:
            UnsupportedModel: the module can no longer be served, or not with its active PEFT adapter.
        """
        with exclusive(self.model):  # another thread may be inside a step, with patches of its own
            return self._look()

    def _look(self) -> Change:
        self._weights.refuse_sharded()
        lost = not self._taken_over
        self._taken_over = False
        change = self._watch.look(declared=self._declared)
        change = self._agreed(Change(structure=True, settings=True, moved=True) if lost else change)
        self._declared = False
        if change.weights:
            torch.clear_autocast_cache()  # the caller's block may hold casts of the earlier weights
        if change.structure:
            self.strategy = self._checked_anew()
        elif change.weights or change.moved:
            if change.settings:
                refuse_adapters(self.model)
                self._layouts.clear()
            if self._patches is not None:
                self._patches.refresh(change)
        if change.weights and self._used:
            self.seen = self.seen._replace(changes=self.seen.changes + 1)
        if change.structure or change.settings or change.moved:
            self.seen = self.seen._replace(moves=self.seen.moves + 1)
        self.version.look(change.weights and self._used)
        self._taken_over = True
        return change

    def _agreed(self, change: Change) -> Change:
        """Return a change that is the same on all ranks of a tensor-parallel model, but for the values."""
        if self.sync.alone:
            return change
        return replace(
            change,
            structure=not self.sync.all(not change.structure),
            settings=not self.sync.all(not change.weights),
            moved=not self.sync.all(not change.moved),
        )

    def prepare(self, free_bytes: Callable[[], float]) -> KVLayout:
        """Begin a call: look at the module, and have the patches of the call.

        Args:
            free_bytes: reads the memory that the call may take; copies of weights take their share of it.

        Returns what the module stores per token and per row.

        Raises:
            UnsupportedModel: the module can no longer be served, or not with its active PEFT adapter.
        """
        refuse_missing_weights(self.model)
        self._say_dropout()
        self.look()
        self._used = True
        self.seen = self.seen._replace(calls=self.seen.calls + 1)
        self.fit(free_bytes)
        return self.layout()

    def _say_dropout(self) -> None:
        """Say once that the trainer's own numbers are random, if a module drops out as its owner has left it."""
        if self._said_dropout:
            return
        for name, module in self.model.named_modules():
            if module.training and drops_out(module):
                self._said_dropout = True
                rates = (value for key, value in vars(module).items() if key == "p" or "dropout" in key)
                logger.warning(
                    "%s drops out with p=%g in train mode: the trainer's own log-probabilities are random, and differ "
                    "from the records', which are computed in eval mode.",
                    name or type(module).__name__,
                    max(float(rate) for rate in rates if isinstance(rate, int | float)),
                )
                return

    def fit(self, free_bytes: Callable[[], float]) -> None:
        """Have copies of weights for the caller's autocast, within the free memory."""
        if self._patches is not None:
            with exclusive(self.model):
                self._patches.fit(free_bytes())

    def gathered(self) -> AbstractContextManager[None]:
        """Gather sharded weights inside the block; every rank must enter it."""
        return self._weights.gathered()

    @contextmanager
    def call(self) -> Iterator[None]:
        """Hold sharded weights gathered inside the block, which is a call; every rank must enter it.

        Calls may run inside a stream. The last one to end drops copies of weights that take much of the free memory.
        """
        self._open_calls += 1
        try:
            with self.gathered():
                yield
        finally:
            self._open_calls -= 1
            if not self._open_calls and self._patches is not None:
                self._patches.keep_within(self._free_bytes())

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """Run steps inside the block; after it the module is as before."""
        with self.strategy.borrow(), nullcontext() if self._patches is None else self._patches.applied():
            yield

    def borrowed_plainly(self) -> AbstractContextManager[None]:
        """Run the module's own forward inside the block, in eval mode without gradients: no patch, its attention."""
        return BorrowedModule(self.model).borrow()

    def drop_copies(self) -> None:
        """Free all copies of weights until the next call."""
        if self._patches is not None:
            self._patches.drop_copies()
