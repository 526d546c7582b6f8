"""The live batch: one slot for each row that decodes, as arrays, so that a step costs no Python per row."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from rollout.batcher.types import IntArray
from rollout.engine.batch_row import BatchRow, Completion, Float32Array, noise_key
from rollout.models.arrays import uploaded
from rollout.models.sampling.sampler import RowSampling

_GROWTH = 16
_NO_STATE: IntArray = np.zeros(0, np.int64)
_T = TypeVar("_T", bound=np.generic)


class LiveBatch:
    """Rows that decode, oldest first. Arrays are indexed by slot.

    Tokens may be drawn ahead of what the host has of them: ``generated`` counts those drawn, ``arrived`` those whose
    values are here. A row that has ended keeps its slot, and what it holds, until all that was drawn for it is here.
    """

    def __init__(self, page_size: int, device: torch.device, states_per_row: int = 0) -> None:
        self._page_size = page_size
        self._device = device
        self._rows: list[BatchRow | None] = []
        self._free: list[int] = []
        self._sampling: RowSampling | None = None
        self._sampled: IntArray = np.zeros(0, np.int64)
        """The slots that this is of."""
        self.active: IntArray = np.zeros(0, np.int64)
        """Slots of the rows that go on."""
        self.held: IntArray = np.zeros(0, np.int64)
        """Slots in use: those, and of rows that have ended."""
        self.tables: IntArray = np.zeros((0, _GROWTH), np.int64)
        """[slots, pages] page ids."""
        self.page_counts: IntArray = np.zeros(0, np.int64)
        self.states: IntArray = np.zeros((0, states_per_row), np.int64)
        """[slots, 1] page of each row's recurrent state; [slots, 0] in models without."""
        self.prompt_lengths: IntArray = np.zeros(0, np.int64)
        self.generated: IntArray = np.zeros(0, np.int64)
        self.arrived: IntArray = np.zeros(0, np.int64)
        self.limits: IntArray = np.zeros(0, np.int64)
        self.ends_at_limit: NDArray[np.bool_] = np.zeros(0, np.bool_)
        self.groups: IntArray = np.zeros(0, np.int64)
        """The number of each row's group."""
        self.ignore_eos: NDArray[np.bool_] = np.zeros(0, np.bool_)
        self.has_stops: NDArray[np.bool_] = np.zeros(0, np.bool_)
        """Whether the row has stop strings or stop ids of its own."""
        self.over: NDArray[np.bool_] = np.zeros(0, np.bool_)
        """Whether the row ended with a token that is here; what was drawn after that is nothing of its."""
        self.broken: NDArray[np.bool_] = np.zeros(0, np.bool_)
        """Whether any number drawn for the row was not finite."""
        self._joined_with: IntArray = np.zeros(0, np.int64)
        self._temperature: NDArray[np.float32] = np.zeros(0, np.float32)
        self._top_k: IntArray = np.zeros(0, np.int64)
        self._top_p: NDArray[np.float32] = np.zeros(0, np.float32)
        self._min_p: NDArray[np.float32] = np.zeros(0, np.float32)
        self._keys: IntArray = np.zeros((0, 2), np.int64)
        self._samples: IntArray = np.zeros(0, np.int64)
        self._last = torch.zeros(0, dtype=torch.int64, device=device)
        """[slots] the token drawn last."""
        self._tokens: IntArray = np.zeros((0, _GROWTH), np.int64)
        self._logprobs: NDArray[np.float32] = np.zeros((0, _GROWTH), np.float32)
        self._sampler_logprobs: NDArray[np.float32] = np.zeros((0, _GROWTH), np.float32)

    def __len__(self) -> int:
        return len(self.active)

    def row(self, slot: int) -> BatchRow:
        """The row in ``slot``."""
        row = self._rows[slot]
        assert row is not None, f"slot {slot} is free"
        return row

    def lengths(self, slots: IntArray) -> IntArray:
        """[slots] tokens drawn of each row, with its prompt; the last one is not in its pages yet."""
        lengths: IntArray = self.prompt_lengths[slots] + self.generated[slots]
        return lengths

    def last_tokens(self, slots: IntArray) -> torch.Tensor:
        """[slots] int64 on the device: the token that each row decodes from."""
        return self._last[uploaded(slots, self._device)]

    def pages(self, slot: int) -> IntArray:
        """The pages that a row holds, in order."""
        pages: IntArray = self.tables[slot, : self.page_counts[slot]]
        return pages

    def all_rows(self) -> list[BatchRow]:
        """The rows in all slots, oldest first."""
        return [self.row(slot) for slot in self.held.tolist()]

    def all_pages(self) -> list[IntArray]:
        """The pages of every row, as views that may be rewritten."""
        return [self.pages(slot) for slot in self.held.tolist()]

    def all_states(self) -> list[IntArray]:
        """The same for the pages of recurrent states."""
        return [self.states[slot] for slot in self.held.tolist()]

    # -- coming and going ----------------------------------------------------------------------------

    def add(self, row: BatchRow, pages: IntArray, state: IntArray = _NO_STATE) -> int:
        """Gives ``row`` a slot; it goes on after the tokens of ``row.completion``."""
        if not self._free:
            self._grow_slots()
        slot = self._free.pop()
        done = len(row.completion)
        self._widen(len(pages), done + 1)
        self._rows[slot] = row
        self.tables[slot, : len(pages)] = pages
        self.page_counts[slot] = len(pages)
        self.states[slot] = state
        self.prompt_lengths[slot] = len(row.group.prompt_ids)
        self.generated[slot] = self.arrived[slot] = done
        self.over[slot] = self.broken[slot] = False
        self._joined_with[slot] = done
        self.limits[slot] = row.limit
        self.ends_at_limit[slot], self.groups[slot] = row.ends_at_limit, row.group.number
        params = row.request.params
        self.ignore_eos[slot] = params.ignore_eos
        self.has_stops[slot] = bool(params.stop or params.stop_token_ids)
        self._temperature[slot] = params.temperature
        self._top_k[slot], self._top_p[slot], self._min_p[slot] = params.top_k, params.top_p, params.min_p
        self._keys[slot] = noise_key(row.request.seed, row.request.row_id)
        self._samples[slot] = row.sample
        self._tokens[slot, :done] = row.completion.tokens
        self._logprobs[slot, :done] = row.completion.logprobs
        self._sampler_logprobs[slot, :done] = row.completion.sampler_logprobs
        self.active, self.held = np.append(self.active, slot), np.append(self.held, slot)
        self._sampling = None
        return slot

    def remove(self, slot: int) -> None:
        """Frees a slot; the caller has released its pages."""
        self._go_on_with(self.active != slot)
        self.held = self.held[self.held != slot]
        self._rows[slot] = None
        self.tables[slot] = 0
        self._free.append(slot)

    def _grow_slots(self) -> None:
        old = len(self._rows)
        new = max(_GROWTH, 2 * old)
        self._rows.extend([None] * (new - old))
        self._free.extend(range(new - 1, old - 1, -1))
        for name, array in list(vars(self).items()):
            if isinstance(array, np.ndarray) and name not in ("active", "held", "_sampled"):
                grown = np.zeros((new, *array.shape[1:]), array.dtype)
                grown[:old] = array
                setattr(self, name, grown)
        self._last = torch.cat([self._last, self._last.new_zeros(new - old)])

    def _widen(self, pages: int, tokens: int) -> None:
        """Makes room for so many pages and tokens a row."""
        self.tables = _widened(self.tables, pages)
        self._tokens = _widened(self._tokens, tokens)
        self._logprobs = _widened(self._logprobs, tokens)
        self._sampler_logprobs = _widened(self._sampler_logprobs, tokens)

    # -- a step --------------------------------------------------------------------------------------

    def without_page(self, slots: IntArray) -> IntArray:
        """Those of ``slots`` whose next token needs a page that they do not hold."""
        lacking: IntArray = slots[self.page_counts[slots] * self._page_size < self.lengths(slots)]
        return lacking

    def without_token(self) -> IntArray:
        """Slots of rows whose first token since they joined was not drawn yet."""
        slots: IntArray = self.active[self.generated[self.active] == self._joined_with[self.active]]
        return slots

    def give_pages(self, slots: IntArray, pages: IntArray) -> None:
        """One more page for each of ``slots``."""
        self._widen(int(self.page_counts[slots].max()) + 1, 0)
        self.tables[slots, self.page_counts[slots]] = pages
        self.page_counts[slots] += 1

    def advance(self, slots: IntArray, tokens: torch.Tensor) -> None:
        """One more token, on the device, was drawn for each of ``slots``; rows that have all they may have end."""
        self._last[uploaded(slots, self._device)] = tokens
        self.generated[slots] += 1
        going_on = self.generated[self.active] < self.limits[self.active]
        if not going_on.all():
            self._go_on_with(going_on)

    def receive(
        self, slots: IntArray, positions: IntArray, tokens: IntArray, logprobs: Float32Array, sampler: Float32Array
    ) -> None:
        """The next token of each of ``slots`` is here, the one at ``positions`` of its completion."""
        self._widen(0, int(positions.max(initial=-1)) + 1)
        self._tokens[slots, positions] = tokens
        self._logprobs[slots, positions] = logprobs
        self._sampler_logprobs[slots, positions] = sampler
        self.arrived[slots] = positions + 1

    def end(self, slot: int) -> None:
        """The row has ended with its last token that is here."""
        self.over[slot] = True
        self._go_on_with(self.active != slot)

    def _go_on_with(self, some: NDArray[np.bool_]) -> None:
        """Takes the others out of ``active``."""
        self.active = self.active[some]

    def completed(self, slot: int) -> IntArray:
        """The tokens of the row that are here, as a view that the next one may leave behind."""
        tokens: IntArray = self._tokens[slot, : self.arrived[slot]]
        return tokens

    def completion(self, slot: int) -> Completion:
        """All of the row that is here, copied."""
        done = (slot, slice(0, int(self.arrived[slot])))
        return Completion(self._tokens[done].copy(), self._logprobs[done].copy(), self._sampler_logprobs[done].copy())

    def sampling(self, slots: IntArray) -> RowSampling:
        """Sampling parameters of the rows in ``slots``, kept until those are others."""
        if self._sampling is None or not np.array_equal(self._sampled, slots):
            self._sampling, self._sampled = self._make_sampling(slots), slots
        return self._sampling

    def _make_sampling(self, slots: IntArray) -> RowSampling:
        def tensor(array: NDArray[Any]) -> torch.Tensor:
            return uploaded(array[slots], self._device)

        return RowSampling(
            temperature=tensor(self._temperature),
            top_k=tensor(self._top_k),
            top_p=tensor(self._top_p),
            min_p=tensor(self._min_p),
            keys=tensor(self._keys),
            samples=tensor(self._samples),
            most_top_k=int(self._top_k[slots].max()),
            any_top_p=bool((self._top_p[slots] < 1).any()),
            any_min_p=bool((self._min_p[slots] > 0).any()),
            any_greedy=bool((self._temperature[slots] == 0).any()),
        )


def _widened(array: NDArray[_T], columns: int) -> NDArray[_T]:
    if columns <= array.shape[1]:
        return array
    wider = np.zeros((array.shape[0], max(columns, 2 * array.shape[1])), array.dtype)
    wider[:, : array.shape[1]] = array
    return wider
