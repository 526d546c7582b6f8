"""How many generated tokens a forward computes again, where they are computed one by one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rollout.engine import recomputation
from rollout.engine.recomputation import Recomputation
from rollout.engine.scoring_sequences import Pair, make_sequences, plan_chunks
from rollout.requests import Request
from rollout.sampling_params import SamplingParams
from tests.support.scheduler_world import ALL, LAYOUT, World

APART = replace(LAYOUT, decodes_apart=True)


@pytest.fixture(autouse=True)
def _few_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recomputation, "MOST_KEYS", 40)


@pytest.mark.parametrize(("layout", "lengths"), [(LAYOUT, [8]), (APART, [3, 3, 2])])
def test_a_preempted_row_computes_its_completion_in_parts(layout: recomputation.KVLayout, lengths: list[int]) -> None:
    world = World([Request("a", list(range(5)), SamplingParams(max_new_tokens=50))], layout=layout)
    world.admit()
    world.prefill()
    for _ in range(7):
        world.decode()
    assert world.scheduler.preempt_youngest()
    world.admit()
    assert len(world.scheduler.prefills[0].context) == 13
    found = []
    while world.scheduler.prefills:
        found.append(sum(chunk.tokens for chunk in world.scheduler.prefill_chunks(ALL)))
        world.prefill(ALL)
    assert found == lengths


def test_scored_completions_share_one_limit() -> None:
    pairs = [Pair(np.arange(5), np.arange(6)), Pair(np.arange(7), np.arange(3))]
    chunks = plan_chunks(
        make_sequences(pairs, APART, share=True), 99, 99, Recomputation(APART), whole_context=False, prefix_first=False
    )
    assert [(chunk.start, chunk.end, chunk.decoded) for chunk in chunks] == [(0, 9, 4), (0, 7, 0)]


def test_a_forward_gets_one_token_whatever_its_length() -> None:
    limit = Recomputation(APART)
    assert [limit.take(80, 3, 5), limit.take(80, 3, 5), limit.take(0, 3, 5)] == [1, 0, 3]
