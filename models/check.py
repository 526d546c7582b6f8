"""A check at start that pages give the model's own numbers: what the probe cannot see must not pass silently."""

from __future__ import annotations

import numpy as np
import torch

from rollout.models.errors import UnsupportedModel
from rollout.models.loan import Loan, unwrap, vocabulary_size
from rollout.models.packed import Packed
from rollout.models.pages import PagePool
from rollout.models.tier import Tier

_TOKENS = 24
_CUT = 18
#: Largest distance of logits, relative to their size. A model whose state is not in pages is off by its whole
#: size; a mixture of experts in half precision can route a token differently.
_TOLERANCE = {torch.float32: 1e-2, torch.float64: 1e-2}
_HALF_TOLERANCE = 0.3


def check_pages(tier: Tier) -> None:
    """Compares a prompt computed in two prefills and a decode with one forward of the model's own attention.

    Raises:
        UnsupportedModel: they differ by more than rounding.
    """
    model = tier.model
    base = unwrap(model)
    ids = np.arange(3, 3 + _TOKENS) * 7 % vocabulary_size(model)
    with Loan(model)():
        own = model(
            input_ids=torch.from_numpy(ids[None]).to(base.device),
            position_ids=torch.arange(_TOKENS, device=base.device)[None],
            use_cache=False,
        ).logits[0, -3:]
    layout = tier.probe()
    pages = np.arange((_TOKENS + layout.page_size - 1) // layout.page_size)
    pool = PagePool(layout, len(pages), base.device)
    pool.grow()
    runner, last = tier.runner(pool), _TOKENS - 1
    with tier.on_loan():
        parts = ((0, _CUT), (_CUT, last), (last, _TOKENS))
        logits = [
            runner.forward(Packed(ids[start:end], pages[None], np.array([start]), np.array([end - start])))
            for start, end in parts
        ]
    ours = torch.cat(logits[1:]).float()
    theirs = own[-2:].float()
    distance = float((ours - theirs).norm() / theirs.norm())
    tolerance = _TOLERANCE.get(layout.dtype, _HALF_TOLERANCE)
    if not distance <= tolerance:
        raise UnsupportedModel(
            f"{type(base).__name__} (model type {base.config.model_type!r}) gives other logits over pages than in its "
            f"own forward (relative distance {distance:.2g}, at most {tolerance} is rounding)."
        )
