"""Every faster attention against the gathering one, family by family: windows, chunks, softcap, sinks, odd heads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from rollout.models.backend import Steps, fastest
from rollout.models.gather import GatherStep
from rollout.models.interface import InterfaceRunner, InterfaceTier
from rollout.models.packed import Packed
from rollout.models.pages import PagePool
from tests.families import INTERFACE, VOCABULARY, tiny

#: Relative to the logits' size. In half precision the two round weights and values at other places.
_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.06}
#: Forwards of (sequence, start, end): a packed prefill, one that goes on, and mixes with rows that decode.
_FORWARDS = (
    ((0, 0, 40), (1, 0, 5), (2, 0, 1)),
    ((0, 40, 41), (1, 5, 37), (2, 1, 2), (3, 0, 17)),
    ((3, 17, 18), (2, 2, 3), (0, 41, 42), (1, 37, 38)),
)


def logits_of(model: PreTrainedModel, steps: Steps | None) -> torch.Tensor:
    """Of all forwards; ``steps`` None is the fastest there is."""
    tier = InterfaceTier(model)
    layout = tier.probe()
    pool = PagePool(layout, 3, torch.device("cpu"))
    for _ in range(4):
        pool.grow()
    rng = np.random.default_rng(5)
    tokens = rng.integers(3, VOCABULARY, (4, 48))
    tables = rng.permutation(pool.free_pages).reshape(4, 3)
    if steps is None:
        steps = fastest(pool)
        if steps is GatherStep:
            pytest.skip("there is no compiler on this machine")
    runner = InterfaceRunner(model, pool, steps)
    logits = []
    with tier.on_loan():
        for parts in _FORWARDS:
            logits.append(
                runner.forward(
                    Packed(
                        tokens=np.concatenate([tokens[sequence, start:end] for sequence, start, end in parts]),
                        tables=np.stack([tables[sequence] for sequence, _, _ in parts]),
                        starts=np.array([start for _, start, _ in parts]),
                        lengths=np.array([end - start for _, start, end in parts]),
                    )
                )
            )
    return torch.cat(logits).float()


@pytest.mark.parametrize("family", INTERFACE)
def test_the_fastest_attention_agrees_with_the_gathering_one(family: str) -> None:
    for dtype, tolerance in _TOLERANCE.items():
        model = tiny(family, dtype)
        gathered, compiled = logits_of(model, GatherStep), logits_of(model, None)
        distance = (compiled - gathered).norm(dim=-1) / gathered.norm(dim=-1)
        # Rounding can send a token of a mixture of experts elsewhere, so in half precision most rows count.
        found = distance.max() if dtype == torch.float32 else distance.median()
        assert found < tolerance, (dtype, distance)
