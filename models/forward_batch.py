"""The batch of one forward: the new tokens of several sequences, concatenated."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from rollout.models.arrays import IntArray


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """S sequences with T new tokens in total: one token for each decoding row, several for a prefill."""

    tokens: torch.Tensor
    """[T] int64 on the model's device: the new tokens, sequence by sequence. The host may not know them yet."""
    page_tables: IntArray
    """[S, pages] page ids of each sequence, including pages for the new tokens; entries past its end are not read."""
    prefix_lens: IntArray
    """[S] tokens of each sequence whose keys and values are already in its pages."""
    query_lens: IntArray
    """[S] new tokens of each sequence, at least one."""
    states: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    """[S] page of each sequence's recurrent state; [0] if the model has none."""

    known_lens: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    """[S] known tokens of each sequence, including those of later prefill chunks; [0] if there are none."""

    logits_lens: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    """[S] last new tokens of each sequence whose logits are wanted; [0] if only each sequence's last token's are."""

    decode_lens: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    """[S] last new tokens of each sequence that are attended one by one, as in rows that decode; [0] if those are the
    only new tokens of their sequences. Kernels for one token and for several round differently, so a token that is
    computed again gets the same bits only in the way it was computed first."""

    @property
    def decodes(self) -> IntArray:
        """[S] last new tokens of each sequence that are attended one by one; the tokens before them are its prefill."""
        return self.decode_lens if len(self.decode_lens) else (self.query_lens == 1).astype(np.int64)

    @property
    def wanted_lens(self) -> IntArray:
        """[S] last new tokens of each sequence whose logits are wanted; K is their sum."""
        return self.logits_lens if len(self.logits_lens) else np.ones_like(self.query_lens)

    @property
    def wanted(self) -> IntArray:
        """[K] indices among the T new tokens of those whose logits are wanted."""
        if not len(self.logits_lens):
            return self.query_lens.cumsum() - 1
        return np.repeat(self.offsets + self.query_lens, self.wanted_lens) - countdown(self.wanted_lens)

    @property
    def full_lens(self) -> IntArray:
        """[S] known tokens of each sequence, including those of later prefill chunks."""
        return self.known_lens if len(self.known_lens) else self.seq_lens

    @property
    def seq_lens(self) -> IntArray:
        """[S] tokens of each sequence, including the new ones."""
        return self.prefix_lens + self.query_lens

    @property
    def offsets(self) -> IntArray:
        """[S] index of each sequence's first new token among the T."""
        return self.query_lens.cumsum() - self.query_lens

    @property
    def positions(self) -> IntArray:
        """[T] position of each new token in its sequence."""
        if len(self.tokens) == len(self.query_lens):
            return self.prefix_lens
        return np.arange(len(self.tokens)) + np.repeat(self.prefix_lens - self.offsets, self.query_lens)

    def slot_mapping(self, page_size: int) -> IntArray:
        """Return [T]: the slot of each new token's keys and values, ``page * page_size + offset in page``."""
        if len(self.tokens) == len(self.query_lens):
            pages = self.page_tables[np.arange(len(self.tokens)), self.prefix_lens // page_size]
            slots: IntArray = pages * page_size + self.prefix_lens % page_size
            return slots
        return token_slots(self.page_tables, self.prefix_lens, self.query_lens, page_size)


def countdown(counts: IntArray) -> IntArray:
    """Return ``[c, ..., 2, 1]`` for each ``c`` of ``counts`` [S], concatenated."""
    result: IntArray = np.repeat(np.cumsum(counts), counts) - np.arange(counts.sum())
    return result


def token_slots(page_tables: IntArray, first_positions: IntArray, counts: IntArray, page_size: int) -> IntArray:
    """Return the slots of ``counts`` [S] consecutive tokens of each sequence, sequence by sequence.

    Args:
        page_tables: [S, pages] page ids of each sequence.
        first_positions: [S] position of the first of these tokens in each sequence.
        counts: [S] tokens of each sequence.
        page_size: tokens per page.
    """
    sequences = np.repeat(np.arange(len(counts)), counts)
    offsets = np.cumsum(counts) - counts
    positions = np.arange(len(sequences)) + np.repeat(first_positions - offsets, counts)
    slots: IntArray = page_tables[sequences, positions // page_size] * page_size + positions % page_size
    return slots
