"""What one forward computes: the next tokens of several sequences, packed one after another."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from rollout.models.arrays import IntArray


@dataclass(frozen=True, slots=True)
class Packed:
    """S sequences with T new tokens in all: rows that decode have one each, prompts that are prefilled more."""

    tokens: torch.Tensor
    """[T] int64 on the model's device: the new tokens, sequence after sequence. The host may not know them yet."""
    tables: IntArray
    """[S, pages] pages of each sequence, those to be written included; entries past its end are not read."""
    starts: IntArray
    """[S] tokens of each sequence whose keys and values its pages hold already."""
    lengths: IntArray
    """[S] new tokens of each sequence, at least one."""
    states: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    """[S] page of each sequence's recurrent state; [0] in models without."""

    texts: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    """[S] known tokens of each sequence, also those that this forward leaves for later; [0] where it leaves none."""

    @property
    def text_lengths(self) -> IntArray:
        """[S] known tokens of each sequence."""
        return self.texts if len(self.texts) else self.ends

    @property
    def ends(self) -> IntArray:
        """[S] tokens of each sequence, the new ones included."""
        return self.starts + self.lengths

    @property
    def offsets(self) -> IntArray:
        """[S] where each sequence's new tokens begin among the T."""
        return np.cumsum(self.lengths) - self.lengths

    @property
    def positions(self) -> IntArray:
        """[T] the place of each new token in its sequence."""
        return np.arange(len(self.tokens)) + np.repeat(self.starts - self.offsets, self.lengths)

    def slots(self, page_size: int) -> IntArray:
        """[T] where each new token's keys and values go: ``page * page_size + place in page``."""
        positions = self.positions
        rows = np.repeat(np.arange(len(self.lengths)), self.lengths)
        slots: IntArray = self.tables[rows, positions // page_size] * page_size + positions % page_size
        return slots
