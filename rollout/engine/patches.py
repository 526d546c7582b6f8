"""The patches that make a module faster while the engine borrows it, kept from one call to the next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal

import torch
from torch import nn

from rollout.models.device import is_out_of_memory
from rollout.models.errors import UnsupportedDevice, UnsupportedModel
from rollout.models.module.changes import Change
from rollout.models.module.inspect import output_device
from rollout.models.patches.batch_invariant import GroupedProducts, check_kernel, invariant_products
from rollout.models.patches.decoder_stack import DecoderStack, decoder_stack
from rollout.models.patches.linears import PackedLinears
from rollout.models.patches.norms_and_rope import FusedModules
from rollout.models.patches.patching import in_force
from rollout.models.patches.shared_inputs import LinearGroup

#: Share of the free memory for packed copies of linear weights; the rest is left to the KV cache.
_COPIES_SHARE = 0.5
#: Copies that take a larger share of the free memory are dropped when a call ends.
_KEPT_SHARE = 0.25


class Patches:
    """Packed linear layers and fused modules of a module, as long as its structure stays.

    Args:
        model: the module.
        groups: linear layers that may run as one, see `rollout.models.patches.shared_inputs`.
        has_states: whether the model has recurrent states. They accumulate rounding differences, so such models keep
            their own kernels.
        batch_invariant: whether a row must have the same bits in any batch.

    Raises:
        UnsupportedModel: the kernel that a GPU needs for that does not work there.
    """

    def __init__(
        self, model: nn.Module, groups: Sequence[LinearGroup], *, has_states: bool, batch_invariant: bool = False
    ) -> None:
        self._model = model
        self._groups = groups
        self._batch_invariant = batch_invariant
        device = output_device(model)
        self._invariant_on_gpu = batch_invariant and device.type == "cuda"
        if self._invariant_on_gpu:
            try:
                check_kernel(device)
            except UnsupportedDevice as error:
                raise UnsupportedModel(f"batch_invariant=true was requested, but {error}") from error
            self._grouped = GroupedProducts(self._groups)
        self._fused = None if has_states else FusedModules(model)
        self._linears: PackedLinears | None = None
        self._autocast: object = None
        self._stack: DecoderStack | Literal[False] | None = None
        """False if there can be none with these copies, None if that is not known."""

    def fit(self, free_bytes: float) -> None:
        """Have copies of the linear weights in the dtype that they are computed in, within the free memory."""
        autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")
        if self._linears is not None and (
            autocast != self._autocast or self._linears.bytes_held > self._room(free_bytes)
        ):
            self.drop_copies()
        if self._linears is None:
            self._linears = PackedLinears(self._model, self._room(free_bytes), self._groups)
            self._autocast = autocast
            if self._batch_invariant and self._linears.left_out:
                raise UnsupportedModel(
                    f"batch_invariant=true was requested, but the copies of {self._linears.left_out} linear layers, "
                    "without which a row depends on its batch, do not fit into the free memory."
                )

    def _room(self, free_bytes: float) -> int:
        held = 0 if self._linears is None else self._linears.bytes_held
        return int((free_bytes + held) * _COPIES_SHARE)

    def refresh(self, change: Change) -> None:
        """Take over a change of the module that leaves its structure."""
        if self._linears is not None and not self._copied_anew(self._linears, change):
            self.drop_copies()
        if self._fused is not None and change.settings:
            self._fused = FusedModules(self._model)
            self._stack = None
        elif self._fused is not None:
            self._fused.refresh()

    def _copied_anew(self, linears: PackedLinears, change: Change) -> bool:
        """Copy changed weights anew; return whether that has worked."""
        try:
            return linears.refresh(change.values, moved=change.moved)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return False

    def keep_within(self, free_bytes: float) -> None:
        """Free working memory, and drop the copies if they take much of the memory that is left to others."""
        if self._stack:
            self._stack.release()
        if self._linears is not None and self._linears.bytes_held > _KEPT_SHARE * free_bytes:
            self.drop_copies()

    def drop_copies(self) -> None:
        """Free the copies; `fit` makes them again."""
        self._linears = self._stack = None

    def _decoder_stack(self) -> DecoderStack | None:
        """Return the stack of the decoder layers, None if the model or a missing patch allows none."""
        if self._stack is None and not in_force():  # patched modules are not recognised
            known = None
            if self._fused is not None and self._linears is not None:
                known = decoder_stack(self._model, self._fused, self._linears)
            self._stack = known or False
        return self._stack or None

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Make the module run with the patches inside the block."""
        patches = self._linears, self._fused, self._decoder_stack()
        with ExitStack() as stack:
            if self._invariant_on_gpu:
                stack.enter_context(invariant_products())
                stack.enter_context(self._grouped.applied())
            for patch in patches:
                if patch is not None:
                    stack.enter_context(patch.applied())
            yield
