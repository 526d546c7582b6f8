"""The sampling parameters of the live batch: arrays with one entry per slot, and those of a step's rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from rollout.batcher.types import IntArray
from rollout.engine.batch_row import BatchRow, noise_key
from rollout.models.arrays import uploaded
from rollout.models.sampling.logit_edits import logit_edits
from rollout.models.sampling.sampler import EditedRows, RowSampling
from rollout.models.sampling.token_history import TokenHistory
from rollout.models.sampling.token_rules import TokenRules

_T = TypeVar("_T", bound=np.generic)


class SamplingArrays:
    """Sampling parameters by slot."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cached: RowSampling | None = None
        """Sampling parameters of `_cached_slots`."""
        self._cached_slots: IntArray = np.zeros(0, np.int64)
        # One entry per slot; `grow` lists all of them.
        self._temperature: NDArray[np.float32] = np.zeros(0, np.float32)
        self._top_k: IntArray = np.zeros(0, np.int64)
        self._top_p: NDArray[np.float32] = np.zeros(0, np.float32)
        self._min_p: NDArray[np.float32] = np.zeros(0, np.float32)
        self._keys: IntArray = np.zeros((0, 2), np.int64)
        self._samples: IntArray = np.zeros(0, np.int64)
        self._rules: list[TokenRules | None] = []
        self._ruled: NDArray[np.bool_] = np.zeros(0, np.bool_)
        """Whether the row has token rules."""
        self._history = TokenHistory(device)
        self._history_rows: IntArray = np.zeros(0, np.int64)
        """Row of the history, where the row's rules need one."""

    def set(self, slot: int, row: BatchRow) -> None:
        """Store the parameters of the row that joins in ``slot``."""
        params = row.request.params
        self._temperature[slot] = params.temperature
        self._top_k[slot] = params.top_k
        self._top_p[slot] = params.top_p
        self._min_p[slot] = params.min_p
        self._keys[slot] = noise_key(row.request.seed, row.request.row_id)
        self._samples[slot] = row.sample
        self._rules[slot] = row.rules
        self._ruled[slot] = row.rules is not None
        if row.rules is not None and row.rules.needs_history:
            self._history_rows[slot] = self._history.add(row.rules, row.group.prompt_ids, row.completion.tokens)
        self._cached = None

    def clear(self, slot: int) -> None:
        """Forget the history of the row that leaves ``slot``."""
        rules, self._rules[slot] = self._rules[slot], None
        if rules is not None and rules.needs_history:
            self._history.remove(int(self._history_rows[slot]))

    def grow(self, slots: int) -> None:
        """Make room for so many slots."""
        self._rules.extend([None] * (slots - len(self._rules)))
        self._temperature = longer(self._temperature, slots)
        self._top_k = longer(self._top_k, slots)
        self._top_p = longer(self._top_p, slots)
        self._min_p = longer(self._min_p, slots)
        self._keys = longer(self._keys, slots)
        self._samples = longer(self._samples, slots)
        self._ruled = longer(self._ruled, slots)
        self._history_rows = longer(self._history_rows, slots)

    def of(self, slots: IntArray) -> RowSampling:
        """Return the sampling parameters of ``slots``, cached until the slots change."""
        if self._cached is None or not (self._cached_slots is slots or np.array_equal(self._cached_slots, slots)):
            self._cached = self._make_sampling(slots)
        self._cached_slots = slots  # the same array next time, which needs no comparison
        return self._cached

    def _make_sampling(self, slots: IntArray) -> RowSampling:
        ruled = self._ruled[slots]
        if not ruled.any():
            return self._parameters(slots)
        edits = logit_edits(
            [self._rules[slot] for slot in slots.tolist()], self._history, self._history_rows[slots], self._device
        )
        edited = [EditedRows(edits=part, rows=self._parameters(slots[part.members])) for part in edits]
        return replace(self._parameters(slots, slots[~ruled]), edited=tuple(edited))

    def _parameters(self, slots: IntArray, flagged: IntArray | None = None) -> RowSampling:
        """Return the parameters of ``slots``; those of ``flagged``, by default all, set the flags."""
        flagged = slots if flagged is None else flagged

        def tensor(array: NDArray[Any]) -> torch.Tensor:
            return uploaded(array[slots], self._device)

        return RowSampling(
            temperature=tensor(self._temperature),
            top_k=tensor(self._top_k),
            top_p=tensor(self._top_p),
            min_p=tensor(self._min_p),
            keys=tensor(self._keys),
            samples=tensor(self._samples),
            most_top_k=int(self._top_k[flagged].max(initial=0)),
            any_top_p=bool((self._top_p[flagged] < 1).any()),
            any_min_p=bool((self._min_p[flagged] > 0).any()),
        )


def longer(array: NDArray[_T], length: int) -> NDArray[_T]:
    """Return a copy with ``length`` entries, the new ones 0."""
    longer = np.zeros((length, *array.shape[1:]), array.dtype)
    longer[: len(array)] = array
    return longer
