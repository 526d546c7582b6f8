"""A check at start that pages give the model's own numbers: what the probe cannot see must not pass silently."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from rollout.models.arrays import IntArray, uploaded
from rollout.models.errors import UnsupportedModel
from rollout.models.forward_batch import ForwardBatch
from rollout.models.kv_cache.layout import KVLayout
from rollout.models.kv_cache.page_pool import PagePool
from rollout.models.module.inspect import family_name, output_device, vocabulary_size
from rollout.models.runners.base import RunStrategy

#: Tokens of the sequences, which are computed side by side, and of each those that are computed after the
#: first prefill: first all but the last of these, then the last by itself.
_LENGTHS = (24, 17)
_LATER = (6, 4)
#: The same where contexts are computed whole: two decodes.
_LATER_WHOLE = (2, 2)
#: Largest distance of logits, relative to their size. A model whose state is not in pages is off by its whole
#: size; a mixture of experts in half precision can route a token differently.
_TOLERANCE = {torch.float32: 1e-2, torch.float64: 1e-2}
_HALF_TOLERANCE = 0.3


@dataclass(frozen=True, slots=True)
class _Trial:
    """One sequence: its tokens, its pages, and where its three forwards end."""

    ids: IntArray
    pages: IntArray
    ends: tuple[int, int, int]


def check_parity(tier: RunStrategy) -> None:
    """Compares two sequences, each in three forwards, with what the model gives by itself.

    Raises:
        UnsupportedModel: they differ by more than rounding.
    """
    model, layout = tier.model, tier.kv_layout()
    vocabulary = vocabulary_size(model)
    trials: list[_Trial] = []
    laters = _LATER_WHOLE if tier.whole_contexts else _LATER
    for number, (length, later) in enumerate(zip(_LENGTHS, laters, strict=True)):
        first = sum(len(trial.pages) for trial in trials)
        pages = np.arange(first, first + layout.pages_for(length))
        ids = np.arange(3, 3 + length) * (7 + 4 * number) % vocabulary
        trials.append(_Trial(ids, pages, (length - later, length - 1, length)))
    theirs = torch.stack([tier.reference_logits(trial.ids, trial.ends).float() for trial in trials], 1)
    ours = _logits_over_pages(tier, trials, layout)
    distance = float(((ours - theirs).norm(dim=(0, 2)) / theirs.norm(dim=(0, 2))).max())
    tolerance = _TOLERANCE.get(layout.dtype, _HALF_TOLERANCE)
    if not distance <= tolerance:
        raise UnsupportedModel(
            f"{family_name(model)} gives other logits over pages than in its own forward "
            f"(relative distance {distance:.2g}, at most {tolerance} is rounding)."
        )


def _logits_over_pages(tier: RunStrategy, trials: list[_Trial], layout: KVLayout) -> torch.Tensor:
    """[forwards, sequences, V] of the last token of each forward."""
    pages = sum(len(trial.pages) for trial in trials)
    pool = PagePool(layout, pages, output_device(tier.model), len(trials))
    states = np.zeros(0, np.int64)
    if pages:
        pool.grow()
    if layout.states:
        pool.states.grow()
        # Not in the order of the sequences, which would be right even if nobody looked at it.
        states = pool.states.allocate(len(trials))[::-1].copy()
    runner, logits = tier.runner(pool), []
    tables = np.zeros((len(trials), max(len(trial.pages) for trial in trials)), np.int64)
    for table, trial in zip(tables, trials, strict=True):
        table[: len(trial.pages)] = trial.pages
    starts = np.zeros(len(trials), np.int64)
    try:
        with tier.borrow():
            for ends in np.array([trial.ends for trial in trials]).T:
                ids = np.concatenate([t.ids[start:end] for t, start, end in zip(trials, starts, ends, strict=True)])
                packed = ForwardBatch(uploaded(ids, pool.device), tables, starts, ends - starts, states=states)
                # The next forward may overwrite them.
                logits.append(runner.forward(packed).float().clone())
                starts = ends
    finally:
        runner.close()
    return torch.stack(logits)
