"""A check at start that pages give the model's own numbers: what the probe cannot see must not pass silently."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from rollout.models.errors import UnsupportedModel
from rollout.models.layout import IntArray
from rollout.models.loan import Loan, family_name, unwrap, vocabulary_size
from rollout.models.packed import Packed
from rollout.models.pages import PagePool
from rollout.models.tier import Tier

#: Tokens of the sequences, which are computed side by side, and of each those that are computed after the
#: first prefill: first all but the last of these, then the last by itself.
_LENGTHS = (24, 17)
_LATER = (6, 4)
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


def check_pages(tier: Tier) -> None:
    """Compares two sequences, each in two prefills and a decode, with forwards of the model's own attention.

    Raises:
        UnsupportedModel: they differ by more than rounding.
    """
    model, layout = tier.model, tier.probe()
    vocabulary = vocabulary_size(model)
    trials: list[_Trial] = []
    for number, (length, later) in enumerate(zip(_LENGTHS, _LATER, strict=True)):
        first = sum(len(trial.pages) for trial in trials)
        pages = np.arange(first, first + -(-length // layout.page_size))
        ids = np.arange(3, 3 + length) * (7 + 4 * number) % vocabulary
        trials.append(_Trial(ids, pages, (length - later, length - 1, length)))
    theirs = _own_logits(tier, trials)
    ours = _logits_over_pages(tier, trials, PagePool(layout, trials[-1].pages[-1] + 1, unwrap(model).device))
    distance = float(((ours - theirs).norm(dim=(0, 2)) / theirs.norm(dim=(0, 2))).max())
    tolerance = _TOLERANCE.get(layout.dtype, _HALF_TOLERANCE)
    if not distance <= tolerance:
        raise UnsupportedModel(
            f"{family_name(model)} gives other logits over pages than in its own forward "
            f"(relative distance {distance:.2g}, at most {tolerance} is rounding)."
        )


def _own_logits(tier: Tier, trials: list[_Trial]) -> torch.Tensor:
    """[forwards, sequences, V] of the last token of each forward."""
    device, own = unwrap(tier.model).device, []
    with Loan(tier.model)():
        for trial in trials:
            logits = tier.model(input_ids=torch.from_numpy(trial.ids[None]).to(device), use_cache=False).logits[0]
            own.append(logits[[end - 1 for end in trial.ends]].float())
    return torch.stack(own, 1)


def _logits_over_pages(tier: Tier, trials: list[_Trial], pool: PagePool) -> torch.Tensor:
    """The same over pages of ``pool``."""
    pool.grow()
    runner, logits = tier.runner(pool), []
    tables = np.zeros((len(trials), max(len(trial.pages) for trial in trials)), np.int64)
    for table, trial in zip(tables, trials, strict=True):
        table[: len(trial.pages)] = trial.pages
    starts = np.zeros(len(trials), np.int64)
    with tier.on_loan():
        for ends in np.array([trial.ends for trial in trials]).T:
            tokens = np.concatenate([t.ids[start:end] for t, start, end in zip(trials, starts, ends, strict=True)])
            logits.append(runner.forward(Packed(tokens, tables, starts, ends - starts)).float())
            starts = ends
    return torch.stack(logits)
