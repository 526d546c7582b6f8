"""The live batch: arrays with one slot per decoding row, so that a step runs no Python per row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from rollout.batcher.types import IntArray
from rollout.engine.batch_row import BatchRow, Completion, Float32Array
from rollout.engine.sampling_arrays import SamplingArrays, longer
from rollout.models.arrays import uploaded
from rollout.models.sampling.sampler import RowSampling

_GROWTH = 16
_NO_STATE: IntArray = np.zeros(0, np.int64)
_T = TypeVar("_T", bound=np.generic)


class LiveBatch:
    """Rows that decode. Arrays are indexed by slot; lists of slots are oldest row first.

    Tokens are sampled on the device before the host reads them: ``generated`` counts the sampled tokens of a row,
    ``received`` those that the host has read. A row that has ended keeps its slot and pages until all of its sampled
    tokens have been read.
    """

    def __init__(self, page_size: int, device: torch.device, states_per_row: int = 0) -> None:
        self._page_size = page_size
        self._device = device
        self._rows: list[BatchRow | None] = []
        self._free: list[int] = []
        self.active: IntArray = np.zeros(0, np.int64)
        """Slots of the rows that still decode."""
        self.occupied: IntArray = np.zeros(0, np.int64)
        """All slots in use: the active ones, and those of rows that only wait for their last tokens to be read."""

        # One entry per slot; `_grow_slots` lists all of them.
        self.page_tables: IntArray = np.zeros((0, _GROWTH), np.int64)
        """[slots, pages] page ids."""
        self.page_counts: IntArray = np.zeros(0, np.int64)
        self.shared_pages: IntArray = np.zeros(0, np.int64)
        """Leading pages that were computed for other rows."""
        self.states: IntArray = np.zeros((0, states_per_row), np.int64)
        """[slots, 1] page of each row's recurrent state; [slots, 0] in models without."""
        self.prompt_lengths: IntArray = np.zeros(0, np.int64)
        self.generated: IntArray = np.zeros(0, np.int64)
        """Sampled tokens, including those not read yet."""
        self.received: IntArray = np.zeros(0, np.int64)
        """Sampled tokens that the host has read."""
        self.limits: IntArray = np.zeros(0, np.int64)
        self.ends_at_limit: NDArray[np.bool_] = np.zeros(0, np.bool_)
        self.groups: IntArray = np.zeros(0, np.int64)
        """Number of each row's group."""
        self.ignore_eos: NDArray[np.bool_] = np.zeros(0, np.bool_)
        self.has_stops: NDArray[np.bool_] = np.zeros(0, np.bool_)
        """Whether the row has stop strings."""
        self.end_ids: IntArray = np.zeros((0, 0), np.int64)
        """[slots, ids] the row's own ids that end it, besides the model's; -1 where it has fewer."""
        self.ended: NDArray[np.bool_] = np.zeros(0, np.bool_)
        """True once the row has finished; tokens sampled after its last one are discarded."""
        self.non_finite: NDArray[np.bool_] = np.zeros(0, np.bool_)
        """Whether any log-probability of the row was not finite."""
        self.no_token: NDArray[np.bool_] = np.zeros(0, np.bool_)
        """Whether the row's parameters left no token to draw; the last token then is none of its completion."""
        self._tokens_at_join: IntArray = np.zeros(0, np.int64)
        self._sampling = SamplingArrays(device)
        self._last = torch.zeros(0, dtype=torch.int64, device=device)
        """[slots] the most recently sampled token, on the device, but for those in `_drawn`."""
        self._drawn = self.active, self._last
        """Slots of the last step and their tokens: while the same rows decode, no step copies them."""
        self._uploaded = self.active, uploaded(self.active, device)
        """Slots, which nobody changes in place, and their copy on the device."""
        self._tokens: IntArray = np.zeros((0, _GROWTH), np.int64)
        self._logprobs: NDArray[np.float32] = np.zeros((0, _GROWTH), np.float32)
        self._sampler_logprobs: NDArray[np.float32] = np.zeros((0, _GROWTH), np.float32)
        self._weight_versions: IntArray = np.zeros((0, _GROWTH), np.int64)

    def __len__(self) -> int:
        return len(self.active)

    def row(self, slot: int) -> BatchRow:
        """Return the row in ``slot``."""
        row = self._rows[slot]
        assert row is not None, f"slot {slot} is free"
        return row

    def lengths(self, slots: IntArray) -> IntArray:
        """Return [slots] prompt plus sampled tokens; the last token is not in the row's pages yet."""
        lengths: IntArray = self.prompt_lengths[slots] + self.generated[slots]
        return lengths

    def last_tokens(self, slots: IntArray) -> torch.Tensor:
        """Return [slots] int64 on the device: the token that each row decodes from."""
        if self._drawn[0] is not slots:
            self._store_drawn()
            return self._last.index_select(0, self._on_device(slots))
        return self._drawn[1]

    def _store_drawn(self) -> None:
        """Store the tokens of the last step by slot."""
        slots, tokens = self._drawn
        if len(slots):
            self._last.index_copy_(0, self._on_device(slots), tokens)
            self._drawn = slots[:0], tokens[:0]

    def _on_device(self, slots: IntArray) -> torch.Tensor:
        """Return ``slots`` on the device; those of the step before are there already if they are the same array."""
        if self._uploaded[0] is not slots:
            self._uploaded = slots, uploaded(slots, self._device)
        return self._uploaded[1]

    def pages(self, slot: int) -> IntArray:
        """Return the row's pages, in order."""
        pages: IntArray = self.page_tables[slot, : self.page_counts[slot]]
        return pages

    def check_integrity(self) -> None:
        """Check that page tables are as wide as what they hold, and that pages cover all computed tokens; for tests.

        Raises:
            AssertionError: a row counts more pages than its table has, or has too few pages for its tokens.
        """
        counts, width = self.page_counts[self.occupied], self.page_tables.shape[1]
        if counts.max(initial=0) > width:
            raise AssertionError(f"a row counts {counts.max()} pages, but page tables have {width} columns")
        # The last sampled token is not in the pages yet. Models without a KV cache hold no page at all.
        too_few = counts * self._page_size < self.lengths(self.occupied) - 1
        if counts.any() and too_few.any():
            raise AssertionError(f"slots {self.occupied[too_few].tolist()} have too few pages for their tokens")

    def all_rows(self) -> list[BatchRow]:
        """Return the rows in all occupied slots, oldest first."""
        return [self.row(slot) for slot in self.occupied.tolist()]

    def all_pages(self) -> list[IntArray]:
        """Return the pages of every row, as views that may be rewritten."""
        return [self.pages(slot) for slot in self.occupied.tolist()]

    def all_states(self) -> list[IntArray]:
        """Return the state pages of every row, as views that may be rewritten."""
        return [self.states[slot] for slot in self.occupied.tolist()]

    # -- adding and removing rows --------------------------------------------------------------------

    def add(self, row: BatchRow, pages: IntArray, state: IntArray = _NO_STATE, shared_pages: int = 0) -> int:
        """Give ``row`` a slot; it continues after the tokens of ``row.completion``.

        Of its pages, the first ``shared_pages`` were computed for other rows.
        """
        if not self._free:
            self._grow_slots()
        slot = self._free.pop()
        done = len(row.completion)
        self._widen(pages=len(pages), tokens=done + 1)
        self._rows[slot] = row
        self.page_tables[slot, : len(pages)] = pages
        self.page_counts[slot] = len(pages)
        self.shared_pages[slot] = shared_pages
        self.states[slot] = state
        self.prompt_lengths[slot] = len(row.group.prompt_ids)
        self.generated[slot] = done
        self.received[slot] = done
        self.limits[slot] = row.limit
        self.ends_at_limit[slot] = row.ends_at_limit
        self.groups[slot] = row.group.number
        self.ended[slot] = False
        self.non_finite[slot] = False
        self.no_token[slot] = False
        self._tokens_at_join[slot] = done
        params = row.request.params
        self.ignore_eos[slot] = params.ignore_eos
        self.has_stops[slot] = bool(params.stop)
        self._set_end_ids(slot, [*params.stop_token_ids, *row.request.end_ids])
        self._sampling.set(slot, row)
        if done:
            self._tokens[slot, :done] = row.completion.tokens
            self._logprobs[slot, :done] = row.completion.logprobs
            self._sampler_logprobs[slot, :done] = row.completion.sampler_logprobs
            self._weight_versions[slot, :done] = row.completion.weight_versions
        self.active = np.append(self.active, slot)
        self.occupied = np.append(self.occupied, slot)
        return slot

    def remove(self, slot: int) -> None:
        """Free a slot whose pages have been released."""
        self.active = self.active[self.active != slot]
        self.occupied = self.occupied[self.occupied != slot]
        self._rows[slot] = None
        self._sampling.clear(slot)
        self.page_tables[slot] = 0
        self._free.append(slot)

    def _grow_slots(self) -> None:
        """Double the number of slots, with zeros in the new ones."""
        old = len(self._rows)
        new = max(_GROWTH, 2 * old)
        self._rows.extend([None] * (new - old))
        self._free.extend(range(new - 1, old - 1, -1))
        self.page_tables = longer(self.page_tables, new)
        self.page_counts = longer(self.page_counts, new)
        self.shared_pages = longer(self.shared_pages, new)
        self.states = longer(self.states, new)
        self.prompt_lengths = longer(self.prompt_lengths, new)
        self.generated = longer(self.generated, new)
        self.received = longer(self.received, new)
        self.limits = longer(self.limits, new)
        self.ends_at_limit = longer(self.ends_at_limit, new)
        self.groups = longer(self.groups, new)
        self.ignore_eos = longer(self.ignore_eos, new)
        self.has_stops = longer(self.has_stops, new)
        self.end_ids = longer(self.end_ids, new)
        self.ended = longer(self.ended, new)
        self.non_finite = longer(self.non_finite, new)
        self.no_token = longer(self.no_token, new)
        self._tokens_at_join = longer(self._tokens_at_join, new)
        self._sampling.grow(new)
        self._tokens = longer(self._tokens, new)
        self._logprobs = longer(self._logprobs, new)
        self._sampler_logprobs = longer(self._sampler_logprobs, new)
        self._weight_versions = longer(self._weight_versions, new)
        self._last = torch.cat([self._last, self._last.new_zeros(new - old)])

    def _set_end_ids(self, slot: int, ids: Sequence[int]) -> None:
        missing = len(ids) - self.end_ids.shape[1]
        if missing > 0:
            self.end_ids = np.pad(self.end_ids, ((0, 0), (0, missing)), constant_values=-1)
        self.end_ids[slot] = -1
        self.end_ids[slot, : len(ids)] = ids

    def _widen(self, pages: int = 0, tokens: int = 0) -> None:
        """Make room for at least ``pages`` pages and ``tokens`` tokens per row."""
        self.page_tables = _wider(self.page_tables, pages)
        self._tokens = _wider(self._tokens, tokens)
        self._logprobs = _wider(self._logprobs, tokens)
        self._sampler_logprobs = _wider(self._sampler_logprobs, tokens)
        self._weight_versions = _wider(self._weight_versions, tokens)

    # -- a step --------------------------------------------------------------------------------------

    def ends_at(self, slots: IntArray, tokens: IntArray) -> NDArray[np.bool_]:
        """Return [slots] whether each token is one of the row's own ids that end it."""
        ends = np.zeros(len(slots), np.bool_)
        for ids in self.end_ids.T:
            ends |= ids[slots] == tokens
        return ends

    def without_page(self, slots: IntArray) -> IntArray:
        """Return those of ``slots`` that hold no page for their next token."""
        missing: IntArray = slots[self.page_counts[slots] * self._page_size < self.lengths(slots)]
        return missing

    def without_token(self) -> IntArray:
        """Return the slots of rows that have sampled no token since they joined."""
        slots: IntArray = self.active[self.generated[self.active] == self._tokens_at_join[self.active]]
        return slots

    def add_pages(self, slots: IntArray, pages: IntArray) -> None:
        """Append one page to each of ``slots``."""
        self._widen(pages=int(self.page_counts[slots].max()) + 1)
        self.page_tables[slots, self.page_counts[slots]] = pages
        self.page_counts[slots] += 1

    def advance(self, slots: IntArray, tokens: torch.Tensor) -> None:
        """Count one sampled token, still on the device, per slot; rows at their limit stop being active."""
        if self._drawn[0] is not slots:
            self._store_drawn()
        self._drawn = slots, tokens
        for part in self.sampling(slots).edited:
            part.edits.append(tokens)
        self.generated[slots] += 1
        below_limit = self.generated[self.active] < self.limits[self.active]
        if not below_limit.all():
            self.active = self.active[below_limit]

    def receive(
        self,
        slots: IntArray,
        positions: IntArray,
        tokens: IntArray,
        logprobs: Float32Array,
        sampler_logprobs: Float32Array,
        weight_version: int = 0,
    ) -> None:
        """Store the next token of each slot, at ``positions`` of its completion."""
        self._widen(tokens=int(positions.max(initial=-1)) + 1)
        # Flat indices, made once: numpy takes three times as long for pairs of them.
        at = slots * self._tokens.shape[1] + positions
        self._tokens.reshape(-1)[at] = tokens
        self._logprobs.reshape(-1)[at] = logprobs
        self._sampler_logprobs.reshape(-1)[at] = sampler_logprobs
        self._weight_versions.reshape(-1)[at] = weight_version
        self.received[slots] = positions + 1

    def end(self, slot: int) -> None:
        """Mark the row as finished with its last received token."""
        self.ended[slot] = True
        self.active = self.active[self.active != slot]

    def received_tokens(self, slot: int) -> IntArray:
        """Return the row's received tokens, as a view that is valid until the next token."""
        tokens: IntArray = self._tokens[slot, : self.received[slot]]
        return tokens

    def completion(self, slot: int, without_last: bool = False) -> Completion:
        """Return a copy of the row's tokens and their log-probabilities: all received but one drawn from none.

        With ``without_last``, the last token received since the row joined is left out as well.
        """
        received = int(self.received[slot])
        if self.no_token[slot] or (without_last and received > self._tokens_at_join[slot]):
            received -= 1
        return Completion(
            tokens=self._tokens[slot, :received].copy(),
            logprobs=self._logprobs[slot, :received].copy(),
            sampler_logprobs=self._sampler_logprobs[slot, :received].copy(),
            weight_versions=self._weight_versions[slot, :received].copy(),
        )

    def sampling(self, slots: IntArray) -> RowSampling:
        """Return the sampling parameters of ``slots``."""
        return self._sampling.of(slots)


def _wider(array: NDArray[_T], columns: int) -> NDArray[_T]:
    """Return the array with at least ``columns`` columns, the new ones 0; widths double."""
    if columns <= array.shape[1]:
        return array
    wider = np.zeros((array.shape[0], max(columns, 2 * array.shape[1])), array.dtype)
    wider[:, : array.shape[1]] = array
    return wider
