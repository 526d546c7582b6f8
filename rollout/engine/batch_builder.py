"""Build the forward batch of a step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rollout.batcher.types import IntArray
from rollout.engine.batch_row import PrefillChunk
from rollout.engine.live_batch import LiveBatch
from rollout.models.arrays import uploaded
from rollout.models.forward_batch import ForwardBatch
from rollout.models.kv_cache.layout import KVLayout

_NONE: IntArray = np.zeros(0, np.int64)


def build_forward_batch(
    live: LiveBatch, slots: IntArray, chunks: Sequence[PrefillChunk], layout: KVLayout
) -> ForwardBatch | None:
    """Build the step's forward batch: one token per slot, then the prefill chunks. None if empty."""
    rows = len(slots)
    if not chunks:
        return _decoding(live, slots) if rows else None
    chunk_pages = [prefill.pages[: layout.pages_for(prefill.computed + tokens)] for prefill, tokens in chunks]
    decode_width = int(live.page_counts[slots].max(initial=0))
    page_tables = np.zeros((rows + len(chunks), max([decode_width, *map(len, chunk_pages)])), np.int64)
    page_tables[:rows, :decode_width] = live.page_tables[slots, :decode_width]
    for table, pages in zip(page_tables[rows:], chunk_pages, strict=True):
        table[: len(pages)] = pages
    tokens = live.last_tokens(slots)
    chunk_ids = [chunk.prefill.context[chunk.prefill.computed :][: chunk.tokens] for chunk in chunks]
    tokens = torch.cat([tokens, uploaded(np.concatenate(chunk_ids), tokens.device)])
    lengths = live.lengths(slots)
    computed = np.array([chunk.prefill.computed for chunk in chunks], np.int64)
    chunk_tokens = np.array([chunk.tokens for chunk in chunks], np.int64)
    contexts = np.array([len(chunk.prefill.context) for chunk in chunks], np.int64)
    return ForwardBatch(
        tokens=tokens,
        page_tables=page_tables,
        prefix_lens=np.concatenate([lengths - 1, computed]),
        query_lens=np.concatenate([np.ones(rows, np.int64), chunk_tokens]),
        known_lens=np.concatenate([lengths, contexts]),
        decode_lens=_decode_lens(rows, chunks) if layout.decodes_apart else _NONE,
        states=np.concatenate([live.states[slots].ravel(), *(chunk.prefill.states[:1] for chunk in chunks)]),
    )


def _decode_lens(rows: int, chunks: Sequence[PrefillChunk]) -> IntArray:
    """Return [S] the generated tokens of each sequence: one of each row, and those that chunks compute again."""
    ends = [prefill.computed + tokens - len(prefill.group.prompt_ids) for prefill, tokens in chunks]
    generated = [min(max(0, end), chunk.tokens) for end, chunk in zip(ends, chunks, strict=True)]
    return np.array([1] * rows + generated, np.int64)


def _decoding(live: LiveBatch, slots: IntArray) -> ForwardBatch:
    """Build the batch of a step that only decodes: most steps do."""
    lengths = live.lengths(slots)
    return ForwardBatch(
        tokens=live.last_tokens(slots),
        page_tables=live.page_tables[slots, : int(live.page_counts[slots].max())],
        prefix_lens=lengths - 1,
        query_lens=np.ones(len(slots), np.int64),
        known_lens=lengths,
        states=live.states[slots].ravel(),
    )
