"""What one forward computes: the next tokens of several sequences, packed one after another."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from rollout.models.arrays import IntArray


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """S sequences with T new tokens in all: one token for each row that decodes, several for a prompt that prefills."""

    tokens: torch.Tensor
    """[T] int64 on the model's device: the new tokens, sequence after sequence. The host may not know them yet."""
    page_tables: IntArray
    """[S, pages] page ids of each sequence, those to be written included; entries past its end are not read."""
    prefix_lens: IntArray
    """[S] tokens of each sequence whose keys and values are already in its pages."""
    query_lens: IntArray
    """[S] new tokens of each sequence, at least one."""
    states: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    """[S] page of each sequence's recurrent state; [0] in models without."""

    known_lens: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    """[S] known tokens of each sequence, those left for a later forward included; [0] if none is left."""

    @property
    def full_lens(self) -> IntArray:
        """[S] known tokens of each sequence, those left for a later forward included."""
        return self.known_lens if len(self.known_lens) else self.seq_lens

    @property
    def seq_lens(self) -> IntArray:
        """[S] tokens of each sequence, the new ones included."""
        return self.prefix_lens + self.query_lens

    @property
    def offsets(self) -> IntArray:
        """[S] where each sequence's new tokens begin among the T."""
        return np.cumsum(self.query_lens) - self.query_lens

    @property
    def positions(self) -> IntArray:
        """[T] the position of each new token in its sequence."""
        return np.arange(len(self.tokens)) + np.repeat(self.prefix_lens - self.offsets, self.query_lens)

    def slot_mapping(self, page_size: int) -> IntArray:
        """[T] where each new token's keys and values go: ``page * page_size + place in page``."""
        positions = self.positions
        rows = np.repeat(np.arange(len(self.query_lens)), self.query_lens)
        slots: IntArray = self.page_tables[rows, positions // page_size] * page_size + positions % page_size
        return slots
