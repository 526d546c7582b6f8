"""The tokens that penalties and bad words look back on, kept on the device for the rows that need them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from rollout.models.arrays import IntArray, next_power_of_2, uploaded
from rollout.models.sampling.token_rules import TokenRules

_GROWTH = 16


class TokenHistory:
    """Token ids [rows, width] and how often the completion has each; a row is taken only where rules look back.

    A row holds the distinct tokens of the prompt (for a repetition penalty), the prompt's last tokens in order (for bad
    words), and the completion. Equal ids of a row always have equal counts, and padding repeats the row's first id.
    So an update may write all entries of a row, in any order, and gives the same result for any width.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.ids = torch.zeros((0, _GROWTH), dtype=torch.int64, device=device)
        self.counts = torch.zeros((0, _GROWTH), dtype=torch.float32, device=device)
        """Occurrences in the completion."""
        self.lengths: IntArray = np.zeros(0, np.int64)
        """[rows] entries of each row; 0 where the row is free."""
        self.ordered: IntArray = np.zeros(0, np.int64)
        """[rows] index of the first entry that stands in the order of the text."""
        self.outputs: IntArray = np.zeros(0, np.int64)
        """[rows] index of the first token of the completion."""
        self._free: list[int] = []

    @property
    def width(self) -> int:
        """Entries of the longest row."""
        return int(self.lengths.max(initial=0))

    def add(self, rules: TokenRules, prompt: IntArray, completion: IntArray) -> int:
        """Take a row for a prompt and the tokens that follow it so far; return its number."""
        distinct = np.unique(prompt) if rules.repetition_penalty != 1 else prompt[:0]
        tail = prompt[max(0, len(prompt) - rules.prefixes.shape[1]) :]
        entries = np.concatenate([distinct, tail, completion])
        self._reserve(len(entries) + 1)
        row = self._free.pop()
        self.lengths[row] = len(entries)
        self.ordered[row] = len(distinct)
        self.outputs[row] = len(distinct) + len(tail)
        padded = np.full(self.ids.shape[1], entries[0] if len(entries) else 0, np.int64)
        padded[: len(entries)] = entries
        self.ids[row] = uploaded(padded, self._device)
        self.counts[row] = uploaded(_occurrences(padded, completion), self._device)
        return row

    def remove(self, row: int) -> None:
        """Free a row."""
        self.lengths[row] = 0
        self._free.append(row)

    def append(self, rows: IntArray, on_device: torch.Tensor, tokens: torch.Tensor, counted: bool) -> None:
        """Append one token to each row, without waiting for the device.

        Args:
            rows: [p] numbers of the rows.
            on_device: [p] the same on the device.
            tokens: [p] int64 on the device.
            counted: whether the rows' rules need the counts.
        """
        self._reserve_width(int(self.lengths[rows].max()) + 1)
        ends = uploaded(self.lengths[rows], self._device)
        self.lengths[rows] += 1
        self.ids[on_device, ends] = tokens
        if not counted:
            return
        entries = self.ids[on_device]
        at = torch.arange(entries.shape[1], device=self._device)
        equal = entries == tokens[:, None]
        inside = (at >= uploaded(self.outputs[rows], self._device)[:, None]) & (at <= ends[:, None])
        total = (equal & inside).sum(1, keepdim=True, dtype=torch.float32)
        self.counts[on_device] = torch.where(equal, total, self.counts[on_device])

    def _reserve(self, width: int) -> None:
        """Make room for one more row and for ``width`` entries."""
        self._reserve_width(width)
        if self._free:
            return
        old = len(self.lengths)
        new = max(_GROWTH, 2 * old)
        self.ids = torch.cat([self.ids, self.ids.new_zeros((new - old, self.ids.shape[1]))])
        self.counts = torch.cat([self.counts, self.counts.new_zeros((new - old, self.counts.shape[1]))])
        added = np.zeros(new - old, np.int64)
        self.lengths = np.concatenate([self.lengths, added])
        self.ordered = np.concatenate([self.ordered, added])
        self.outputs = np.concatenate([self.outputs, added])
        self._free.extend(range(new - 1, old - 1, -1))

    def _reserve_width(self, width: int) -> None:
        have = self.ids.shape[1]
        if width > have:
            more = next_power_of_2(width) - have
            # The first entry of a row continues it: padding must repeat an id of the row, with its count.
            self.ids = torch.cat([self.ids, self.ids[:, :1].expand(-1, more)], 1)
            self.counts = torch.cat([self.counts, self.counts[:, :1].expand(-1, more)], 1)


def _occurrences(entries: IntArray, completion: IntArray) -> NDArray[np.float32]:
    """Return, as float32, how often the completion has each of ``entries``."""
    found, counts = np.unique(completion, return_counts=True)
    if not len(found):
        return np.zeros(len(entries), np.float32)
    at = np.searchsorted(found, entries).clip(max=len(found) - 1)
    return np.where(found[at] == entries, counts[at], 0).astype(np.float32)
