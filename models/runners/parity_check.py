"""Check at start-up that a strategy reproduces the model's own logits, to catch what the probe cannot see."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch

from rollout.models.arrays import IntArray, uploaded
from rollout.models.errors import UnsupportedModel
from rollout.models.forward_batch import ForwardBatch
from rollout.models.kv_cache.layout import KVLayout
from rollout.models.kv_cache.page_pool import PagePool
from rollout.models.module.inspect import context_limit, family_name, output_device, unwrap_model, vocabulary_size
from rollout.models.runners.base import RunStrategy

#: Tokens of each of the two sequences of the check, which run side by side.
_LENGTHS = (24, 17)
#: Tokens of each sequence that run after its first prefill: all but the last as a second prefill, then the last alone.
_LATER_TOKENS = (6, 4)
#: The same for strategies that prefill whole contexts: two decodes.
_LATER_TOKENS_WHOLE_CONTEXT = (2, 2)
#: Largest distance of the logits, relative to their norm. A model with state outside the pages is off by its whole
#: norm; a mixture of experts in half precision can route a token differently.
_TOLERANCE = {torch.float32: 1e-2, torch.float64: 1e-2}
_HALF_TOLERANCE = 0.3
#: Tokens of the sequence that is computed again: kernels that split the keys of one token make several splits.
_DECODED_LENGTH = 600
#: Sequences beside the one that `check_invariance` compares: 17 rows of a decode, 306 tokens of a prefill.
_COMPANY = 17


@dataclass(frozen=True, slots=True)
class _Sequence:
    """One sequence of the check."""

    ids: IntArray
    """[tokens] token ids."""
    pages: IntArray
    """[pages] page ids."""
    ends: tuple[int, ...]
    """Tokens computed after each of its forwards."""


def check_parity(
    strategy: RunStrategy,
    layout: KVLayout | None = None,
    applied: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> None:
    """Compare two sequences, each in three forwards, with the model's own logits.

    Args:
        strategy: how the model is run.
        layout: what the strategy has probed; None: probe now.
        applied: patches to run the forwards with; the model's own logits are computed without.

    Raises:
        UnsupportedModel: they differ by more than rounding.
    """
    model = strategy.model
    layout = layout or strategy.kv_layout()
    sequences = _sequences(layout, vocabulary_size(model), strategy.prefills_whole_context)
    expected = torch.stack([strategy.reference_logits(s.ids, s.ends).float() for s in sequences], 1)
    found = _paged_logits(strategy, sequences, layout, applied)
    distance = float(((found - expected).norm(dim=(0, 2)) / expected.norm(dim=(0, 2))).max())
    tolerance = _TOLERANCE.get(layout.dtype, _HALF_TOLERANCE)
    if not distance <= tolerance:
        raise UnsupportedModel(
            f"{family_name(model)} gives other logits over pages than in its own forward "
            f"(relative distance {distance:.2g}, at most {tolerance} is rounding)."
        )


def check_invariance(
    strategy: RunStrategy,
    layout: KVLayout,
    applied: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> None:
    """Compare the logits of one sequence alone, in company, and computed again after it was decoded, bit for bit.

    Args:
        strategy, layout, applied: as in `check_parity`.

    Raises:
        UnsupportedModel: they differ.
    """
    model = strategy.model
    sequences = _sequences(layout, vocabulary_size(model), strategy.prefills_whole_context, company=_COMPANY)
    alone, together = (_paged_logits(strategy, some, layout, applied)[:, 0] for some in (sequences[:1], sequences))
    if not torch.equal(alone, together):
        distance = float((alone - together).abs().max())
        raise UnsupportedModel(
            f"batch_invariant=true was requested, but logits of {family_name(model)} in {layout.dtype} on "
            f"{output_device(model)} depend on the other rows of a step (by up to {distance:.2g})."
        )
    if strategy.prefills_whole_context:  # no such row is preempted
        return
    end = min(_DECODED_LENGTH, context_limit(unwrap_model(model).config) or _DECODED_LENGTH)
    row = _sequence(end, 0, layout, vocabulary_size(model))
    stepwise = replace(row, ends=tuple(range(end - _LATER_TOKENS[0], end + 1)))
    decoded = _paged_logits(strategy, [stepwise], layout, applied)[-1, 0]
    whole = replace(row, ends=(end,))
    again = _paged_logits(strategy, [whole], layout, applied, decode_lens=np.array(_LATER_TOKENS[:1]))[-1, 0]
    if not torch.equal(decoded, again):
        distance = float((decoded - again).abs().max())
        raise UnsupportedModel(
            f"batch_invariant=true was requested, but logits of {family_name(model)} in {layout.dtype} on "
            f"{output_device(model)} depend on how tokens are divided over steps (by up to {distance:.2g})."
        )


def _sequences(layout: KVLayout, vocabulary: int, prefills_whole_context: bool, company: int = 1) -> list[_Sequence]:
    """Build the sequences of a check, with consecutive pages: the first, and so many of the other."""
    sequences = []
    first_page = 0
    later_tokens = _LATER_TOKENS_WHOLE_CONTEXT if prefills_whole_context else _LATER_TOKENS
    kinds = list(zip(_LENGTHS, later_tokens, strict=True))
    for number, (length, later) in enumerate(kinds[:1] + kinds[1:] * company):
        sequence = _sequence(length, number, layout, vocabulary, first_page)
        sequences.append(replace(sequence, ends=(length - later, length - 1, length)))
        first_page += len(sequence.pages)
    return sequences


def _sequence(length: int, number: int, layout: KVLayout, vocabulary: int, first_page: int = 0) -> _Sequence:
    """Return a sequence that runs in one forward, with consecutive pages."""
    pages = np.arange(first_page, first_page + layout.pages_for(length))
    return _Sequence(ids=np.arange(3, 3 + length) * (7 + 4 * number) % vocabulary, pages=pages, ends=(length,))


def _paged_logits(
    strategy: RunStrategy,
    sequences: list[_Sequence],
    layout: KVLayout,
    applied: Callable[[], AbstractContextManager[None]],
    decode_lens: IntArray | None = None,
) -> torch.Tensor:
    """Return logits [forwards, sequences, V] of the last token of each forward; see `ForwardBatch.decode_lens`."""
    pages = sum(len(sequence.pages) for sequence in sequences)
    pool = PagePool(layout, pages, output_device(strategy.model), len(sequences))
    states = np.zeros(0, np.int64)
    if pages:
        pool.grow()
    if layout.states:
        pool.states.grow()
        # In reverse, so that a runner that ignores the state indices fails the check.
        states = pool.states.allocate(len(sequences))[::-1].copy()
    tables = np.zeros((len(sequences), max(len(sequence.pages) for sequence in sequences)), np.int64)
    for table, sequence in zip(tables, sequences, strict=True):
        table[: len(sequence.pages)] = sequence.pages
    runner = strategy.runner(pool)
    logits = []
    starts = np.zeros(len(sequences), np.int64)
    try:
        with strategy.borrow(), applied():
            for ends in np.array([sequence.ends for sequence in sequences]).T:
                ids = [s.ids[start:end] for s, start, end in zip(sequences, starts, ends, strict=True)]
                batch = ForwardBatch(
                    tokens=uploaded(np.concatenate(ids), pool.device),
                    page_tables=tables,
                    prefix_lens=starts,
                    query_lens=ends - starts,
                    states=states,
                    decode_lens=np.zeros(0, np.int64) if decode_lens is None else decode_lens,
                )
                # The next forward may overwrite the logits.
                logits.append(runner.forward(batch).float().clone())
                starts = ends
    finally:
        runner.close()
    return torch.stack(logits)
